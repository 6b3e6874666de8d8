"""Runs that go on with another number of ranks, or on a rank that hangs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from data.shard_maker import make_shards
from helpers import resuming
from helpers import training as small
from helpers.ddp import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(
    folder: Path, out: Path, world: int, size: int, resume: Path | None, workers: int = 0
) -> dict[str, Any]:
    """A run of one epoch; with no ``resume`` it writes a checkpoint of every step."""
    model = resuming.module("unic")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    steps = resuming.run(
        model,
        resuming.data(urls, batch_size=size, num_workers=workers),
        out,
        make=small.trainer if world == 1 else small.ddp_trainer,
        save={"every_n_train_steps": 1} if resume is None else None,
        resume=resume,
        max_epochs=1,
    )
    state = {k: v for k, v in steps.state.items() if not k.startswith("teachers.")}
    return {
        "keys": steps.keys,
        "positions": steps.positions,
        "losses": steps.losses,
        "state": state,
    }


def several(folder: Path, out: Path) -> list[dict[str, Any]]:
    """On two ranks (whose processes may not have workers; the soak's have): a whole run, it again
    from its second step, and the rest of one process's run."""
    return [
        fit(folder, out / "two", 2, 4, None),
        fit(folder, out, 2, 4, out / "two" / "epoch=0-step=2.ckpt"),
        fit(folder, out, 2, 2, out / "one" / "epoch=0-step=2.ckpt"),
        fit(folder, out, 2, 5, out / "one" / "epoch=0-step=3.ckpt"),
    ]


def real(run: dict[str, Any]) -> list[str]:
    rows = zip(run["keys"], run["positions"], strict=True)
    return [k for keys, at in rows for k, p in zip(keys, at, strict=True) if p >= 0]


def test_from_one_rank_to_two_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    make_shards(folder, [9, 14, 3])  # 26 samples
    alone = fit(folder, tmp_path / "one", 1, 4, None)  # six batches of four
    a, b = run_ranks(several, 2, folder, tmp_path, timeout=200)
    order = real(alone)
    assert len(order) == 24
    # Two ranks, interrupted: as uninterrupted, bit for bit, on each.
    for rank in (a, b):
        whole, again = rank[0], rank[1]
        assert again["keys"] == whole["keys"][2:]
        assert again["losses"] == whole["losses"][2:]
        assert all(torch.equal(v, again["state"][k]) for k, v in whole["state"].items())
    # 1 → 2 with the same global batch, and with a larger one that does not divide the rest.
    for number, done in ((2, 8), (3, 12)):
        first, second = a[number], b[number]
        assert sorted(real(first) + real(second)) == sorted(order[done:])
        assert [len(k) for k in first["keys"]] == [len(k) for k in second["keys"]]
    # 2 → 1, from the ranks' step 1: the same 8 samples a step, and with 3.
    for size in (8, 3):
        rest = fit(folder, tmp_path, 1, size, tmp_path / "two" / "epoch=0-step=1.ckpt", workers=2)
        assert real(rest) == order[8:]
        assert len(rest["keys"]) == (2 if size == 8 else 6)


HANGS = """
import time
import lightning.pytorch as pl
class Hang(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2 and trainer.global_rank == 1:
            time.sleep(600)
"""
CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.DDPStrategy
    init_args: {{timeout: "0:00:15"}}
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}/run
  callbacks:
    - {{class_path: multikd.callbacks.StallWatch, init_args: {{minutes: 0.4}}}}
model:
  teachers:
    vit:
      class_path: multikd.teachers.Teacher
      init_args: {{encoder: "timm:test_vit", checkpoint: {folder}/t.pth, image_size: 32}}
  student:
    class_path: StudentEncoder
    init_args: {{name: test_vit, image_size: 32, rungs: last}}
  projectors: {{class_path: LinearProjectors}}
data:
  train: {folder}/shards
  train_views: {{class_path: LightViews, init_args: {{size: 32}}}}
  batch_size: 2
  num_workers: 0
"""


def command_of(folder: Path, rank: int, port: int) -> None:
    """``multikd fit`` as torchrun starts it, in a process of its own."""
    file = os.open(folder / f"said.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    place |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({key: str(value) for key, value in place.items()}, TORCHELASTIC_RUN_ID="t")
    os.chdir(folder)
    from multikd.cli import main

    code = main(["fit", f"--config={folder}/c.yaml", "--trainer.callbacks+=hangs_for_tests.Hang"])
    sys.stderr.flush()
    os._exit(code)


@pytest.mark.slow
def test_when_a_rank_hangs_every_rank_ends_with_the_reason(tmp_path: Path) -> None:
    """Real gloo ranks: the one that waits by its collective's time-out, the other by itself."""
    make_shards(tmp_path / "shards", [9, 8], size=(32, 32))
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), tmp_path / "t.pth")
    (tmp_path / "hangs_for_tests.py").write_text(HANGS, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=command_of, args=(tmp_path, rank, port), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    said = [(tmp_path / f"said.{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [75, 75], said
    assert "multikd: rank 0 of 2 stopped after step 2: another rank died or hung (" in said[0]
    assert "rank 1 made no progress for" in said[1]
    for words in said:
        assert "start the same command again with --resume auto" in words
    stack = (tmp_path / "run" / "stalled.1.txt").read_text(encoding="utf-8")
    assert "inside batch 2 of epoch 0" in stack or "after batch 1 of epoch 0" in stack
    assert "hangs_for_tests.py" in stack  # the line that hung
    assert not (tmp_path / "run" / "stalled.0.txt").exists()
