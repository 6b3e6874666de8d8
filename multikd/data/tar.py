"""The samples of a tar archive as its headers tell them; no member's bytes are read.

Samples are grouped as webdataset does: a key is the path up to the first dot of the base name,
the rest is the extension, and consecutive members with one key make a sample. Hidden files are
passed over.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Self, cast

BLOCK = 512  # a tar's unit
_MOST_HEADER = 1 << 20  # bytes of a pax or long-name header: names and times, never data
_MOST_MEMBER = 1 << 30  # bytes of a member that is read whole
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One file of a sample: its extension, and where its bytes lie in the shard."""

    extension: str
    offset: int
    size: int


Sample = tuple[str, list[Member]]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member's name; None where webdataset passes it over."""
    while name.startswith("./"):
        name = name[2:]
    match = _KEY_AND_EXTENSION.match(name)
    # Hidden files, such as the '._x.jpg' that macOS adds, webdataset takes for samples; nobody
    # means them.
    if match is None or _META.match(name) or name.rpartition("/")[2].startswith("."):
        return None
    return match.group(1), match.group(2).lower()


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; empty where it is."""
    if member.issym() or member.islnk():
        return "link"
    if not member.isreg() or member.issparse():
        return "special file"
    if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
        return "unsafe name"
    if "\x00" in member.name or split_name(member.name) is None:
        return "no key or extension"
    return ""


def scan_tar(
    file: io.BufferedReader, path: Path, size: int
) -> tuple[list[Sample], dict[str, int], str]:
    """Samples of an open tar of ``size`` bytes; ``path`` is for messages.

    Returns:
        The samples; what was left out or is doubtful, counted by cause (``link``,
        ``special file``, ``unsafe name``, ``no key or extension``, ``duplicate member``,
        ``duplicate key``); and what is wrong with the archive's end, empty where it is whole.
        Of one that was cut off, the samples up to the last whole one.

    Raises:
        ValueError: it is empty, compressed, no tar, or without samples.
        OSError: it cannot be read.
    """
    _refuse_other_formats(path, file.read(8), size)
    try:
        samples, faults, truncated = _walk(file, size)
    except OSError as error:
        if not isinstance(error, tarfile.TarError) and error.errno is not None:
            raise
        raise _no_tar(path, error) from error
    except Exception as error:  # hostile headers make tarfile raise nearly anything
        raise _no_tar(path, error) from error
    if not samples:
        problem = truncated or "it is an archive without any key.extension member"
        raise ValueError(f"the shard {path} has no samples: {problem}")
    repeated = len(samples) - len({key for key, _ in samples})
    if repeated:
        faults["duplicate key"] += repeated
    return samples, dict(faults), truncated


def _no_tar(path: Path, error: Exception) -> ValueError:
    detail = " ".join(str(error).split())[:160] or type(error).__name__
    return ValueError(f"the shard {path} is not a tar archive ({detail}): write it again")


class _Headers(io.BufferedIOBase):
    """A file of which headers are read: a header that promises gigabytes is refused.

    ``tarfile`` reads a pax or long-name header in one go, of whatever size it says.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER:
            raise ValueError(f"a header of {size} bytes, more than {_MOST_HEADER}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _refuse_other_formats(path: Path, head: bytes, size: int) -> None:
    if size == 0:
        raise ValueError(f"the shard {path} is empty (0 bytes): write or download it again")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"the shard {path} is compressed with {name}, so that its samples cannot be read "
                "by byte range: decompress it to a plain .tar, or read it in the sequential mode"
            )
    if size < BLOCK:
        raise ValueError(f"the shard {path} is truncated: {size} bytes are less than one header")


def _walk(file: io.BufferedReader, size: int) -> tuple[list[Sample], Counter[str], str]:
    """Samples, faults by cause, and what is wrong with the end of the archive."""
    samples: list[Sample] = []
    faults: Counter[str] = Counter()
    truncated = ""
    cut_key: str | None = None
    file.seek(0)
    headers = cast(IO[bytes], _Headers(file))
    with tarfile.open(fileobj=headers, mode="r:", errors="replace") as tar:
        try:
            for info in _headers(tar):
                if info.isdir():
                    continue
                refusal = _refusal(info)
                if refusal:
                    faults[refusal] += 1
                    continue
                key, extension = split_name(info.name) or ("", "")
                if info.offset_data + info.size > size:
                    cut_key = key
                    break
                if not samples or samples[-1][0] != key:
                    samples.append((key, []))
                if any(member.extension == extension for member in samples[-1][1]):
                    faults["duplicate member"] += 1
                    continue
                samples[-1][1].append(Member(extension, info.offset_data, info.size))
            file.seek(tar.offset)
            tail = file.read(BLOCK)
        except (tarfile.ReadError, EOFError):
            tail = b""
        if cut_key is not None:
            truncated = "it ends in the middle of a member"
        elif len(tail) < BLOCK:
            truncated = "it ends without tar's end-of-archive mark"
        elif tail.count(0) != BLOCK:
            truncated = f"what follows at byte {tar.offset} is no tar header"
    if truncated and samples and (cut_key == samples[-1][0] or _lacks_members(samples)):
        samples.pop()
    return samples, faults, truncated


class _StreamedInfo(tarfile.TarInfo):
    """A header of a stream, where ``_Headers`` cannot stand between."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """As tarfile's, refusing headers and members that promise too much."""
        info = super().frombuf(buf, encoding, errors)
        most = _MOST_MEMBER if info.isreg() else _MOST_HEADER
        if not 0 <= info.size <= most:
            raise ValueError(f"it promises {info.size} bytes, more than {most}")
        return info


def stream_members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member of a tar that is read front to back, compressed or not.

    Links, special files and unsafe names are passed over, as in an indexed shard.

    Raises:
        Exception: of nearly any kind, where it is no such stream.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StreamedInfo, errors="replace") as tar:
        for info in _headers(tar, _MOST_MEMBER + 4 * _MOST_HEADER):
            if info.isdir() or _refusal(info):
                continue
            file = tar.extractfile(info)
            if file is not None:
                yield info.name, file.read()


def _headers(tar: tarfile.TarFile, most: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The headers in turn; none is kept, as an archive may have millions.

    Args:
        tar: open for reading.
        most: bytes from one to the next. Of a stream, where a pax header's size of thirty digits
            would be read up to, long after its end.

    Raises:
        ValueError: a size that is too large, or a negative one, which leads back (there Python
            before 3.11.14 reads for ever).
    """
    reached = 0
    while (info := tar.next()) is not None:
        if tar.offset <= reached:
            raise ValueError(f"the header before byte {reached} leads backwards")
        if most is not None and tar.offset - reached > most:
            raise ValueError(f"it promises {info.size} bytes, more than {_MOST_MEMBER}")
        reached = tar.offset
        tar.members.clear()  # type: ignore[attr-defined]
        yield info


def _lacks_members(samples: list[Sample]) -> bool:
    """Whether the last sample lacks a kind of member that the one before it has."""
    if len(samples) < 2:
        return False
    before, last = ({member.extension for member in members} for _, members in samples[-2:])
    return not before <= last
