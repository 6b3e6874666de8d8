"""The index of a tar shard: each sample's key, and its members' byte offsets and sizes.

With it a sample is read by byte range, in any order, without walking the tar. It is kept beside
the shard as ``<shard>.index.npz`` (plain arrays, never pickles) and made again when the shard's
size or modification time has changed.

Samples are grouped as webdataset does: a key is the path up to the first dot of the base name,
the rest is the extension, and consecutive members with one key make a sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multikd.data.tar import BLOCK, Member, Sample, scan_tar, split_name
from multikd.files import write_atomically
from multikd.untrusted import parse_json, read_bytes

__all__ = [
    "INDEX_SUFFIX",
    "Member",
    "ShardIndex",
    "build_index",
    "index_path",
    "read_index",
    "split_name",
    "truncated_message",
    "without_mtime",
]

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.npz"
_FORMAT = 1
_MOST_BYTES = 1 << 28  # of an index, packed or unpacked: some five million samples
_ARRAYS = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "first": np.int64,
    "member_extension": np.int32,
    "member_offset": np.int64,
    "member_size": np.int64,
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one shard are. S samples, M members; immutable.

    Attributes:
        shard: base name of the shard.
        size: bytes of the shard when it was indexed.
        mtime_ns: its modification time then; 0 where it is not known (a remote shard).
        key_bytes: uint8, all keys in UTF-8, one after the other (compact for millions of keys).
        key_ends: int64 ``(S,)``, where each key ends in ``key_bytes``.
        first: int64 ``(S + 1,)``; sample i has the members ``first[i]`` to ``first[i + 1]``.
        extensions: the extensions that occur, in lower case.
        member_extension: int32 ``(M,)`` index into ``extensions``.
        member_offset, member_size: int64 ``(M,)`` bytes.
        faults: members or samples left out or doubtful, counted by cause.
        truncated: empty for a whole shard, else what is wrong with its end.
    """

    shard: str
    size: int
    mtime_ns: int
    key_bytes: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    first: NDArray[np.int64]
    extensions: tuple[str, ...]
    member_extension: NDArray[np.int32]
    member_offset: NDArray[np.int64]
    member_size: NDArray[np.int64]
    faults: dict[str, int] = field(default_factory=dict)
    truncated: str = ""

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """Key of one sample."""
        start = int(self.key_ends[sample - 1]) if sample > 0 else 0
        return self.key_bytes[start : int(self.key_ends[sample])].tobytes().decode()

    @property
    def keys(self) -> list[str]:
        """All keys (made anew at each call)."""
        return [self.key(sample) for sample in range(len(self))]

    def members(self, sample: int) -> list[Member]:
        """The members of one sample, in the shard's order."""
        return [
            Member(
                self.extensions[self.member_extension[m]],
                int(self.member_offset[m]),
                int(self.member_size[m]),
            )
            for m in range(int(self.first[sample]), int(self.first[sample + 1]))
        ]

    def to_bytes(self) -> bytes:
        """The index as an npz file without pickles; the same index gives the same bytes."""
        header = {
            "format": _FORMAT,
            "shard": self.shard,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "extensions": self.extensions,
            "faults": self.faults,
            "truncated": self.truncated,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=text, **arrays)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> ShardIndex:
        """Read what ``to_bytes`` wrote, and check that it is consistent.

        Raises:
            ValueError: it is no such file, of another format, or contradicts itself.
        """
        try:
            arrays = _unpacked(data)
            header: dict[str, Any] = parse_json(arrays.pop("header").tobytes(), "its header")
            if header.pop("format") != _FORMAT:
                raise ValueError("it is of another format")
            header["extensions"] = tuple(header["extensions"])
            for name, dtype in _ARRAYS.items():
                if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                    raise ValueError(f"its array {name!r} is not one-dimensional {dtype.__name__}")
            values: dict[str, Any] = {**header, **arrays}
            index = ShardIndex(**values)
            index._check()
        except Exception as error:  # hostile bytes make zipfile and NumPy raise nearly anything
            detail = " ".join(str(error).split())[:160] or type(error).__name__
            raise ValueError(f"not a usable shard index: {detail}") from error
        return index

    def _check(self) -> None:
        self._check_header()
        samples, members = len(self.key_ends), len(self.member_offset)
        keys = np.diff(self.key_ends, prepend=0)
        sound = (
            samples > 0
            and len(self.first) == samples + 1
            and len(self.member_extension) == len(self.member_size) == members
            and self.first[0] == 0
            and self.first[-1] == members
            and bool((np.diff(self.first) > 0).all())
            and bool((keys > 0).all())
            and int(self.key_ends[-1]) == len(self.key_bytes)
            and bool((self.member_offset >= BLOCK).all() and (self.member_size >= 0).all())
            and bool((self.member_size <= self.size).all())
            # Not as a sum, which might overflow.
            and bool((self.member_offset <= self.size - self.member_size).all())
            and bool((self.member_extension >= 0).all())
            and bool((self.member_extension < len(self.extensions)).all())
        )
        if not sound:
            raise ValueError("its arrays contradict each other")
        self.key_bytes.tobytes().decode()  # UnicodeDecodeError, a ValueError, where it is no text
        firsts = self.key_bytes[np.concatenate([[0], self.key_ends[:-1]])]
        if bool((firsts & 0xC0 == 0x80).any()):
            raise ValueError("a key begins in the middle of a character")

    def _check_header(self) -> None:
        counts = isinstance(self.faults, dict) and all(
            isinstance(cause, str) and type(count) is int and count >= 0
            for cause, count in self.faults.items()
        )
        numbers = all(
            type(value) is int and 0 <= value < 1 << 63 for value in (self.size, self.mtime_ns)
        )
        texts = all(isinstance(t, str) for t in (self.shard, self.truncated, *self.extensions))
        if not (counts and numbers and texts):
            raise ValueError("its header has values of other types")


def _unpacked(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an npz, their sizes checked before anything is unpacked or allocated."""
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {_MOST_BYTES}")
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sum(sizes.values()) > _MOST_BYTES or len(sizes) > 64:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES} bytes")
        for name in ("header", *_ARRAYS):
            # Read as bytes first: NumPy would allocate what the array's own header promises.
            with archive.open(f"{name}.npy") as member:
                packed = io.BytesIO(member.read(_MOST_BYTES))
            if np.lib.format.read_magic(packed) != (1, 0):
                raise ValueError(f"its array {name!r} is of another version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(packed)
            content = packed.getbuffer()[packed.tell() :]
            if dtype.hasobject or len(shape) != 1 or shape[0] * dtype.itemsize != len(content):
                raise ValueError(f"its array {name!r} is not as long as it says")
            arrays[name] = np.frombuffer(content, dtype=dtype)
    return arrays


def build_index(shard: str | os.PathLike[str]) -> ShardIndex:
    """Walk the headers of a tar shard and note where its samples are.

    A shard that was cut off is indexed up to its last whole sample, with ``truncated`` set.

    Raises:
        ValueError: the shard is missing, empty, compressed, no tar, or without samples.
    """
    path = Path(shard)
    try:
        stat = path.stat()
        with path.open("rb") as file:
            samples, faults, truncated = scan_tar(file, path, stat.st_size)
    except OSError as error:
        raise ValueError(f"cannot read the shard {path}: {error.strerror or error}") from error
    return _pack(path.name, stat.st_size, stat.st_mtime_ns, samples, faults, truncated)


def _pack(
    name: str,
    size: int,
    mtime_ns: int,
    samples: list[Sample],
    faults: dict[str, int],
    truncated: str,
) -> ShardIndex:
    # A name that is not UTF-8 came through with replacement characters, so this always encodes.
    keys = [key.encode("utf-8", "replace") for key, _ in samples]
    members = [member for _, group in samples for member in group]
    extensions = sorted({member.extension for member in members})
    number = {extension: i for i, extension in enumerate(extensions)}
    return ShardIndex(
        shard=name,
        size=size,
        mtime_ns=mtime_ns,
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        first=np.cumsum([0] + [len(group) for _, group in samples], dtype=np.int64),
        extensions=tuple(extensions),
        member_extension=np.array([number[m.extension] for m in members], dtype=np.int32),
        member_offset=np.array([m.offset for m in members], dtype=np.int64),
        member_size=np.array([m.size for m in members], dtype=np.int64),
        faults=faults,
        truncated=truncated,
    )


def index_path(shard: str | os.PathLike[str], index_dir: Path | None = None) -> Path:
    """Where the index of a local shard is kept: beside it, or under ``index_dir``."""
    path = Path(shard)
    if index_dir is None:
        return path.with_name(path.name + INDEX_SUFFIX)
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return index_dir / f"{digest}-{path.name}{INDEX_SUFFIX}"


def read_index(
    shard: str | os.PathLike[str],
    *,
    index_dir: Path | None = None,
    allow_truncated: bool = False,
) -> ShardIndex:
    """The index of a local shard: the stored one where it still fits, else a new one, stored.

    It is stored beside the shard, or in ``index_dir`` where that folder is read-only; where
    neither can be written to, it is only held in memory.

    Args:
        shard: path of the tar.
        index_dir: second place to look and to store.
        allow_truncated: take a shard that was cut off, up to its last whole sample.

    Raises:
        ValueError: as ``build_index``; or the shard is cut off and that is not allowed.
    """
    path = Path(shard)
    places = [index_path(path)] + ([index_path(path, index_dir)] if index_dir else [])
    index = next((found for place in places if (found := _stored(place, path))), None)
    if index is None:
        index = build_index(path)
        _store(index, places)
    if index.truncated and not allow_truncated:
        raise ValueError(truncated_message(str(path), index))
    return index


def truncated_message(name: str, index: ShardIndex) -> str:
    """What to tell a user who did not ask for truncated shards."""
    return (
        f"the shard {name} is truncated ({index.truncated}; {len(index)} samples before that "
        "are whole): write or download it again, or set allow_truncated to go without the rest"
    )


def _stored(place: Path, shard: Path) -> ShardIndex | None:
    """The index stored at ``place`` if it is there, sound, and made of the shard as it is now."""
    try:
        stat = shard.stat()
        index = ShardIndex.from_bytes(read_bytes(place, _MOST_BYTES))
    except OSError:
        return None
    except ValueError as error:
        logger.warning("%s is made again: %s", place, error)
        return None
    if index.size != stat.st_size or (
        index.mtime_ns != stat.st_mtime_ns if index.mtime_ns else not _headers_fit(index, shard)
    ):
        logger.info("%s is made again: the shard has changed since", place)
        return None
    return index


def _headers_fit(index: ShardIndex, shard: Path) -> bool:
    """Whether the first and last samples' first headers are where the index says.

    Tars are padded to 10 KB, so that a small shard may have changed at an equal size.
    """
    try:
        with shard.open("rb") as file:
            for sample in {0, len(index) - 1}:
                member = index.members(sample)[0]
                file.seek(member.offset - BLOCK)
                info = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "replace")
                simple = info.name.isascii() and len(info.name) < 100  # else it is cut short here
                if info.size != member.size or (
                    simple and split_name(info.name) != (index.key(sample), member.extension)
                ):
                    return False
    except (OSError, tarfile.TarError, ValueError):
        return False
    return True


def _store(index: ShardIndex, places: list[Path]) -> None:
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, index.to_bytes())
        except OSError:
            continue
        return
    logger.warning("no place to store the index of %s: it is made again each time", index.shard)


def without_mtime(index: ShardIndex) -> ShardIndex:
    """The same index, bound to the shard's size only: for shards that are copied about."""
    return dataclasses.replace(index, mtime_ns=0)
