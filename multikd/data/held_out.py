"""A split of the training data: every m-th sample of each shard is kept out of training.

By the sample's number in its shard, so the split is a function of the shards and m alone: not of
seed, ranks, workers or batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from multikd.data.counters import Stream, permutation
from multikd.data.dataset import ShardDataset
from multikd.data.order import EpochOrder, Located
from multikd.types import Batch

Ints = npt.NDArray[np.int64]


def held_out_samples(lengths: Sequence[Sequence[int] | Ints], every: int) -> Ints:
    """Samples that are kept out, numbered through all data sets in file order.

    Sample ``o`` of a shard (from 0) is kept out where ``o mod every == every − 1``.

    Args:
        lengths: for every data set the samples in each of its shards.
        every: m, 2 or more.
    """
    found, start = [], 0
    for shards in lengths:
        for count in (int(length) for length in shards):
            found.append(np.arange(every - 1, count, every, dtype=np.int64) + start)
            start += count
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


class KeptOrder(EpochOrder):
    """An epoch's order of the training samples that are not held out.

    Args:
        lengths, weights, seed, window_shards, epoch_length: as of ``EpochOrder``.
        every: m: every m-th sample of each shard is left out.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int] | Ints],
        every: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        window_shards: int = 16,
        epoch_length: int | None = None,
    ) -> None:
        whole = [np.asarray(shards, dtype=np.int64) for shards in lengths]
        kept = [shards - shards // every for shards in whole]
        super().__init__(kept, weights, seed, window_shards, epoch_length)
        self.every = every
        self._starts = [
            np.concatenate([[0], np.cumsum(shards)]).astype(np.int64) for shards in whole
        ]

    def locate(self, epoch: int, positions: Sequence[int] | Ints) -> Located:
        """As ``EpochOrder.locate``: offset and sample are numbered as in the whole shards."""
        found = super().locate(epoch, positions)
        offset = found.offset + found.offset // (self.every - 1)
        sample = np.empty_like(found.sample)
        for number, starts in enumerate(self._starts):
            chosen = found.dataset == number
            sample[chosen] = starts[found.shard[chosen]] + offset[chosen]
        return Located(found.dataset, found.shard, offset, sample)


class HeldOutBatches:
    """Endless batches of held-out samples: pass after pass, each a fresh permutation.

    Batch n of all ranks together is a run of ``batch_size × world`` places of the endless stream,
    a function of (seed, n) alone; its state is n. Samples are read when they are asked for, in
    this process.

    Args:
        dataset: places are samples in file order.
        samples: those that are held out.
        batch_size: of each process.
        rank, world: this process, and how many there are.
        seed: of the order.
        start: n of the first batch.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        samples: Ints,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.dataset = dataset
        self.samples = samples
        self.taken = start
        self._size, self._rank, self._world, self._seed = batch_size, rank, world, seed
        self._orders: dict[int, Ints] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = (self.taken * self._world + self._rank) * self._size
        self.taken += 1
        places = [self._sample(place) for place in range(first, first + self._size)]
        return self.dataset.__getitems__([(0, place) for place in places])

    def _sample(self, place: int) -> int:
        number, within = divmod(place, len(self.samples))
        if number not in self._orders:
            drawn = permutation(len(self.samples), self._seed, Stream.HELD_OUT, number)
            self._orders = {k: v for k, v in self._orders.items() if k == number - 1}
            self._orders[number] = drawn
        return int(self.samples[self._orders[number][within]])
