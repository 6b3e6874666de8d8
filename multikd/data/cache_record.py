"""What a cache folder says of itself: ``meta.json``, and where its files lie.

``meta.json`` holds what the features were computed from (:class:`CacheSource`) and a
:class:`TeacherRecord` of every teacher. A teacher NAME has ``NAME.summary.bin`` and
``NAME.patches.bin`` of shape ``(rows, …)`` (and ``NAME.logits.bin`` where a term of the run reads
them), ``NAME.done`` with one byte a row, ``NAME.sums`` with a
checksum of every chunk of rows, and ``NAME.codec`` where scales or bases were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from multikd.data.cache_storage import KEPT, STORED, CacheStorage, Ints, Kept
from multikd.files import write_atomically
from multikd.types import Grid, TokenFeatures
from multikd.untrusted import inside, read_json

FORMAT = 3
_CHUNK_BYTES = 4 << 20
_STORAGE = tuple(f.name for f in fields(CacheStorage))
DIGEST = 32
"""Bytes of a chunk's checksum; before them one byte says that it was taken."""


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
    """What is kept of one teacher.

    Attributes:
        fingerprint: of weights and preprocessing.
        summary: ``(D_s,)`` of the teacher, or None.
        patches: ``(N, D_p)`` of the teacher, or None.
        grid: of the teacher's patches.
        storage: how they are kept.
        chunk: rows that share a checksum.
        codec: SHA-256 of the file of scales and bases; "" without one.
        about: what is known of the teacher without loading it (``known_teacher``).
        logits: ``(K,)``, or None where they were not kept.
    """

    fingerprint: str
    summary: tuple[int, ...] | None
    patches: tuple[int, ...] | None
    grid: Grid | None
    storage: CacheStorage = field(default_factory=CacheStorage)
    chunk: int = 1
    codec: str = ""
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    logits: tuple[int, ...] | None = None

    @property
    def dtype(self) -> str:
        """Number format of summaries."""
        return self.storage.dtype

    @property
    def tokens(self) -> tuple[Kept, ...]:
        """The token types that are kept, and logits."""
        return tuple(t for t in KEPT if getattr(self, t) is not None)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without its place in ``done``."""
        return sum(
            int(np.prod(self.stored_shape(t))) * self.stored_dtype(t).itemsize for t in self.tokens
        )

    @property
    def kept_grid(self) -> Grid | None:
        """The grid that patches were brought to."""
        return None if self.grid is None else self.storage.grid_of(self.grid)

    @property
    def sampled(self) -> int | None:
        """How many of the patches are kept, where not all are."""
        if self.patches is None or self.kept_grid is None or self.storage.patch_sample is None:
            return None
        count = self.kept_grid[0] * self.kept_grid[1]
        return self.storage.patch_sample if self.storage.patch_sample < count else None

    def stored_shape(self, token: Kept) -> tuple[int, ...]:
        """Shape of a row as it lies in the file."""
        shape = getattr(self, token)
        width = min(self.storage.components(token) or shape[-1], shape[-1])
        if token != "patches":
            return (width,)
        return (self.storage.kept_patches(self.grid, shape[0]), width)

    def stored_dtype(self, token: Kept) -> np.dtype[Any]:
        """NumPy's type of the numbers in the file."""
        return STORED[self.storage.dtype_of(token)][0]

    @staticmethod
    def of(
        fingerprint: str,
        example: TokenFeatures,
        storage: CacheStorage,
        about: Mapping[str, Any] | None = None,
    ) -> TeacherRecord:
        """The record for features like ``example`` (whatever its batch size)."""

        def shape(token: Kept) -> tuple[int, ...] | None:
            tensor = getattr(example, token)
            return None if tensor is None else tuple(tensor.shape[1:])

        record = TeacherRecord(
            fingerprint, shape("summary"), shape("patches"), example.grid, storage,
            about=dict(about or {}), logits=shape("logits"),
        )  # fmt: skip
        chunk = max(16, min(4096, _CHUNK_BYTES // max(record.row_bytes, 1)))
        return TeacherRecord(**{**_flat(record), "chunk": chunk})

    def to_json(self) -> dict[str, Any]:
        """For ``meta.json``: one level, the storage's settings among the others."""
        values = _flat(self)
        return {**{k: v for k, v in values.items() if k != "storage"}, **asdict(self.storage)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TeacherRecord:
        """Back from ``meta.json``, where tuples are lists."""

        def shape(name: str, rank: int) -> Any:
            value = values.get(name) if name == "logits" else values[name]
            if value is None:
                return None
            if len(value) != rank or not all(type(n) is int and 0 < n < 1 << 31 for n in value):
                raise ValueError(f"its {name} has the shape {value!r}")
            return tuple(value)

        fingerprint, chunk, codec = values["fingerprint"], values["chunk"], values["codec"]
        if not isinstance(fingerprint, str) or values["dtype"] not in STORED:
            raise ValueError(f"a teacher's dtype is {values['dtype']!r}")
        if type(chunk) is not int or chunk < 1 or not isinstance(codec, str):
            raise ValueError(f"a teacher's chunk is {chunk!r}")
        storage = CacheStorage(**{name: values[name] for name in _STORAGE})
        about = values.get("about")
        return TeacherRecord(
            fingerprint,
            shape("summary", 1),
            shape("patches", 2),
            shape("grid", 2),
            storage,
            chunk,
            codec,
            about if isinstance(about, dict) else {},
            shape("logits", 1),
        )

    def differs(self, other: TeacherRecord) -> tuple[str, object, object] | None:
        """The first setting in which another record differs: its name, ours, the other's."""
        pairs = [(f, getattr(self, f), getattr(other, f)) for f in ("fingerprint", "summary")]
        pairs += [(f, getattr(self.storage, f), getattr(other.storage, f)) for f in _STORAGE]
        pairs += [(f, getattr(self, f), getattr(other, f)) for f in ("patches", "grid", "logits")]
        return next((pair for pair in pairs if pair[1] != pair[2]), None)


def cache_file(
    folder: Path, source: CacheSource, name: str, record: TeacherRecord, what: str
) -> tuple[Path, np.dtype[Any], tuple[int, ...]]:
    """Path, type and shape of a file: ``summary``, ``patches``, ``logits``, ``done``, ``sums``."""
    stem = quote(name, safe="")
    # A link in a stranger's folder would have us write to what it points at.
    if what == "done":
        return inside(folder, f"{stem}.done"), np.dtype(np.uint8), (source.rows,)
    if what == "sums":
        chunks = -(-source.rows // record.chunk)
        return inside(folder, f"{stem}.sums"), np.dtype(np.uint8), (chunks, 1 + DIGEST)
    token: Kept = next(t for t in KEPT if t == what)
    shape = (source.rows, *record.stored_shape(token))
    return inside(folder, f"{stem}.{what}.bin"), record.stored_dtype(token), shape


def codec_file(folder: Path, name: str) -> Path:
    """Where a teacher's scales and bases lie."""
    return inside(folder, f"{quote(name, safe='')}.codec")


def read_meta(folder: Path, source: CacheSource | None) -> dict[str, TeacherRecord]:
    """The teachers of a cache, which must have been made from ``source`` (None: whatever).

    Raises:
        FileNotFoundError: there is no cache in the folder.
        ValueError: it is damaged, or was made from something else, which is named.
    """
    path = folder / "meta.json"
    meta = read_json(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("source"), dict):
        raise damaged(path, "it does not say what it was made from")
    if meta.get("format") != FORMAT:
        raise refused(folder, "the format", meta.get("format", 1), FORMAT)
    if source is not None:
        for setting, value in json.loads(json.dumps(asdict(source))).items():
            if (had := meta["source"].get(setting)) != value:
                raise refused(folder, f"'{setting}'", had, value)
    try:
        return {str(n): TeacherRecord.from_json(v) for n, v in meta["teachers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, " ".join(str(error).split())[:160]) from error


def write_meta(folder: Path, source: CacheSource, records: Mapping[str, TeacherRecord]) -> None:
    """Write ``meta.json``, whole or not at all."""
    teachers = {name: record.to_json() for name, record in records.items()}
    content = {"format": FORMAT, "source": asdict(source), "teachers": teachers}
    write_atomically(folder / "meta.json", json.dumps(content, indent=1).encode())


def damaged(path: Path, detail: str) -> ValueError:
    """A file of a cache that is not what it should be."""
    return ValueError(
        f"{path} of a feature cache is damaged ({detail}): `multikd cache` computes what is "
        "missing again; or remove the folder, or name another one"
    )


def refused(folder: Path, what: str, had: object, expected: object) -> ValueError:
    """A cache of something else."""
    return ValueError(
        f"the feature cache {folder} was made for something else: {what} is {str(had)[:200]} there "
        f"and {str(expected)[:200]} here; remove the folder or name another one"
    )


def _flat(record: TeacherRecord) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
