"""Checkpoint files: whole or not there, verified when read, the newest whole one found."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

from multikd import saving
from multikd.callbacks import SaveOnSignal
from multikd.export.folder import CONFIG, new_folder
from multikd.export.staging import staged
from multikd.files import TEMPORARY_SUFFIX, remove_abandoned
from multikd.saving import (
    CheckpointNotWrittenError,
    VerifiedCheckpointIO,
    newest_whole,
    verify_checkpoint,
    write_checkpoint,
)


def state(step: int, size: int = 5000) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.arange(size) + step}}


def test_every_flipped_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    verify_checkpoint(path)
    assert torch.equal(
        VerifiedCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.arange(5000) + 1
    )
    whole = path.read_bytes()
    at = whole.index((torch.arange(5000) + 1).numpy().tobytes())
    for offset in (at, at + 17_777, at + 39_999):
        damaged = bytearray(whole)
        damaged[offset] ^= 4
        path.write_bytes(damaged)
        # torch itself would read it without a word, which is why we look.
        assert torch.load(path, weights_only=True)["global_step"] == 1
        with pytest.raises(ValueError, match="a.ckpt is truncated or damaged"):
            VerifiedCheckpointIO().load_checkpoint(path)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            verify_checkpoint(path)


def test_nothing_that_runs_code_is_read(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"global_step": 1, "x": Runs()}, tmp_path / "bad.ckpt")
    for wish in (None, False, True):
        with pytest.raises(Exception, match="[Ww]eights"):
            VerifiedCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=wish)
    said: list[str] = []
    assert newest_whole([tmp_path / "bad.ckpt"], said.append) is None
    assert not (tmp_path / "ran").exists()


def test_the_newest_whole_one_by_steps_not_by_clocks(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.ckpt" for name in ("best", "last", "preempted")]
    for path, step in zip(paths, (3, 9, 12), strict=True):
        write_checkpoint(state(step), path)
    for path, when in zip(paths, (4e9, 1e9, 1e6), strict=True):  # the clock was set back
        os.utime(path, (when, when))
    said: list[str] = []
    assert newest_whole(paths, said.append) == (paths[2], 12)
    assert said == []
    paths[2].write_bytes(paths[2].read_bytes()[:-300])
    assert newest_whole(paths, said.append) == (paths[1], 9)
    assert said == ["preempted.ckpt: truncated or damaged, passed over; last.ckpt is used instead"]
    damaged = bytearray(paths[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    paths[1].write_bytes(damaged)
    assert newest_whole([*paths, tmp_path / "gone.ckpt"], said.append) == (paths[0], 3)
    assert "last.ckpt, preempted.ckpt: truncated or damaged" in said[1]
    paths[0].write_bytes(b"")
    assert newest_whole(paths, said.append) is None
    assert "nothing else is there" in said[2]


def test_a_write_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(state(1), path)
    before = path.read_bytes()
    left = tmp_path / f"last.ckpt.abc{TEMPORARY_SUFFIX}"
    left.write_bytes(b"of a process that was killed")
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(saving.os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    write_checkpoint(state(1), path)
    assert len(synced) == 2  # the file and its folder
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def broken(source: str, target: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving.os, "replace", broken)
    with pytest.raises(CheckpointNotWrittenError, match="could not be written .Input/output error"):
        write_checkpoint(state(2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def little_disk(tmp_path: Path) -> Any:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() != 0 or libc.mount(b"t", str(folder).encode(), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class FillUp(small.Notes):
    """Fills the disk at a step, and keeps the checkpoint of that moment."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder, self.step, self.kept = folder, step, b""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            self.kept = (self.folder / "last.ckpt").read_bytes()
            free = os.statvfs(self.folder)
            left = free.f_bavail * free.f_frsize - 20_000
            (self.folder / "other").write_bytes(b"x" * left)


def fit_on(disk: Path, make: Any, teachers: int = 1) -> tuple[str, int, bool]:
    module = small.module(teachers=small.teachers(teachers), student=tiny_student())
    fill = FillUp(disk, step=2)
    saver = ModelCheckpoint(
        disk, "last", every_n_train_steps=1, save_weights_only=True, enable_version_counter=False
    )
    io = VerifiedCheckpointIO()
    runner = make(disk.parent, fill, SaveOnSignal(), saver, io=io)
    try:
        runner.fit(module, datamodule=small.Data([small.batch(seed=s) for s in range(6)]))
    except CheckpointNotWrittenError as error:
        whole = not fill.kept or (disk / "last.ckpt").read_bytes() == fill.kept
        return str(error), runner.global_step, whole
    raise AssertionError("it went on")


def tiny_student() -> Any:
    return small.student("test_efficientnet", 32, rungs="last")


def alone(root: Path, *callbacks: Any, io: Any) -> Any:
    return small.trainer(root, *callbacks, enable_checkpointing=True, plugins=[io])


def of_ranks(root: Path, *callbacks: Any, io: Any) -> Any:
    plugins = [small.RankEnvironment(), io]
    return small.ddp_trainer(root, *callbacks, enable_checkpointing=True, plugins=plugins)


def on_two(disk: Path) -> tuple[str, int, bool]:
    return fit_on(disk, of_ranks)


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_one(little_disk: Path) -> None:
    said, step, kept = fit_on(little_disk, alone)
    assert said.startswith("the disk is full: ")
    assert "last.ckpt could not be written (" in said
    assert "go on with --resume auto" in said
    assert kept
    assert step == 3  # the step whose checkpoint failed was the last
    assert sorted(p.name for p in little_disk.iterdir()) == ["last.ckpt", "other"]
    assert torch.load(little_disk / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_full_disk_stops_both_ranks(little_disk: Path) -> None:
    first, second = run_ranks(on_two, 2, little_disk, timeout=100)
    assert first[0] == second[0]
    assert first[0].startswith("the disk is full: ")
    assert first[2]
    assert (first[1], second[1]) == (4, 4)  # both learn of it after the step that follows


def export(out: Path, content: str) -> None:
    with new_folder(out, overwrite=True) as folder:
        (folder / CONFIG).write_text(f'{{"origin": "multikd", "is": "{content}"}}')


def killed(out: Path, when: str) -> None:
    """A process that is killed while it exports."""
    if when == "between the renames":
        original = Path.rename

        def once(path: Path, to: Path) -> Any:
            if path.name.endswith(".tmp"):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, to)

        Path.rename = once  # type: ignore[method-assign, assignment]
        export(out, "second")
    elif when == "a file":
        with staged(out, overwrite=False):
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        with new_folder(out, overwrite=True):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("when", ["a folder", "between the renames", "a file"])
def test_what_a_killed_export_leaves_is_gone_with_the_next(when: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if when == "between the renames":
        export(out, "first")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=killed, args=(out, when))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = sorted(p.name.rpartition(".")[2] for p in tmp_path.iterdir())
    assert left == (["old", "tmp"] if when == "between the renames" else ["tmp"])
    with new_folder(tmp_path / "other"), new_folder(tmp_path / "out.1"):
        pass
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".out.")]) == len(left)
    if when == "a file":
        with staged(out, overwrite=False) as path:
            path.write_text("whole")
    else:
        if when == "between the renames":
            with pytest.raises(ValueError, match="exists already"), new_folder(out):
                pass
            assert '"first"' in (out / CONFIG).read_text()  # is back
        with new_folder(out, overwrite=True):
            # What a living process writes is left alone, though the number is another's.
            (mine,) = [p for p in tmp_path.iterdir() if p.name.startswith(".out.")]
            living = mine.rename(mine.with_name(".out.1.tmp"))
            remove_abandoned(out, ".tmp")
            living.rename(mine)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
