"""Files from strangers: bounded in size and depth before anything is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_TEXT = 1 << 26
"""Bytes of the largest JSON file that is read (the log of a million shards fits)."""


def read_bytes(path: Path, most: int) -> bytes:
    """A regular file's content, refused by its size before it is read.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no regular file, cannot be read, or is larger than ``most`` bytes.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError(f"{path} is no regular file")
        if size > most:
            raise ValueError(f"{path} has {size} bytes, more than the {most} it may have")
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        raise
    except OSError as error:  # links in a circle, a name that is too long
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error


def parse_json(data: bytes | str, what: object) -> Any:
    """The values of JSON text; ``what`` it is of, for the message.

    Raises:
        ValueError: it is no JSON, nests too deeply, or needs more memory than there is.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{what} is no valid JSON ({reason[:160]})") from error


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """The values of a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read, is too large, or no JSON; the sentence names the file.
    """
    return parse_json(read_bytes(path, most), path)


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, where that is a file of the folder itself.

    Raises:
        ValueError: the name leads elsewhere (absolute, ``..``, a link that points out).
    """
    path = folder / name
    if name in ("", ".", "..") or Path(name).name != name or "\x00" in name:
        raise ValueError(f"{name!r} is no plain file name: nothing outside {folder} is read")
    try:
        away = path.is_symlink() and folder.resolve() not in path.resolve().parents
    except (OSError, RuntimeError):  # links in a circle
        away = True
    if away:
        raise ValueError(
            f"{path} is a link that leads out of its folder: it is not followed; put the file there"
        )
    return path
