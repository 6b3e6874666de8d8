"""A file of several megabytes and checks: written under a temporary name, renamed when it is right.

Unlike ``multikd.files`` it stages a whole folder, since ONNX may come in two files that name one
another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multikd.files import in_use, remove_abandoned

DATA_SUFFIX = ".data"


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A path of ``out``'s name in a temporary folder beside it; moved to ``out`` on success.

    Where the block raises, ``out`` is as it was. ``NAME.data`` beside the file (external data of an
    ONNX) moves along.

    Raises:
        ValueError: ``out`` exists and is a folder, or ``overwrite`` is False.
        OSError: it can't be written, or the disk is full.
    """
    if out.is_dir() or (out.exists() and not overwrite):
        remedy = "give a file name" if out.is_dir() else "give another name, or overwrite it"
        raise ValueError(f"{out} exists already: {remedy}")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out, ".tmp")
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        with in_use(folder):
            yield folder / out.name
            _move(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    data, staged_data = with_suffix(out), with_suffix(folder / out.name)
    for path in (folder / out.name, staged_data):
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if staged_data.exists() or data.exists():
        # Two renames: never an old graph beside new weights.
        out.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    if staged_data.exists():
        staged_data.rename(data)
    (folder / out.name).replace(out)


def with_suffix(path: Path) -> Path:
    """Where the external data of a file lies."""
    return path.with_name(path.name + DATA_SUFFIX)


def size_in_bytes(path: Path) -> int:
    """Of a file and its external data."""
    return sum(p.stat().st_size for p in (path, with_suffix(path)) if p.exists())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what torch raises at a full disk (a RuntimeError) into an OSError of one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"{path.name} could not be written ({first_line(error)}): is the disk full?"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of a library's complaint, with its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
