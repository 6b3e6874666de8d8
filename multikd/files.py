"""Files that are either whole or not there: atomic writes and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; there, two processes may do the same work twice
    fcntl = None  # type: ignore[assignment]

TEMPORARY_SUFFIX = ".multikd-tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a disk without room."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or none (temp name + rename).

    Raises:
        OSError: the folder cannot be written to.
    """
    descriptor, temporary = tempfile.mkstemp(
        prefix=path.name + ".", suffix=TEMPORARY_SUFFIX, dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name on an empty file
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from colleagues
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """The same for text in UTF-8, making the folder where it is missing.

    Raises:
        OSError: the folder can't be written to, or the disk is full; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8"))


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (made if needed) between threads and processes.

    The system gives the lock back when its holder dies, so nothing is left to clean up.

    Raises:
        BlockingIOError: ``wait`` is false and somebody else holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Mark a folder as this process's; the mark goes when the process does, however it ends."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def abandoned(out: Path, suffix: str) -> list[Path]:
    """Folders ``.NAME.PROCESS<suffix>`` beside ``out`` that no living process has ``in_use``.

    By locks, not by process numbers, which other machines and containers have, too.
    """
    name = re.compile(rf"\.{re.escape(out.name)}\.\d+{re.escape(suffix)}")
    found = []
    with contextlib.suppress(OSError):
        for path in out.parent.iterdir():
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.append(path)
    return [path for path in found if not _is_in_use(path)]


def remove_abandoned(out: Path, suffix: str) -> None:
    """Remove what killed processes left of earlier attempts to write ``out``."""
    for folder in abandoned(out, suffix):
        shutil.rmtree(folder, ignore_errors=True)


def _is_in_use(folder: Path) -> bool:
    """Held, or nothing is known: where there are no locks, or the folder can't be opened."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            finally:
                os.close(descriptor)
    return True
