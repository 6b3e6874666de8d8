"""Teachers' features of recorded views, computed once and kept in memory-mapped files.

A row is a recorded view of a sample: ``sample · V + number``, samples counted through all data
sets. Rows are independent, so several processes may write different ones of the same files, and a
killed computation continues where ``done`` ends. Chunks of rows have a checksum, taken as soon as
all of their rows are there and compared when one of them is first read. (``cache_record`` says
which files there are, ``cache_storage`` how numbers are kept.)
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

from multikd.data.cache_record import (
    DIGEST,
    CacheSource,
    TeacherRecord,
    cache_file,
    codec_file,
    damaged,
    read_meta,
    refused,
    write_meta,
)
from multikd.data.cache_storage import (
    KEPT,
    CacheDtype,
    CacheStorage,
    Ints,
    Kept,
    TokenCodec,
    measure_codecs,
    places_of,
    reduce_patches,
)
from multikd.files import write_atomically
from multikd.types import Batch, TokenFeatures
from multikd.untrusted import read_bytes

__all__ = [
    "CacheDtype",
    "CacheSource",
    "CacheStorage",
    "FeatureCache",
    "FeatureCacheWriter",
    "TeacherRecord",
]

log = logging.getLogger(__name__)

_FLUSH_EVERY = 64  # calls of put between two records of what is done
_MOST_CODEC = 1 << 30


class FeatureCache:
    """A cache folder, opened for reading; maps its files lazily, once in each process.

    Raises:
        FileNotFoundError: there is no cache in the folder.
        ValueError: it was made of something else than ``source``; the sentence names what differs.
    """

    def __init__(self, folder: str | Path, source: CacheSource) -> None:
        self.folder = Path(folder)
        self.source = source
        self.records = read_meta(self.folder, source)
        self._maps: dict[tuple[str, str], npt.NDArray[Any]] = {}
        self._codecs: dict[str, dict[Kept, TokenCodec]] = {}
        self._verified: dict[str, npt.NDArray[np.bool_]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the files itself.
        return {**self.__dict__, "_maps": {}, "_codecs": {}, "_verified": {}}

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse teachers that are missing or are not those whose features are kept."""
        for name, fingerprint in fingerprints.items():
            if name not in self.records:
                raise ValueError(
                    f"the cache {self.folder} has no features of teacher {name!r} "
                    f"(it has {sorted(self.records)}): compute them first"
                )
            if self.records[name].fingerprint != fingerprint:
                raise refused(
                    self.folder,
                    f"the fingerprint of teacher {name!r}",
                    self.records[name].fingerprint,
                    fingerprint,
                )

    def missing(self, names: Sequence[str]) -> Ints:
        """Rows, ascending, that some of these teachers still lack."""
        lacking = np.zeros(self.source.rows, dtype=bool)
        for name in names:
            lacking |= np.asarray(self._map(name, "done")) == 0
        return np.flatnonzero(lacking).astype(np.int64)

    def damaged_chunks(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Chunks of each teacher whose checksum does not fit; reads everything."""
        found = {}
        for name in names:
            sums = self._map(name, "sums")
            wrong = [
                int(chunk)
                for chunk in np.flatnonzero(sums[:, 0])
                if self._digest(name, int(chunk)) != bytes(sums[chunk, 1:])
            ]
            if wrong:
                found[name] = wrong
        return found

    def rows_in(self, name: str, chunk: int) -> tuple[int, int]:
        """First row of a chunk and the one after its last."""
        size = self.records[name].chunk
        return chunk * size, min((chunk + 1) * size, self.source.rows)

    def get(
        self, rows: Sequence[int] | Ints, names: Sequence[str] | None = None
    ) -> dict[str, TokenFeatures]:
        """Features at ``rows`` ``(B,)`` of each teacher.

        In the format they are kept in, or float32 where they were int8 or PCA components. Where
        only some patches were kept, ``places`` says which of ``places_grid`` they are.

        Raises:
            ValueError: a row that was never computed, or a chunk whose checksum does not fit.
        """
        rows = np.asarray(rows, dtype=np.int64)
        features = {}
        for name in self.records if names is None else names:
            undone = rows[self._map(name, "done")[rows] == 0]
            if undone.size:
                raise ValueError(
                    f"the cache {self.folder} lacks {undone.size} of the rows asked for of "
                    f"teacher {name!r} (first: {undone[0]}): its computation was not finished"
                )
            self._verify(name, rows)
            record, codecs = self.records[name], self._codecs_of(name)
            read = {t: codecs[t].decode(self._map(name, t)[rows]) for t in record.tokens}
            grid, sampled = record.kept_grid, record.sampled
            features[name] = TokenFeatures(
                summary=read.get("summary"),
                patches=read.get("patches"),
                grid=None if sampled else grid,
                logits=read.get("logits"),
                places=None
                if not sampled or grid is None
                else torch.from_numpy(places_of(rows, grid[0] * grid[1], sampled)),
                places_grid=grid if sampled else None,
            )
        return features

    def _verify(self, name: str, rows: Ints) -> None:
        """Compare checksums of the chunks that these rows lie in, once in each process."""
        sums = self._map(name, "sums")
        known = self._verified.setdefault(name, np.zeros(len(sums), dtype=bool))
        for chunk in np.unique(rows // self.records[name].chunk).tolist():
            if known[chunk] or not sums[chunk, 0]:
                continue
            if self._digest(name, chunk) != bytes(sums[chunk, 1:]):
                first, end = self.rows_in(name, chunk)
                raise ValueError(
                    f"rows {first} to {end - 1} of teacher {name!r} in the feature cache "
                    f"{self.folder} do not fit their checksum (chunk {chunk}): they were changed "
                    "or cut off on disk; `multikd cache` computes them again"
                )
            known[chunk] = True

    def _digest(self, name: str, chunk: int) -> bytes:
        first, end = self.rows_in(name, chunk)
        digest = hashlib.sha256()
        for token in self.records[name].tokens:
            digest.update(np.ascontiguousarray(self._map(name, token)[first:end]).data)
        return digest.digest()

    def _codecs_of(self, name: str) -> dict[Kept, TokenCodec]:
        if name not in self._codecs:
            self._codecs[name] = _read_codecs(self.folder, name, self.records[name])
        return self._codecs[name]

    def _map(self, name: str, what: str, mode: Literal["r", "r+"] = "r") -> npt.NDArray[Any]:
        if (name, what) not in self._maps:
            path, dtype, shape = cache_file(
                self.folder, self.source, name, self.records[name], what
            )
            expected = math.prod(shape) * dtype.itemsize
            try:
                size = path.stat().st_size
                if size != expected:
                    raise damaged(path, f"it has {size} bytes and should have {expected}")
                self._maps[name, what] = np.memmap(path, dtype, mode, shape=shape)
            except OSError as error:
                raise damaged(path, error.strerror or str(error)) from error
        return self._maps[name, what]


class FeatureCacheWriter(FeatureCache):
    """Creates a cache folder, or continues one, and fills rows of it.

    Teachers that the folder already has must agree with ``teachers``; new ones are added. Files
    that were cut off are made whole, and what they lost is missing again. Making it is idempotent;
    with several ranks let one make it first where scales or bases are measured.

    Args:
        folder: the cache.
        source: what the features are computed from.
        teachers: name → (fingerprint, example features of any batch size; of several images where
            a scale or basis is measured).
        storage: how features are kept; a number format alone, too.
        about: name → what is known of the teacher without loading it.

    Raises:
        ValueError: the folder holds features of something else (names what differs), or the disk
            has not the room.
    """

    def __init__(
        self,
        folder: str | Path,
        source: CacheSource,
        teachers: Mapping[str, tuple[str, TokenFeatures]],
        storage: CacheStorage | CacheDtype = "float16",
        about: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        folder = Path(folder)
        kind = storage if isinstance(storage, CacheStorage) else CacheStorage(storage)
        asked = {
            name: TeacherRecord.of(*spec, kind, (about or {}).get(name))
            for name, spec in teachers.items()
        }
        try:
            kept = read_meta(folder, source)
        except FileNotFoundError:
            kept = {}
        for name in sorted(asked.keys() & kept.keys()):
            difference = kept[name].differs(asked[name])
            if difference is not None:
                field, had, expected = difference
                raise refused(folder, f"the {field} of teacher {name!r}", had, expected)
            asked[name] = replace(kept[name], about=kept[name].about or asked[name].about)
        folder.mkdir(parents=True, exist_ok=True)
        for name in asked.keys() - kept.keys():
            asked[name] = _measure(folder, name, asked[name], teachers[name][1])
        _lay_out(folder, source, asked)
        records = {**kept, **asked}
        if records != kept or any(records[n].about != kept[n].about for n in kept):
            write_meta(folder, source, records)
        super().__init__(folder, source)
        self.names = tuple(asked)
        self._pending: dict[str, list[Ints]] = {name: [] for name in asked}
        self._puts = 0
        self._seal()

    def put(self, batch: Batch, name: str, features: TokenFeatures) -> None:
        """Keep a teacher's features of ``batch.views[0]``; filler places are left out.

        Raises:
            ValueError: other shapes than the example's, values the dtype cannot hold, or a batch
                whose views are not recorded.
        """
        if batch.recorded is None or bool((batch.recorded < 0).any()):
            raise ValueError("this batch has no recorded views: use precompute_dataloader()")
        record = self.records[name]
        real = (batch.positions >= 0).cpu()
        place = (t.cpu()[real].numpy() for t in (batch.dataset, batch.samples, batch.recorded))
        rows = self.source.rows_of(*place)
        for token in KEPT:
            shape, tensor = getattr(record, token), getattr(features, token)
            received = None if tensor is None else tuple(tensor.shape[1:])
            if received != shape:
                raise ValueError(
                    f"{token} of teacher {name!r} must be {shape} an image as in the example, "
                    f"received {received}"
                )
        for token in record.tokens:
            if token != "patches":
                kept = getattr(features, token)
            else:
                chosen = features.map(lambda tensor: tensor[real.to(tensor.device)])
                kept = reduce_patches(chosen, record.storage, rows)
            if kept is None:
                continue
            try:
                values = self._codecs_of(name)[token].encode(
                    kept if token == "patches" else kept[real.to(kept.device)]
                )
            except ValueError as error:
                raise ValueError(
                    f"{token} of teacher {name!r} has {error}: keep them as bfloat16 or float32, "
                    "or look at the teacher"
                ) from error
            self._map(name, token, "r+")[rows] = values.numpy()
        self._pending[name].append(rows)
        self._puts += 1
        if self._puts % _FLUSH_EVERY == 0:
            self.flush()

    def mend(self, names: Sequence[str] | None = None) -> dict[str, list[int]]:
        """Forget the rows of chunks whose checksum does not fit; returns those chunks."""
        wrong = self.damaged_chunks(self.names if names is None else names)
        for name, chunks in wrong.items():
            for chunk in chunks:
                first, end = self.rows_in(name, chunk)
                self._map(name, "sums")[chunk, 0] = 0
                self._map(name, "done")[first:end] = 0
            for what in ("sums", "done"):
                self._map(name, what).flush()  # type: ignore[attr-defined]
        return wrong

    def flush(self) -> None:
        """Write features to disk, and only then record their rows as done."""
        for name, pending in self._pending.items():
            if not pending:
                continue
            for token in KEPT:
                if (values := self._maps.get((name, token))) is not None:
                    values.flush()  # type: ignore[attr-defined]
            done = self._map(name, "done", "r+")
            done[np.concatenate(pending)] = 1
            done.flush()  # type: ignore[attr-defined]
            pending.clear()
        self._seal()

    def finish(self) -> None:
        """Record everything that was put, and close the files."""
        self.flush()
        self._maps.clear()

    def _seal(self) -> None:
        """Take the checksums of chunks that became complete."""
        for name in self.names:
            sums, done = self._map(name, "sums"), self._map(name, "done")
            size = self.records[name].chunk
            padded = np.ones(len(sums) * size, dtype=bool)
            padded[: len(done)] = np.asarray(done) != 0
            whole = padded.reshape(len(sums), size).all(axis=1)
            fresh = np.flatnonzero(whole & (np.asarray(sums[:, 0]) == 0))
            for chunk in fresh.tolist():
                sums[chunk, 1:] = np.frombuffer(self._digest(name, chunk), np.uint8)
                sums[chunk, 0] = 1
            if len(fresh):
                sums.flush()  # type: ignore[attr-defined]

    def _map(self, name: str, what: str, mode: Literal["r", "r+"] = "r+") -> npt.NDArray[Any]:
        return super()._map(name, what, "r+")


def _measure(
    folder: Path, name: str, record: TeacherRecord, examples: TokenFeatures
) -> TeacherRecord:
    """Measure and write a new teacher's scales and bases, where it has any."""
    needed = {token: record.storage.measured(token) for token in record.tokens}
    if not any(needed.values()):
        return record
    try:
        codecs = measure_codecs(examples, record.storage, needed)
    except ValueError as error:
        raise ValueError(f"teacher {name!r}: {error}") from error
    parts = {k: v for t, codec in codecs.items() for k, v in codec.tensors(t).items()}
    data = save({key: value.contiguous() for key, value in parts.items()})
    write_atomically(codec_file(folder, name), data)
    return replace(record, codec=hashlib.sha256(data).hexdigest())


def _read_codecs(folder: Path, name: str, record: TeacherRecord) -> dict[Kept, TokenCodec]:
    if not record.codec:
        return {token: TokenCodec(record.storage.dtype_of(token)) for token in record.tokens}
    path = codec_file(folder, name)
    try:
        data = read_bytes(path, _MOST_CODEC)
        if hashlib.sha256(data).hexdigest() != record.codec:
            raise damaged(path, "it does not fit its checksum; remove the folder")
        tensors = load(data)
        return {
            token: TokenCodec.of_tensors(record.storage.dtype_of(token), tensors, token)
            for token in record.tokens
        }
    except FileNotFoundError as error:
        raise damaged(path, "it is not there; remove the folder") from error


def _lay_out(folder: Path, source: CacheSource, records: Mapping[str, TeacherRecord]) -> None:
    """Files of their full size, with room on the disk; what was cut off is missing again."""
    sizes: dict[Path, int] = {}
    for name, record in records.items():
        lost = source.rows
        for what in (*record.tokens, "done", "sums"):
            path, stored, shape = cache_file(folder, source, name, record, what)
            sizes[path] = math.prod(shape) * stored.itemsize
            row = sizes[path] // max(source.rows, 1)
            if what in record.tokens:
                had = path.stat().st_size if path.exists() else 0
                lost = min(lost, had // row)
        done = cache_file(folder, source, name, record, "done")[0]
        if lost < source.rows and done.exists() and any(done.read_bytes()[lost:]):
            _forget(folder, source, name, record, lost)
    _refuse_full_disk(folder, sizes)
    for path, size in sizes.items():
        with path.open("ab") as file:  # never empties what another rank has begun
            file.truncate(size)
            _reserve(file.fileno(), size, folder)


def _forget(folder: Path, source: CacheSource, name: str, record: TeacherRecord, lost: int) -> None:
    """Rows from ``lost`` on are missing, and their chunks have no checksum."""
    log.warning(
        "the features of teacher %r in %s were cut off at row %d of %d: the rest is computed again",
        name, folder, lost, source.rows,
    )  # fmt: skip
    for what, first, width in (("done", lost, 1), ("sums", lost // record.chunk, 1 + DIGEST)):
        path = cache_file(folder, source, name, record, what)[0]
        if path.exists():
            with path.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.truncate(min(size, first * width))  # filled up with zeros afterwards


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Take the room now: written through a map, a disk that is full kills with a bus error."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None or not size:
        return
    try:
        reserve(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"the feature cache {folder} needs {size / 1e9:.2g} GB for one of its files, which "
                f"can't be had ({error.strerror}): free some room, keep less (--storage int8), or "
                "name another folder; what was computed stays"
            ) from error
        # Not every file system can reserve.


def _refuse_full_disk(folder: Path, sizes: Mapping[Path, int]) -> None:
    needed = sum(sizes.values())
    for path in sizes:
        if path.exists():
            # Blocks that are filled already; Windows does not tell.
            needed -= getattr(path.stat(), "st_blocks", 0) * 512
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the feature cache {folder} needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB: use fewer recorded views, teachers without patches, or another "
            "folder"
        )
