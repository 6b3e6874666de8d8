"""Runs that go on with another number of ranks, or on a rank that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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
import sys, time
from pathlib import Path
from helpers import training as small
from multikd.callbacks import StallWatch

class Hang(small.pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            time.sleep(600)

if __name__ == "__main__":
    data = small.Data([small.batch(count=2, seed=s) for s in range(4)])
    module = small.module(teachers=small.teachers(1))
    watch = StallWatch(minutes=1.5 / 60)
    small.trainer(Path(sys.argv[1]), watch, Hang()).fit(module, datamodule=data)
"""


def test_a_rank_that_hangs_ends_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS, encoding="utf-8")
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "hangs.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "rank 0 made no progress for" in done.stderr
    assert "start the same command again with --resume auto" in done.stderr
    stack = (tmp_path / "stalled.0.txt").read_text(encoding="utf-8")
    assert "inside batch 2 of epoch 0" in stack or "after batch 1 of epoch 0" in stack
    assert "hangs.py" in stack  # the line that hung
