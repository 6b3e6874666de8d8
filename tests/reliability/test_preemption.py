"""`multikd fit` told to stop by a scheduler, and started again: by the command that users type."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from data.shard_maker import make_shards

from multikd.callbacks.preemption import SaveOnSignal
from multikd.cli import main
from multikd.errors import EXIT_AGAIN

SIGNALS = """
import json, os, signal, lightning.pytorch as pl
class Send(pl.Callback):
    def __init__(self, number: int, step: int, times: int = 1, where: str = "batch") -> None:
        self.number, self.step, self.times, self.where = number, step, times, where
    def send(self, trainer):
        if trainer.global_step == self.step and self.times:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.where == "batch":
            self.send(trainer)
    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if self.where == "validation":
            self.send(trainer)
    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.where == "saving":
            self.send(trainer)
class Rows(pl.Callback):
    def __init__(self, path: str) -> None:
        self.path = path
    def write(self, *row):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\\n")
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (record,) = module.last_records
        self.write(trainer.current_epoch, batch_idx, batch.keys, float(record.total))
    def on_validation_end(self, trainer, module):
        self.write("validated", trainer.global_step)
"""


@dataclass
class Place:
    root: Path
    config: Path
    rows: list[list[Any]]
    state: dict[str, torch.Tensor]

    def command(self, run: Path, *more: str) -> list[str]:
        args = ["fit", f"--config={self.config}", f"--trainer.default_root_dir={run}"]
        rows = f"--trainer.callbacks.path={run}.jsonl"
        return [*args, "--trainer.callbacks+=signals_for_tests.Rows", rows, *more]


def send(number: int, step: int, times: int = 1, where: str = "batch") -> list[str]:
    at = "--trainer.callbacks"
    values = {"number": int(number), "step": step, "times": times, "where": where}
    return [f"{at}+=signals_for_tests.Send", *(f"{at}.{k}={v}" for k, v in values.items())]


def rows_of(run: Path) -> list[list[Any]]:
    text = Path(f"{run}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("preempted")
    (root / "signals_for_tests.py").write_text(SIGNALS, encoding="utf-8")
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), root / "teacher.pth")
    make_shards(root / "shards", [9, 8], size=(32, 32))  # four batches of four
    make_shards(root / "others", [9, 8], size=(32, 32), name="o")
    package = "multikd"
    saver = {"filename": "last", "every_n_train_steps": 3, "enable_version_counter": False}
    content = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": saver,
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {**saver, "every_n_train_steps": 4},  # and at the end
                },
            ],
        },
        "model": {
            "class_path": f"{package}.modules.DistillationModule",
            "init_args": {
                "teachers": {
                    "vit": {
                        "class_path": f"{package}.teachers.Teacher",
                        "init_args": {
                            "encoder": "timm:test_vit",
                            "checkpoint": str(root / "teacher.pth"),
                            "image_size": 32,
                        },
                    }
                },
                "student": {
                    "class_path": f"{package}.students.StudentEncoder",
                    "init_args": {"name": "test_resnet", "image_size": 32, "rungs": "last"},
                },
                "projectors": {"class_path": f"{package}.projectors.LinearProjectors"},
                "validate_losses": False,
            },
        },
        "data": {
            "class_path": f"{package}.data.module.ShardDataModule",
            "init_args": {
                "train": str(root / "shards"),
                "val": str(root / "shards"),
                "train_views": {
                    "class_path": f"{package}.data.views.LightViews",
                    "init_args": {"size": 32},
                },
                "batch_size": 4,
                "num_workers": 0,
            },
        },
    }
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    sys.path.append(str(root))
    place = Place(root, config, [], {})
    run = root / "whole"
    assert main(place.command(run)) == 0
    place.rows, place.state = rows_of(run), state_of(run)
    yield place
    sys.path.remove(str(root))


def goes_on_as_uninterrupted(place: Place, run: Path, *how: str) -> None:
    before = len(rows_of(run))
    assert main(place.command(run, *how)) == 0
    rows = rows_of(run)
    assert [row for row in rows if row[0] != "validated"] == [
        row for row in place.rows if row[0] != "validated"
    ]
    assert rows[before:] == place.rows[-len(rows[before:]) :]
    for key, value in state_of(run).items():
        assert torch.equal(value, place.state[key]), key


@pytest.mark.parametrize(
    ("number", "step", "times", "where"),
    [
        (signal.SIGUSR1, 4, 2, "batch"),
        (signal.SIGTERM, 2, 1, "validation"),
        (signal.SIGTERM, 3, 1, "saving"),
    ],
)
def test_it_finishes_the_step_saves_and_ends_with_75(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    step: int,
    times: int,
    where: str,
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    capsys.readouterr()
    command = place.command(run, *send(number, step, times, where), "--resume", "auto")
    assert main(command) == EXIT_AGAIN == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    said = capsys.readouterr().err
    assert "no checkpoint to go on from in" in said
    after = step if where == "validation" else step + 1
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {after}, saved to {run}/preempted.ckpt" in said
    assert "--resume auto goes on (exit code 75)" in said.splitlines()[-1]
    assert len([row for row in rows_of(run) if row[0] != "validated"]) == after
    goes_on_as_uninterrupted(place, run, "--resume=auto")
    assert f"going on from {run}/preempted.ckpt (step {after})" in capsys.readouterr().err
    validated = [row[1] for row in rows_of(run) if row[0] == "validated"]
    assert validated == [2, 4, 6, 8]


def test_slurm_starts_the_same_command_again(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning's SLURMEnvironment, and an ``scontrol`` that writes down what it is asked."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    asked = tmp_path / "asked"
    script = f'#!/bin/sh\necho "$@" >> {asked}\n'
    for name in ("scontrol", "srun"):
        (binaries / name).write_text(script)
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    variables = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    variables |= {"JOB_ID": 4242, "JOB_NAME": "distil", "NNODES": 1}
    for key, value in variables.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    run = tmp_path / "run"
    assert main(place.command(run, *send(signal.SIGUSR1, 2))) == EXIT_AGAIN
    assert asked.read_text() == "requeue 4242\n"
    assert (run / "hpc_ckpt_1.ckpt").is_file()
    capsys.readouterr()
    goes_on_as_uninterrupted(place, run)  # SLURM adds no argument
    assert "going on from" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_passed_over(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(place.command(run, *send(signal.SIGTERM, 4))) == EXIT_AGAIN  # at 5; last is of 4
    newest = run / "preempted.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (run / "last.ckpt.xyz.multikd-tmp").write_bytes(b"half a checkpoint")
    capsys.readouterr()
    Path(f"{run}.jsonl").write_text("")
    assert main(place.command(run, "--resume", "auto", "--data.num_workers=2")) == 0
    said = capsys.readouterr().err
    assert "preempted.ckpt: truncated or damaged, passed over; last.ckpt is used instead" in said
    assert f"going on from {run}/last.ckpt (step 4)" in said
    assert rows_of(run)[0][:2] == ["validated", 4]  # which was due when it was written
    assert rows_of(run)[1:] == [row for row in place.rows if row[0] == 1 or row[1] in (6, 8)]
    for key, value in state_of(run).items():
        assert torch.equal(value, place.state[key]), key
    for path in run.glob("*.ckpt"):
        path.write_bytes(b"")
    assert main(place.command(run, "--resume", "auto")) == 2
    assert "none of the 2 checkpoints of this run is whole" in capsys.readouterr().err


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_may_change_and_what_not(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(place.command(run, *send(signal.SIGTERM, 4))) == EXIT_AGAIN
    go_on = place.command(run, "--resume", "auto")
    changed = ["--data.seed=3", "--model.schedule.warmup_epochs=1"]
    said = refused([*go_on, *changed], capsys)
    assert "settings differ from those of" in said
    assert "data.seed: 0 → 3" in said
    assert "model.schedule" in said
    assert "--allow_changes" in said
    others = f"--data.train={place.root / 'others'}"
    said = refused([*go_on, others], capsys)
    assert "lies inside epoch 1, at sample 4 of 16, of other training data (shards: " in said
    assert "--allow_changes" in said
    for wrong, words in (
        ("--resume=last", "--resume takes 'auto', received 'last'"),
        ("--ckpt_path=last", "leave --ckpt_path out"),
    ):
        assert words in refused([*go_on, wrong], capsys)
    # Other shards, by flag; other batches and workers, without one.
    assert main([*go_on, others, "--allow_changes", "--trainer.max_epochs=2"]) == 0
    assert rows_of(run)[-2][2][0].startswith("o-")
    (run / "last.ckpt").unlink()
    Path(f"{run}.jsonl").write_text("")
    assert main([*go_on, "--data.batch_size=8", "--trainer.val_check_interval=1.0"]) == 0
    assert "data.batch_size: 4 → 8" in capsys.readouterr().err
    (first, second) = (row[2] for row in rows_of(run) if row[0] == 1)
    rest = [key for row in place.rows if row[0] == 1 and row[1] > 0 for key in row[2]]
    assert [*first, *second] == rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"signals": ["SIGKILL"]}, "names of signals that can be caught"),
        ({"signals": ["TERM"]}, "names of signals"),
        ({"filename": "a/b"}, "must be a plain name"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SaveOnSignal(**arguments)
