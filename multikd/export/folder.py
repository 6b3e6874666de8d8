"""A folder that is whole or not there: written under another name, and renamed when it is right."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multikd.files import abandoned, in_use, remove_abandoned

CONFIG, MANIFEST = "config.json", "manifest.json"


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to write into; it becomes ``out`` unless the block raises.

    Raises:
        ValueError: ``out`` exists, and is no export or is not to be overwritten.
        OSError: the place can't be written to, or its disk is full; ``out`` is as it was.
    """
    check_target(out, overwrite)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with in_use(temporary):
            yield temporary
            _publish(temporary)
            _move(temporary, out)
    except Exception as error:
        if is_full(error):
            raise OSError(
                f"the disk is full, so nothing was written: free some space where {out.parent} "
                "is, or export to another place",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, before any work is done; tidy up after killed processes."""
    _tidy(out)
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{out} exists already: give another folder, or --overwrite it")
    if out.is_symlink() or not is_export(out):
        raise ValueError(
            f"{out} is not an earlier export of multikd, so it is not overwritten: "
            "give another folder"
        )


def is_export(folder: Path) -> bool:
    """Whether ``multikd export`` made this folder."""
    for name in (CONFIG, MANIFEST):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("origin") == "multikd":
            return True
    return False


def is_full(error: BaseException) -> bool:
    """Whether an error is the disk's: safetensors and onnx wrap it in errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left" in text or "os error 28" in text or "Disk quota exceeded" in text


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(folder: Path) -> None:
    """Give files the usual permissions (safetensors makes them private) and sync them."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move(temporary: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier one gives way, and returns on failure."""
    if not out.exists():
        temporary.rename(out)
        return
    retired = out.parent / f".{out.name}.{os.getpid()}.old"
    shutil.rmtree(retired, ignore_errors=True)
    with in_use(out):
        out.rename(retired)
        try:
            temporary.rename(out)
        except BaseException:
            retired.rename(out)
            raise
        shutil.rmtree(retired)


def _tidy(out: Path) -> None:
    """Undo what killed processes left beside ``out``: one died between ``_move``'s two renames."""
    for earlier in abandoned(out, ".old"):
        if out.exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.rename(out)
    remove_abandoned(out, ".tmp")
