"""Checkpoint files that are whole or not there, are verified when read, and found again.

A checkpoint is written under a temporary name, synced and renamed; its zip archive carries a CRC
of every part, which is checked in full before anything is loaded. (torch writes these sums, but is
built not to look at them.)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from multikd.files import TEMPORARY_SUFFIX

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 22


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; those before it are as they were."""

    exit_code = 1


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's way to checkpoint files: atomic, synced, verified, never unpickling.

    Addresses (``s3://…``) are left to Lightning. ``deferred`` is for several ranks: an error of
    rank 0, which alone writes, is kept in ``failure`` until a callback has told the others; until
    then nothing is removed, since what is removed would be the last good checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.deferred = False
        self.failure: CheckpointNotWrittenError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write it whole, or leave everything as it was.

        Raises:
            CheckpointNotWrittenError: the disk is full, or can't be written to.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_checkpoint(checkpoint, Path(path))
        except CheckpointNotWrittenError as error:
            self.failure = error
            if not self.deferred:
                raise
            log.error("%s", error)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read it after checking every byte; always with ``weights_only``.

        Raises:
            ValueError: it is damaged.
        """
        if "://" not in str(path):
            verify_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it, unless the one that was to replace it could not be written."""
        if self.failure is None:
            super().remove_checkpoint(path)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save`` to a temporary name in the same folder, sync, rename, sync the folder.

    Raises:
        CheckpointNotWrittenError: with the reason, and how much room there is; nothing is left
            behind.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        descriptor, temporary = tempfile.mkstemp(
            prefix=path.name + ".", suffix=TEMPORARY_SUFFIX, dir=path.parent
        )
        with os.fdopen(descriptor, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError
        raise CheckpointNotWrittenError(_why(path, error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of earlier attempts to write ``path``."""
    for left in path.parent.glob(f"{_escaped(path.name)}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            left.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _why(path: Path, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
    full = (isinstance(cause, OSError) and cause.errno in _FULL) or (
        cause is None and free is not None and free < 1 << 20
    )
    if full:
        room = "" if free is None else f" ({free / 1e6:.1f} MB are left)"
        return (
            f"the disk is full: {path} could not be written{room}; the checkpoints before it are "
            "as they were: make room there, or keep fewer (save_top_k), and go on with "
            "--resume auto"
        )
    reason = getattr(cause, "strerror", None) or " ".join(str(error).split())[:160]
    return (
        f"{path} could not be written ({reason}); the checkpoints before it are as they were: "
        "give a folder that can be written to, and go on with --resume auto"
    )


def verify_checkpoint(path: Path) -> None:
    """Check every byte of every part against its sum.

    Raises:
        ValueError: the file is truncated or damaged, or no checkpoint.
    """
    if path.is_dir():
        return  # a distributed checkpoint, which torch reads part by part
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                with archive.open(part) as file:
                    while file.read(_CHUNK):
                        pass
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile raises nearly anything on damaged bytes
        raise ValueError(
            f"{path} is truncated or damaged ({type(error).__name__}): give another checkpoint of "
            "the run, or --resume auto, which finds the newest whole one"
        ) from error


class Found(NamedTuple):
    """A checkpoint of a folder, and how far it is."""

    path: Path
    step: int


def newest_whole(paths: Iterable[Path], say: Callable[[str], None]) -> Found | None:
    """The checkpoint of the most optimiser steps that is whole.

    By the steps inside, not by the files' times: clocks jump, and files are copied.

    Args:
        paths: candidates.
        say: is told of every one that is passed over, and what is used instead.
    """
    known: list[tuple[int, float, Path]] = []
    damaged: list[str] = []
    for path in paths:
        try:
            known.append((_step_of(path), path.stat().st_mtime, path))
        except FileNotFoundError:
            continue
        except Exception:  # as in verify_checkpoint, and torch's
            damaged.append(path.name)
    found: Found | None = None
    for step, _, path in sorted(known, reverse=True):
        try:
            verify_checkpoint(path)
        except (ValueError, OSError):
            damaged.append(path.name)
            continue
        found = Found(path, step)
        break
    if damaged:
        instead = "nothing else is there" if found is None else f"{found.path.name} is used instead"
        say(f"{', '.join(sorted(damaged))}: truncated or damaged, passed over; {instead}")
    return found


def steps_in(path: Path) -> tuple[int, float]:
    """Optimiser steps of a checkpoint, −1 where they can't be read; then the file's time, for equal
    ones: a clock may have been set back."""
    try:
        return _step_of(path), path.stat().st_mtime
    except Exception:  # as in verify_checkpoint, and torch's
        return -1, 0.0


def _step_of(path: Path) -> int:
    """Optimiser steps of a checkpoint, without reading its tensors."""
    if path.is_dir():
        meta = path / "meta.pt"  # Lightning's, beside the parts of a distributed checkpoint
        state = torch.load(meta, map_location="cpu", weights_only=True)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(state["global_step"])
