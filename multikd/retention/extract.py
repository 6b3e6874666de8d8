"""Every feature that the tasks will ask for, in one pass over the images: Lightning's ``predict``.

Work is divided by shards of the stores: rank r takes every W-th shard, whole, in batches that begin
with the shard. So one process and many write the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multikd.retention.datasets import EvalDataset, ImageSplit
from multikd.retention.encoders import Column, Network
from multikd.retention.store import (
    FeatureStore,
    PatchDtype,
    RowFault,
    Span,
    StoreKey,
)
from multikd.types import Batch, Grid, TokenFeatures, TokenType

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractOptions:
    """How features are computed and kept.

    Attributes:
        cache: folder of the stores.
        batch_size: images of a forward pass.
        workers: threads that read images ahead.
        patch_dtype: of patch tokens on disk.
        accelerator: ``auto``, ``cpu``, ``cuda``, …
        devices: how many; more than one: DDP.
    """

    cache: Path
    batch_size: int = 64
    workers: int = 2
    patch_dtype: PatchDtype = "float16"
    accelerator: str = "auto"
    devices: int = 1


@dataclass
class Work:
    """One network over one split at one size.

    Attributes:
        network: runs.
        stores: (member, token) → where its features go.
        split: the images.
        size: at which.
        interpolation: of the resize.
        label: for the progress bar.
        data: the data set, for its bound on faults.
        spans: shards that some store lacks.
    """

    network: Network
    stores: dict[tuple[str, TokenType], FeatureStore]
    split: ImageSplit
    size: Grid
    interpolation: str
    label: str
    data: EvalDataset
    spans: list[Span] = field(default_factory=list)

    @property
    def images(self) -> int:
        """To be run."""
        return sum(end - start for start, end in self.spans)


def store_of(
    column: Column,
    split: ImageSplit,
    size: Grid,
    token: TokenType,
    options: ExtractOptions,
) -> FeatureStore:
    """Where the features of a column over a split are kept."""
    dtype: PatchDtype = "float32" if token == "summary" else options.patch_dtype
    key = StoreKey(
        encoder=column.fingerprint,
        data=split.fingerprint(),
        size=size,
        crop=split.crop,
        interpolation=interpolation_of(column),
        token=token,
        dtype=dtype,
    )
    about = {"encoder": column.name, "source": column.source, "data": split.name}
    return FeatureStore(options.cache, key, len(split), about)


def interpolation_of(column: Column) -> str:
    """The encoder's own, where Pillow has it."""
    name = column.spec.interpolation
    return name if name in ("bilinear", "bicubic", "lanczos", "nearest") else "bicubic"


class ShardBatches:
    """The batches of one rank over the shards of a piece of work, in order."""

    def __init__(self, work: Work, options: ExtractOptions, rank: int, world: int) -> None:
        self.work = work
        self.options = options
        self.spans = work.spans[rank::world]
        self._chunks = [
            np.arange(start, min(start + options.batch_size, last), dtype=np.int64)
            for first, last in self.spans
            for start in range(first, last, options.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        return self.work.split.chunks(
            self._chunks, self.work.size, self.work.interpolation, self.options.workers
        )


class ShardSink:
    """Collects features until a shard is whole, and writes it."""

    def __init__(self, work: Work, spans: Sequence[Span]) -> None:
        self.work = work
        self._pending = list(spans)
        self._parts: dict[tuple[str, TokenType], list[Tensor]] = {k: [] for k in work.stores}
        self._missing = {key: set(store.missing()) for key, store in work.stores.items()}
        self._faults: list[RowFault] = []
        self._grids: dict[str, Grid | None] = {}
        self._rows = 0

    def put(self, batch: Batch, features: Mapping[str, TokenFeatures]) -> None:
        """One batch, the next of the order."""
        for member, token in self.work.stores:
            found = features[member]
            rows = rows_of(found, token, member or "the encoder")
            self._parts[member, token].append(rows.to("cpu", torch.float32))
            self._grids[member] = found.grid
        places = {key: int(p) for key, p in zip(batch.keys, batch.positions, strict=True)}
        self._faults += [
            RowFault(places[fault.key], fault.key, fault.cause, fault.detail)
            for fault in batch.faults
        ]
        self._rows += len(batch)
        first, last = self._pending[0]
        if self._rows == last - first:
            self._flush()

    def _flush(self) -> None:
        span = self._pending.pop(0)
        for (member, token), store in self.work.stores.items():
            values = torch.cat(self._parts[member, token]).numpy()
            grid = self._grids[member] if token == "patches" else None
            if span in self._missing[member, token]:
                store.write(span, values, grid, self._faults)
            self._parts[member, token] = []
        self._faults, self._rows = [], 0


def rows_of(features: TokenFeatures, token: TokenType, name: str) -> Tensor:
    """``(B, D)`` or ``(B, N, D)``; the mean patch where there is no summary.

    Raises:
        ValueError: the encoder has none of that kind.
    """
    if token == "patches":
        if features.patches is None:
            raise ValueError(f"{name} gives no patch tokens")
        return features.patches
    if features.summary is not None:
        return features.summary
    if features.patches is None:
        raise ValueError(f"{name} gives neither a summary nor patches")
    return features.patches.mean(dim=1)


# ---------------------------------------------------------------------------- running it


def plan(
    requests: Sequence[tuple[Column, EvalDataset, str, TokenType, Grid]], options: ExtractOptions
) -> list[Work]:
    """The passes that are needed: one a (network, split, size), for all members and tokens at once.

    Call it on every rank before any of them writes.
    """
    works: dict[tuple[int, str, str, Grid, str], Work] = {}
    for column, data, split_name, token, size in requests:
        split = data.splits[split_name]
        store = store_of(column, split, size, token, options)
        missing = store.missing()
        if not missing:
            continue
        how = interpolation_of(column)
        place = (id(column.network), data.name, split_name, size, how)
        label = f"{column.name.split('+')[0]} · {split.name}"
        work = works.setdefault(place, Work(column.network, {}, split, size, how, label, data))
        work.stores[column.member, token] = store
        work.spans = sorted({*work.spans, *missing})
    return list(works.values())


def extract(
    works: Sequence[Work],
    options: ExtractOptions,
    progress: bool = True,
    trainer: Any = None,
) -> bool:
    """Run every piece of work; returns whether this process is the one that goes on (rank 0).

    Args:
        works: of ``plan``.
        options: devices, batches, threads.
        progress: show bars.
        trainer: a Lightning trainer of one's own, in place of one made after ``options``.

    Raises:
        ValueError: too many images can't be read, or features are not finite.
        KeyboardInterrupt: what was written is kept.
    """
    if not works:
        return True
    from multikd.retention.predict import Runner

    return Runner(options, progress, trainer).run(works)
