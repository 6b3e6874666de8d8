"""Features of one encoder over one split, on disk: written shard by shard, read back whole.

A store is a folder named by the hash of everything that decides its content. ``meta.json`` says
what that was, ``summary.bin`` and ``patches.bin`` hold the rows, and ``<token>-NNNNN.json`` says of
each shard (a run of rows) that it is complete: its checksum, and which images could not be read. A
shard counts only with that record, which is written last and atomically, so that an interruption
loses the shard at hand and no more; ranks write different shards of the same files.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from multikd.files import file_lock, write_atomically
from multikd.retention.digest import combined
from multikd.types import Grid, TokenType

log = logging.getLogger(__name__)

Span = tuple[int, int]
PatchDtype = Literal["float16", "float32"]
SHARD_ROWS = 512  # of every store, so that one pass over the images fills several


@dataclass(frozen=True)
class StoreKey:
    """What the features of a store depend on.

    Attributes:
        encoder: fingerprint of weights and normalisation.
        data: fingerprint of the images and their order.
        size: (H, W) of the images.
        crop: share of the short side that is kept.
        interpolation: of the resize.
        token: summary or patches.
        dtype: in which the rows are kept.
    """

    encoder: str
    data: str
    size: Grid
    crop: float
    interpolation: str
    token: TokenType
    dtype: PatchDtype

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return combined(**asdict(self), shard_rows=SHARD_ROWS)


@dataclass(frozen=True)
class RowFault:
    """An image that could not be read."""

    row: int
    key: str
    cause: str
    detail: str


class FeatureStore:
    """The store of one key under a cache folder; made when the first shard is written.

    Args:
        folder: of all stores.
        key: what the features depend on.
        rows: M.
        about: names for whoever looks into ``meta.json``.
    """

    def __init__(
        self, folder: Path, key: StoreKey, rows: int, about: Mapping[str, str] | None = None
    ) -> None:
        self.key = key
        self.rows = rows
        self.about = dict(about or {})
        digest = key.hash
        self.folder = folder / digest[:2] / digest[2:34]
        self.meta: dict[str, Any] | None = self._read_meta()

    # ---------------------------------------------------------------- what is there

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row; () before anything was written."""
        return () if self.meta is None else tuple(self.meta["shape"])

    @property
    def grid(self) -> Grid | None:
        """Of the patches."""
        grid = None if self.meta is None else self.meta["grid"]
        return None if grid is None else (int(grid[0]), int(grid[1]))

    @property
    def data_path(self) -> Path:
        """The rows."""
        return self.folder / f"{self.key.token}.bin"

    def shards(self) -> list[Span]:
        """(first, last + 1) of every shard."""
        starts = range(0, self.rows, SHARD_ROWS)
        return [(start, min(start + SHARD_ROWS, self.rows)) for start in starts]

    def missing(self) -> list[Span]:
        """The shards that have no record yet."""
        if self.meta is None:
            return self.shards()
        return [span for span in self.shards() if self._record(span) is None]

    @property
    def complete(self) -> bool:
        """Whether every shard has a record."""
        return self.meta is not None and not self.missing()

    # ---------------------------------------------------------------- writing

    def write(
        self,
        span: Span,
        values: npt.NDArray[Any],
        grid: Grid | None,
        faults: Sequence[RowFault],
    ) -> None:
        """Keep the rows of a shard: first the rows, synced, then the record that they are there.

        Raises:
            ValueError: rows of another shape than the store's, values that the dtype can't hold, or
                a full disk.
        """
        with np.errstate(over="ignore"):  # what does not fit is found below
            kept = values.astype(self.key.dtype)
        if not np.isfinite(kept).all():
            raise ValueError(
                f"the {self.key.token} of {self.about.get('encoder', 'the encoder')} holds values "
                f"that are not finite in {self.key.dtype}"
                + (": use --patch-dtype float32" if self.key.dtype == "float16" else "")
            )
        self._begin(kept.shape[1:], grid)
        data = np.ascontiguousarray(kept).reshape(-1).view(np.uint8).data
        with self.data_path.open("r+b") as file:
            file.seek(span[0] * self._row_bytes)
            file.write(data)
            file.flush()
        record = {
            "rows": list(span),
            "crc32": zlib.crc32(data),
            "faults": [asdict(fault) for fault in faults],
        }
        write_atomically(self._record_path(span), json.dumps(record).encode())

    def _begin(self, shape: tuple[int, ...], grid: Grid | None) -> None:
        """Make the folder, its meta and the (sparse) file of rows, whichever process is first."""
        if self.meta is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / "lock"):
                self.meta = self._read_meta()
                if self.meta is None:
                    self._create(shape, grid)
        if self.shape != tuple(shape) or self.grid != grid:
            raise ValueError(
                f"the features of {self.about.get('encoder', 'the encoder')} are {tuple(shape)} on "
                f"a grid of {grid}, and were {self.shape} on {self.grid} before: remove "
                f"{self.folder}"
            )

    def _create(self, shape: tuple[int, ...], grid: Grid | None) -> None:
        meta = {
            "format": 1,
            "about": self.about,
            "key": asdict(self.key),
            "rows": self.rows,
            "shape": list(shape),
            "grid": grid,
            "shard_rows": SHARD_ROWS,
        }
        size = int(np.prod(shape)) * np.dtype(self.key.dtype).itemsize * self.rows
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise ValueError(
                f"the {self.key.token} of {self.about.get('encoder', 'the encoder')} need "
                f"{size / 1e9:.1f} GB and the disk of {self.folder} has {free / 1e9:.1f}: name "
                "another --cache, or limit the data set"
            )
        with self.data_path.open("ab") as file:
            file.truncate(size)
        write_atomically(self.folder / "meta.json", json.dumps(meta, indent=1).encode())
        self.meta = json.loads(json.dumps(meta))

    # ---------------------------------------------------------------- reading

    def read(self, check: bool = True) -> npt.NDArray[Any]:
        """All rows ``(M, …)``, memory-mapped, after every shard's checksum was compared.

        Args:
            check: compare them; not needed again in the same process.

        Raises:
            ValueError: shards are missing or damaged (the damaged ones are forgotten).
        """
        if not self.complete:
            raise ValueError(f"the features in {self.folder} are not complete: run again")
        values = np.memmap(
            self.data_path, np.dtype(self.key.dtype), "r", shape=(self.rows, *self.shape)
        )
        if check and (damaged := self.damaged()):
            raise ValueError(
                f"{len(damaged)} shards of the cached features in {self.folder} are damaged: they "
                "were removed, run the command again"
            )
        return values

    def damaged(self) -> list[Span]:
        """Shards whose rows are not those that were written; their records are removed."""
        spans = self.shards()
        with ThreadPoolExecutor(4) as pool:  # zlib works outside the GIL
            sound = list(pool.map(self._is_sound, spans))
        damaged = [span for span, right in zip(spans, sound, strict=True) if not right]
        for span in damaged:
            log.warning("cached features are damaged and computed again: %s", self.folder)
            self._record_path(span).unlink(missing_ok=True)
        return damaged

    def _is_sound(self, span: Span) -> bool:
        record = self._record(span)
        if record is None:
            return True  # not there: that is no damage
        try:
            with self.data_path.open("rb") as file:
                file.seek(span[0] * self._row_bytes)
                crc, left = 0, (span[1] - span[0]) * self._row_bytes
                while left > 0 and (part := file.read(min(left, 1 << 22))):
                    crc, left = zlib.crc32(part, crc), left - len(part)
        except OSError:
            return False
        return left == 0 and crc == record["crc32"]

    def faults(self) -> list[RowFault]:
        """Images that could not be read, in the order of the split."""
        found = []
        for span in self.shards():
            record = self._record(span) or {"faults": []}
            found += [RowFault(**fault) for fault in record["faults"]]
        return found

    def fault_count(self) -> int:
        """How many there are so far."""
        return len(self.faults())

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.key.dtype).itemsize

    def _record_path(self, span: Span) -> Path:
        return self.folder / f"{self.key.token}-{span[0]:09d}.json"

    def _record(self, span: Span) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record_path(span).read_bytes())
            return record if record["rows"] == list(span) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read_meta(self) -> dict[str, Any] | None:
        try:
            meta = json.loads((self.folder / "meta.json").read_bytes())
        except (OSError, ValueError):
            return None
        expected = json.loads(json.dumps(asdict(self.key)))
        if meta.get("key") != expected or meta.get("rows") != self.rows:
            return None
        return dict(meta)
