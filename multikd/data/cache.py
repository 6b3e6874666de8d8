"""Teachers' features of recorded views, computed once and kept in memory-mapped files.

A cache is a folder: ``meta.json`` says what the features were computed from, and for every teacher
there are ``<teacher>.summary.bin`` / ``<teacher>.patches.bin`` of shape ``(rows, …)`` and
``<teacher>.done`` with one byte a row. A row is a recorded view of a sample: ``sample · V +
number``, samples counted through all data sets. Rows are independent, so several processes may
write different ones of the same files, and a killed computation continues where ``done`` ends.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.files import write_atomically
from multikd.types import Batch, Grid, TokenFeatures
from multikd.untrusted import inside, read_json

CacheDtype = Literal["float16", "bfloat16", "float32"]
Ints = npt.NDArray[np.int64]

# NumPy has no bfloat16: its bits are stored as 16-bit integers.
_STORED: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "float16": (np.dtype(np.float16), torch.float16),
    "bfloat16": (np.dtype(np.int16), torch.bfloat16),
    "float32": (np.dtype(np.float32), torch.float32),
}
_FLUSH_EVERY = 64  # calls of put between two records of what is done


@dataclass(frozen=True)
class CacheSource:
    """What cached features depend on besides the teachers; two caches mix only when equal.

    Attributes:
        data: hash of the data sets' indexes.
        samples: number of samples of each data set.
        views: recorded views of each sample (V).
        policy: the view policy's settings (``ViewPolicy.describe()``).
        seed: seed of the recorded views.
    """

    data: str
    samples: tuple[int, ...]
    views: int
    policy: dict[str, object]
    seed: int

    @property
    def rows(self) -> int:
        """Rows of every file."""
        return sum(self.samples) * self.views

    def rows_of(self, dataset: Ints, sample: Ints, number: Ints) -> Ints:
        """Rows of recorded views: data set, sample of the data set, number of the view."""
        starts = np.cumsum([0, *self.samples[:-1]])
        rows: Ints = (starts[dataset] + sample) * self.views + number
        return rows

    def places_of(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Data set, sample of the data set and number of the view at ``rows``."""
        edges = np.cumsum([0, *self.samples])
        through, number = rows // self.views, rows % self.views
        dataset = np.searchsorted(edges, through, side="right") - 1
        return dataset, through - edges[dataset], number


@dataclass(frozen=True)
class TeacherRecord:
    """What is kept of one teacher: its fingerprint, dtype and the shapes of a row."""

    fingerprint: str
    dtype: CacheDtype
    summary: tuple[int, ...] | None
    patches: tuple[int, ...] | None
    grid: Grid | None

    @staticmethod
    def of(fingerprint: str, example: TokenFeatures, dtype: CacheDtype) -> TeacherRecord:
        """The record for features like ``example`` (whatever its batch size)."""

        def shape(tensor: Tensor | None) -> tuple[int, ...] | None:
            return None if tensor is None else tuple(tensor.shape[1:])

        return TeacherRecord(
            fingerprint, dtype, shape(example.summary), shape(example.patches), example.grid
        )

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TeacherRecord:
        """Back from ``meta.json``, where tuples are lists."""

        def shape(name: str, rank: int) -> Any:
            value = values[name]
            if value is None:
                return None
            if len(value) != rank or not all(type(n) is int and 0 < n < 1 << 31 for n in value):
                raise ValueError(f"its {name} has the shape {value!r}")
            return tuple(value)

        fingerprint, dtype = values["fingerprint"], values["dtype"]
        if not isinstance(fingerprint, str) or dtype not in _STORED:
            raise ValueError(f"a teacher's dtype is {dtype!r}")
        return TeacherRecord(
            fingerprint, dtype, shape("summary", 1), shape("patches", 2), shape("grid", 2)
        )


class FeatureCache:
    """A cache folder, opened for reading; maps its files lazily, once in each process.

    Raises:
        FileNotFoundError: there is no cache in the folder.
        ValueError: it was made of something else than ``source``; the sentence names what differs.
    """

    def __init__(self, folder: str | Path, source: CacheSource) -> None:
        self.folder = Path(folder)
        self.source = source
        self.records = _read_meta(self.folder, source)
        self._maps: dict[tuple[str, str], npt.NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker maps the files itself

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse teachers that are missing or are not those whose features are kept."""
        for name, fingerprint in fingerprints.items():
            if name not in self.records:
                raise ValueError(
                    f"the cache {self.folder} has no features of teacher {name!r} "
                    f"(it has {sorted(self.records)}): compute them first"
                )
            if self.records[name].fingerprint != fingerprint:
                raise _refused(
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

    def get(
        self, rows: Sequence[int] | Ints, names: Sequence[str] | None = None
    ) -> dict[str, TokenFeatures]:
        """Features at ``rows`` ``(B,)`` of each teacher, in the dtype they are kept in.

        Raises:
            ValueError: a row that was never computed.
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
            record = self.records[name]
            features[name] = TokenFeatures(
                summary=self._read(name, "summary", record, rows),
                patches=self._read(name, "patches", record, rows),
                grid=record.grid,
            )
        return features

    def _read(self, name: str, token: str, record: TeacherRecord, rows: Ints) -> Tensor | None:
        if getattr(record, token) is None:
            return None
        tensor = torch.from_numpy(self._map(name, token)[rows])
        return tensor.view(torch.bfloat16) if record.dtype == "bfloat16" else tensor

    def _map(self, name: str, what: str, mode: Literal["r", "r+"] = "r") -> npt.NDArray[Any]:
        if (name, what) not in self._maps:
            path, dtype, shape = _file(self.folder, self.source, name, self.records[name], what)
            expected = math.prod(shape) * dtype.itemsize
            try:
                size = path.stat().st_size
                if size != expected:
                    raise _damaged(path, f"it has {size} bytes and should have {expected}")
                self._maps[name, what] = np.memmap(path, dtype, mode, shape=shape)
            except OSError as error:
                raise _damaged(path, error.strerror or str(error)) from error
        return self._maps[name, what]


class FeatureCacheWriter(FeatureCache):
    """Creates a cache folder, or continues one, and fills rows of it.

    Teachers that the folder already has must agree with ``teachers``; new ones are added. Making
    it is idempotent, so every rank may do it at once.

    Args:
        folder: the cache.
        source: what the features are computed from.
        teachers: name → (fingerprint, example features of any batch size).
        dtype: how features are kept.

    Raises:
        ValueError: the folder holds features of something else (names what differs), or the disk
            has not the room.
    """

    def __init__(
        self,
        folder: str | Path,
        source: CacheSource,
        teachers: Mapping[str, tuple[str, TokenFeatures]],
        dtype: CacheDtype = "float16",
    ) -> None:
        folder = Path(folder)
        asked = {name: TeacherRecord.of(*spec, dtype) for name, spec in teachers.items()}
        try:
            kept = _read_meta(folder, source)
        except FileNotFoundError:
            kept = {}
        for name in sorted(asked.keys() & kept.keys()):
            for field, expected in asdict(asked[name]).items():
                if (had := getattr(kept[name], field)) != expected:
                    raise _refused(folder, f"the {field} of teacher {name!r}", had, expected)
        folder.mkdir(parents=True, exist_ok=True)
        sizes: dict[Path, int] = {}
        for name, record in asked.items():
            for what in ("summary", "patches", "done"):
                if what == "done" or getattr(record, what) is not None:
                    path, stored, shape = _file(folder, source, name, record, what)
                    sizes[path] = math.prod(shape) * stored.itemsize
        _refuse_full_disk(folder, sizes)
        for path, size in sizes.items():
            with path.open("ab") as file:  # never empties what another rank has begun
                file.truncate(size)
        records = {**kept, **asked}
        if records != kept:
            _write_meta(folder, source, records)
        super().__init__(folder, source)
        self.names = tuple(asked)
        self._pending: dict[str, list[Ints]] = {name: [] for name in asked}
        self._puts = 0

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
        for token in ("summary", "patches"):
            shape, tensor = getattr(record, token), getattr(features, token)
            received = None if tensor is None else tuple(tensor.shape[1:])
            if received != shape:
                raise ValueError(
                    f"{token} of teacher {name!r} must be {shape} an image as in the example, "
                    f"received {received}"
                )
            if tensor is None:
                continue
            values = tensor.detach().cpu()[real].to(_STORED[record.dtype][1]).contiguous()
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{token} of teacher {name!r} has values that are not finite in "
                    f"{record.dtype}: keep them as bfloat16 or float32, or look at the teacher"
                )
            if record.dtype == "bfloat16":
                values = values.view(torch.int16)
            self._map(name, token, "r+")[rows] = values.numpy()
        self._pending[name].append(rows)
        self._puts += 1
        if self._puts % _FLUSH_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Write features to disk, and only then record their rows as done."""
        for name, pending in self._pending.items():
            if not pending:
                continue
            for token in ("summary", "patches"):
                if (values := self._maps.get((name, token))) is not None:
                    values.flush()  # type: ignore[attr-defined]
            done = self._map(name, "done", "r+")
            done[np.concatenate(pending)] = 1
            done.flush()  # type: ignore[attr-defined]
            pending.clear()

    def finish(self) -> None:
        """Record everything that was put, and close the files."""
        self.flush()
        self._maps.clear()

    def _map(self, name: str, what: str, mode: Literal["r", "r+"] = "r+") -> npt.NDArray[Any]:
        return super()._map(name, what, "r+")


def _file(
    folder: Path, source: CacheSource, name: str, record: TeacherRecord, what: str
) -> tuple[Path, np.dtype[Any], tuple[int, ...]]:
    stem = quote(name, safe="")
    # A link in a stranger's folder would have us write to what it points at.
    if what == "done":
        return inside(folder, f"{stem}.done"), np.dtype(np.uint8), (source.rows,)
    shape: tuple[int, ...] = (source.rows, *getattr(record, what))
    return inside(folder, f"{stem}.{what}.bin"), _STORED[record.dtype][0], shape


def _read_meta(folder: Path, source: CacheSource) -> dict[str, TeacherRecord]:
    path = folder / "meta.json"
    meta = read_json(path)
    expected = json.loads(json.dumps(asdict(source)))
    if not isinstance(meta, dict) or not isinstance(meta.get("source"), dict):
        raise _damaged(path, "it does not say what it was made from")
    for field, value in expected.items():
        if (had := meta["source"].get(field)) != value:
            raise _refused(folder, f"'{field}'", had, value)
    try:
        return {str(n): TeacherRecord.from_json(v) for n, v in meta["teachers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, " ".join(str(error).split())[:160]) from error


def _damaged(path: Path, detail: str) -> ValueError:
    return ValueError(
        f"{path} of a feature cache is damaged ({detail}): remove the folder or name another one"
    )


def _write_meta(folder: Path, source: CacheSource, records: Mapping[str, TeacherRecord]) -> None:
    teachers = {name: asdict(record) for name, record in records.items()}
    text = json.dumps({"source": asdict(source), "teachers": teachers}, indent=1)
    write_atomically(folder / "meta.json", text.encode())


def _refuse_full_disk(folder: Path, sizes: Mapping[Path, int]) -> None:
    """The files are sparse: a disk that fills up later kills the process with a bus error."""
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


def _refused(folder: Path, what: str, had: object, expected: object) -> ValueError:
    return ValueError(
        f"the feature cache {folder} was made for something else: {what} is {str(had)[:200]} there "
        f"and {str(expected)[:200]} here; remove the folder or name another one"
    )
