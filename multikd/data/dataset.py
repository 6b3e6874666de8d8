"""From places in the order to batches: read, decode, view, stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from multikd.data.cache import CacheSource, FeatureCache
from multikd.data.crops import Pixels
from multikd.data.decode import (
    DEFAULT_MAX_PIXELS,
    IMAGE_EXTENSIONS,
    SampleFault,
    decode_columns,
    decode_label,
    decode_pixels,
    find_image,
)
from multikd.data.order import EpochOrder
from multikd.data.remote import is_remote
from multikd.data.sampler import FILLER, Place
from multikd.data.schedule import ViewSchedule
from multikd.data.soft_labels import SOFT, Soft, decode_soft, stack_soft
from multikd.data.sources import ShardSource
from multikd.data.views import DrawKey, Parameters, ViewPolicy, recorded_number
from multikd.types import Batch, Fault

Ints = npt.NDArray[np.int64]
T = TypeVar("T")

NEIGHBOURS = 16
"""Samples after a faulty one, in file order, that are tried in its place."""

NO_STAND_IN = "no stand-in"
"""Cause of a sample that is grey in the batch, since nothing near it can be read either."""

_WHOLE_SHARD = ("unreadable", "unreachable", "shard changed")
"""Causes that the samples after a faulty one share: there the next shard is tried."""


class NoStandIn(ValueError):
    """A sample cannot be read, and nothing that might stand in for it."""


class Sample(NamedTuple):
    """One decoded sample."""

    pixels: Pixels  # uint8 (H, W, 3), RGB
    label: int  # −1 for none
    key: str
    columns: tuple[int, ...] = ()  # further labels, −1 for none
    soft: Soft | None = None  # (K,) probabilities

    @property
    def image(self) -> Image.Image:
        """As Pillow's image; a copy."""
        return Image.fromarray(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


class SampleReader:
    """Decoded samples by (data set, sample), one process's view of the shards.

    Args:
        sources: the data sets.
        max_pixels: larger images are faults.
        keep: hold decoded samples in memory; ``preload`` decodes all of them at once, so that
            forked workers share them.
        columns: further label columns to read of each sample's JSON.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        max_pixels: int = DEFAULT_MAX_PIXELS,
        keep: bool = False,
        columns: Sequence[str] = (),
    ) -> None:
        self.columns = tuple(columns)
        self.sources = tuple(sources)
        self.max_pixels = max_pixels
        self._keep = keep
        self._kept: dict[tuple[int, int], Sample | SampleFault] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a spawned worker decodes for itself

    def preload(self, limit_bytes: float) -> None:
        """Decode every sample into memory.

        Raises:
            ValueError: the decoded images need more than ``limit_bytes``.
        """
        used = 0
        for dataset, source in enumerate(self.sources):
            for number in range(len(source)):
                if (dataset, number) in self._kept:
                    continue
                found = self._decode(dataset, number)
                self._kept[dataset, number] = found
                if isinstance(found, Sample):
                    used += found.pixels.nbytes
                if used > limit_bytes:
                    raise ValueError(
                        f"the decoded images need more than in_memory_gb={limit_bytes / 1e9:g}: "
                        "raise it, or set in_memory to false"
                    )

    def place(self, dataset: int, number: int) -> tuple[str, str]:
        """(shard's name, key) of a sample, for messages."""
        source = self.sources[dataset]
        shard, offset = source.locate(number)
        return source.name(shard), source.key(shard, offset)

    def read(
        self, dataset: int, number: int, use: Callable[[Sample], T]
    ) -> tuple[Sample, T, Fault | None]:
        """A sample and what ``use`` makes of it; or a sound one near it, and the fault it covers.

        The stand-in is the next sample in file order, or the one after; then the one at the same
        place of the next shard; then further ones of either kind. Where the fault is a whole
        shard's, only other shards are tried. An exception of ``use`` is a fault, too.

        Raises:
            NoStandIn: none of the up to ``2 × NEIGHBOURS`` samples tried can be read.
        """
        fault: Fault | None = None
        whole_shard = False
        tried = 0
        for place, elsewhere in self._tries(dataset, number):
            if whole_shard and not elsewhere:
                continue
            tried += 1
            found = self._find(dataset, place)
            if isinstance(found, Sample):
                try:
                    return found, use(found), fault
                except Exception as error:  # a view policy may be anybody's
                    found = SampleFault("augmentation", f"{type(error).__name__}: {error}")
            if fault is None:
                fault = Fault(found.cause, *self.place(dataset, number), found.detail)
            whole_shard = whole_shard or (not elsewhere and found.cause in _WHOLE_SHARD)
        shard, key = self.place(dataset, number)
        why = "" if fault is None else f" ({fault.cause}: {fault.detail})"
        raise NoStandIn(
            f"neither sample {key} of {shard}{why} nor any of the {tried - 1} after it can be "
            "read: run  multikd shards inspect  on the shards"
        )

    def _tries(self, dataset: int, number: int) -> Iterator[tuple[int, bool]]:
        """A sample and what may stand in for it, in turn; whether each is of another shard."""
        source = self.sources[dataset]
        yield number, False  # nearly always the only one: what follows is worked out after it
        length, shards = len(source), len(source.urls)
        near = [((number + n) % length, False) for n in range(1, min(NEIGHBOURS, length - 1) + 1)]
        shard, offset = source.locate(number)
        far = []
        for n in range(1, min(NEIGHBOURS, shards - 1) + 1):
            other = (shard + n) % shards
            far.append((int(source.starts[other] + offset % source.lengths[other]), True))
        yield from (*near[:2], *far[:1], *near[2:], *far[1:])

    def label(self, dataset: int, number: int) -> int | None:
        """A sample's label alone, −1 for none; None where it can't be read."""
        source = self.sources[dataset]
        shard, offset = source.locate(number)
        try:
            wanted = [e for e in _wanted(source, shard) if e in ("cls", "json")]
            return decode_label(source.read_members(shard, offset, wanted))
        except SampleFault:
            return None

    def _find(self, dataset: int, number: int) -> Sample | SampleFault:
        known = self._kept.get((dataset, number))
        if known is not None:
            return known
        found = self._decode(dataset, number)
        if not self._keep:
            # The last one stays: a cache's rows ask for all views of a sample in a row.
            self._kept.clear()
        self._kept[dataset, number] = found
        return found

    def _decode(self, dataset: int, number: int) -> Sample | SampleFault:
        source = self.sources[dataset]
        shard, offset = source.locate(number)
        try:
            members = source.read_members(shard, offset, _wanted(source, shard))
            return decode_members(members, source.key(shard, offset), self.max_pixels, self.columns)
        except SampleFault as fault:
            return fault


def decode_members(
    members: dict[str, bytes], key: str, max_pixels: int, columns: Sequence[str] = ()
) -> Sample:
    """Image and labels of a sample's members.

    Raises:
        SampleFault: there is no image, or image or label cannot be read.
    """
    pixels = decode_pixels(find_image(members), max_pixels)
    label, soft = decode_label(members), decode_soft(members)
    if soft is not None and label < 0:
        label = int(soft.argmax())
    return Sample(pixels, label, key, decode_columns(members, columns), soft)


def _wanted(source: ShardSource, shard: int) -> tuple[str, ...]:
    """Extensions of the image and of the label; large other members are not read."""
    return _read_of(source.indexes[shard].extensions)


@lru_cache(maxsize=64)
def _read_of(extensions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        e
        for e in extensions
        if e.rpartition(".")[2] in IMAGE_EXTENSIONS or e in ("cls", "json", SOFT)
    )


class ShardDataset(Dataset[Batch]):
    """Batches by lists of (epoch, position); a pure function of them and of the shards.

    A faulty sample keeps its place: position, ``samples`` and the key of its view are the place's
    own, image, label and sample key are the neighbour's, and the fault is noted in the batch.
    A place of position ``FILLER`` shows the batch's first real place again, with label −1.

    Args:
        reader: the samples.
        order: position → sample.
        policies: one or several views of each image; only the first may be recorded.
        seed: of the views.
        cache: features of the first view to add to each batch, and of which teachers.
        recorded_seed: of recorded views; None: ``seed``.
        schedule: which of the views come in a batch, and how many images each shows; None: all.
        own: place of a data set in the mixture → its views, in place of ``policies``.
    """

    def __init__(
        self,
        reader: SampleReader,
        order: EpochOrder,
        policies: Sequence[ViewPolicy],
        seed: int = 0,
        cache: tuple[FeatureCache, tuple[str, ...]] | None = None,
        recorded_seed: int | None = None,
        schedule: ViewSchedule | None = None,
        own: Mapping[int, Sequence[ViewPolicy]] | None = None,
    ) -> None:
        if not policies:
            raise ValueError("a data set needs at least one view policy, received none")
        self.reader = reader
        self.order = order
        self.policies = tuple(policies)
        self.seed = seed
        self.recorded_seed = seed if recorded_seed is None else recorded_seed
        self.cache = cache
        self.schedule = schedule or ViewSchedule(len(self.policies))
        self.own = {place: tuple(views) for place, views in (own or {}).items()}
        self.grey_for_lost = False  # on several ranks: one that raised alone would hang the others
        self._remote = any(is_remote(url) for source in reader.sources for url in source.urls)

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, place: Place) -> Batch:
        return self.__getitems__([place])

    def __getitems__(self, places: list[Place]) -> Batch:
        """The batch of these places, all of one epoch."""
        epoch = places[0][0]
        number = places[0][2] if len(places[0]) > 2 else 0
        views = self.schedule.views(self.seed, epoch, number)
        if self.schedule.mode == "alternate":
            places = places[: self.schedule.shown(views[0], len(places))]
        positions = np.array([place[1] for place in places], dtype=np.int64)
        real = positions != FILLER
        stand_in = int(positions[real][0]) if real.any() else 0
        dataset, sample, recorded = self._resolve(epoch, np.where(real, positions, stand_in))
        if self._remote:
            self._fetch_ahead(epoch, stand_in)
        return self._assemble(epoch, positions, dataset, sample, recorded, views)

    def _resolve(self, epoch: int, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """Data set, sample and number of the recorded view (−1: drawn anew) at positions."""
        located = self.order.locate(epoch, positions)
        count = self.policies[0].recorded
        numbers = [
            -1 if count is None else recorded_number(epoch, sample, count)
            for sample in located.sample.tolist()
        ]
        return located.dataset, located.sample, np.array(numbers, dtype=np.int64)

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        ahead = self.order.shards_ahead(epoch, position)
        needs = [
            source.remote_bytes(shards)
            for source, shards in zip(self.reader.sources, ahead, strict=True)
        ]
        for source, shards, need in zip(self.reader.sources, ahead, needs, strict=True):
            # The data sets share one cache.
            source.prefetch(shards, source.cache.max_bytes * need / max(sum(needs), 1))

    def _assemble(
        self,
        epoch: int,
        positions: Ints,
        dataset: Ints,
        sample: Ints,
        number: Ints,
        numbers: Sequence[int],
    ) -> Batch:
        views: list[Tensor] = []
        shown = [self.schedule.shown(n, len(positions)) for n in numbers]
        every = [self.policies, *self.own.values()]
        size = max(len(policies[n].names) for policies in every for n in numbers)
        parameters = np.zeros((len(positions), len(numbers), size), dtype=np.float32)
        labels, soft, keys, faults = [], [], [], []
        columns: dict[str, list[int]] = {name: [] for name in self.reader.columns}
        rows = zip(*(a.tolist() for a in (positions, dataset, sample, number)), strict=True)
        for row, (position, group, index, recorded) in enumerate(rows):
            policies = self.own.get(group, self.policies)
            looks = [
                (DrawKey.live(self.seed, epoch, position, n), policies[n])
                for n, most in zip(numbers, shown, strict=True)
                if row < most
            ]
            if recorded >= 0 and numbers[0] == 0 and row < shown[0]:
                key = DrawKey.recorded(self.recorded_seed, group, index, recorded)
                looks[0] = (key, policies[0])
            try:
                found, seen, fault = self.reader.read(group, index, partial(self._see, looks))
            except NoStandIn as lost:
                if not self.grey_for_lost:
                    raise
                found, seen, fault = self._grey(group, index, [policy for _, policy in looks], lost)
            labels.append(found.label if position != FILLER else -1)
            soft.append(found.soft)
            keys.append(found.key)
            for place, column in enumerate(columns.values()):
                known = position != FILLER and len(found.columns) == len(columns)
                column.append(found.columns[place] if known else -1)
            if fault is not None and position != FILLER:
                faults.append(fault)
            visible = [view for view, most in enumerate(shown) if row < most]
            for view, (drawn, image) in zip(visible, seen, strict=True):
                parameters[row, view, : len(drawn)] = drawn
                if row == 0:
                    views.append(image.new_empty((shown[view], *image.shape)))
                elif image.shape != views[view].shape[1:]:
                    raise ValueError(
                        f"views of one batch must be equally large: expected "
                        f"{tuple(views[view].shape[1:])}, received {tuple(image.shape)}"
                    )
                views[view][row] = image  # while it is in the processor's cache
        return Batch(
            views=views,
            labels=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            dataset=torch.from_numpy(dataset),
            positions=torch.from_numpy(positions),
            samples=torch.from_numpy(sample),
            soft_labels=stack_soft(soft, labels),
            view_parameters=torch.from_numpy(parameters),
            recorded=torch.from_numpy(number),
            cached=self._cached(dataset, sample, number) if numbers[0] == 0 else None,
            faults=faults,
            columns={n: torch.tensor(c, dtype=torch.int64) for n, c in columns.items()} or None,
            origins=dataset.tolist(),
            view_numbers=None if len(numbers) == len(self.policies) else tuple(numbers),
        )

    def _grey(
        self, dataset: int, number: int, policies: Sequence[ViewPolicy], lost: NoStandIn
    ) -> tuple[Sample, list[tuple[Parameters, Tensor]], Fault]:
        """Grey views without a label: the batch keeps its shape, and every rank its steps."""
        shard, key = self.reader.place(dataset, number)
        seen = [
            (
                np.zeros(len(policy.names), dtype=np.float32),
                torch.full((3, policy.size, policy.size), 128, dtype=torch.uint8),
            )
            for policy in policies
        ]
        pixels = np.full((1, 1, 3), 128, dtype=np.uint8)
        return Sample(pixels, -1, key), seen, Fault(NO_STAND_IN, shard, key, str(lost))

    def _see(
        self, looks: Sequence[tuple[DrawKey, ViewPolicy]], sample: Sample
    ) -> list[tuple[Parameters, Tensor]]:
        """Parameters and pixels of each view of a sample."""
        seen = []
        for key, policy in looks:
            drawn = policy.draw(key, sample.size)
            seen.append((drawn, policy.see(sample.pixels, drawn)))
        return seen

    def _cached(self, dataset: Ints, sample: Ints, number: Ints) -> Any:
        if self.cache is None:
            return None
        cache, names = self.cache
        return cache.get(cache.source.rows_of(dataset, sample, number), names)


class RecordedDataset(ShardDataset):
    """Every recorded view that a cache still lacks: position = place in ``rows``.

    Args:
        reader, policy, seed: as the training set's.
        source: maps rows to (data set, sample, number).
        rows: int64, rows of the cache to compute.
    """

    def __init__(
        self,
        reader: SampleReader,
        policy: ViewPolicy,
        source: CacheSource,
        rows: Ints,
        seed: int = 0,
    ) -> None:
        lengths = [source_.lengths for source_ in reader.sources]
        super().__init__(reader, EpochOrder(lengths, shuffle=False), [policy], seed)
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        super()._fetch_ahead(0, int(self._rows[position]) // self._source.views)

    def _resolve(self, epoch: int, positions: Ints) -> tuple[Ints, Ints, Ints]:
        return self._source.places_of(self._rows[positions])
