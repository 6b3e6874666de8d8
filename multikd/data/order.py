"""The order of samples: a permutation over indexed samples, a pure function of (seed, epoch).

An epoch is a line of positions 0 … length − 1. Position → (data set, shard, sample) is computed,
never stored: shards are permuted, samples are shuffled inside a window of ``window_shards``
consecutive shards (so that a batch touches few shards at a time), and data sets of a mixture are
interleaved in blocks whose composition follows cumulative quotas. Ranks and workers do not enter,
hence neither does their number: fewer shards than ranks × workers is no problem here.

Memory: one permutation per window in use (``window_shards`` shards' samples × 8 bytes), at most
four at a time for each data set.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from multikd.data.counters import Stream, permutation

Ints = npt.NDArray[np.int64]

_BLOCK = 1024  # positions in which the data sets of a mixture are shuffled among each other
_KEPT = 4  # windows (and shard orders, and blocks) remembered


class Located(NamedTuple):
    """Where positions lead; int64 arrays of equal shape ``(n,)``."""

    dataset: Ints
    shard: Ints
    offset: Ints  # sample in its shard
    sample: Ints  # sample in its data set, shards in file order


class _Recent(OrderedDict[tuple[int, ...], npt.NDArray[np.int64]]):
    """A few most recently used arrays."""

    def recall(self, key: tuple[int, ...]) -> Ints | None:
        if key in self:
            self.move_to_end(key)
            return self[key]
        return None

    def keep(self, key: tuple[int, ...], value: Ints) -> Ints:
        self[key] = value
        while len(self) > _KEPT:
            self.popitem(last=False)
        return value


class _Passes:
    """One data set as an endless stream: pass after pass, each a fresh permutation."""

    def __init__(
        self, lengths: Ints, dataset: int, seed: int, window_shards: int, shuffle: bool
    ) -> None:
        self.lengths = lengths
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.total = int(self.starts[-1])
        self._dataset = dataset
        self._seed = seed
        self._window_shards = window_shards
        self._shuffle = shuffle
        self._shard_orders = _Recent()
        self._edges = _Recent()
        self._windows = _Recent()

    def samples(self, stream: Ints) -> Ints:
        """Sample of the data set at each place of the endless stream."""
        if not self._shuffle:
            return stream % self.total
        result = np.empty_like(stream)
        passes = stream // self.total
        for number in np.unique(passes):
            chosen = passes == number
            result[chosen] = self._within(int(number), stream[chosen] % self.total)
        return result

    def shards_ahead(self, place: int) -> list[int]:
        """Shards of the window at a place of the endless stream, then those of the next one."""
        number, within = divmod(place, self.total)
        if self._shuffle:
            order, edges = self._shards(number)
            starts = edges[:: self._window_shards]
        else:
            order, starts = np.arange(len(self.lengths)), self.starts[:: self._window_shards]
        first = (int(np.searchsorted(starts, within, side="right")) - 1) * self._window_shards
        ahead = order[first : first + 2 * self._window_shards].tolist()
        if self._shuffle and len(ahead) < 2 * self._window_shards:  # the next pass comes soon
            ahead += self._shards(number + 1)[0][: self._window_shards].tolist()
        return list(dict.fromkeys(ahead))

    def _within(self, number: int, places: Ints) -> Ints:
        """Samples at ``places`` of one pass."""
        order, edges = self._shards(number)
        starts = edges[:: self._window_shards]
        windows = np.searchsorted(starts, places, side="right") - 1
        result = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            start = int(starts[window])
            stop = int(edges[min((window + 1) * self._window_shards, len(order))])
            # A place in the window → a place in the window's shards laid end to end → a sample.
            shuffled = self._window(number, int(window), stop - start)
            laid = start + shuffled[places[chosen] - start]
            nth = np.searchsorted(edges, laid, side="right") - 1
            result[chosen] = self.starts[order[nth]] + laid - edges[nth]
        return result

    def _shards(self, number: int) -> tuple[Ints, Ints]:
        """Order of the non-empty shards in one pass, and where each begins in that pass."""
        key = (number,)
        order = self._shard_orders.recall(key)
        edges = self._edges.recall(key)
        if order is None or edges is None:
            filled = np.flatnonzero(self.lengths)
            shuffled = permutation(len(filled), self._seed, Stream.SHARDS, self._dataset, number)
            order = self._shard_orders.keep(key, filled[shuffled])
            sums = np.concatenate([[0], np.cumsum(self.lengths[order])]).astype(np.int64)
            edges = self._edges.keep(key, sums)
        # ``edges`` has one entry more than ``order``; the slice of window starts taken from it
        # may end on the total, which no place reaches.
        return order, edges

    def _window(self, number: int, window: int, count: int) -> Ints:
        known = self._windows.recall((number, window))
        if known is not None:
            return known
        drawn = permutation(count, self._seed, Stream.WINDOW, self._dataset, number, window)
        return self._windows.keep((number, window), drawn)


class EpochOrder:
    """Position in an epoch → sample, for one data set or a weighted mixture.

    Args:
        lengths: for every data set the number of samples in each of its shards (zeros allowed).
        weights: share of each data set in the mixture, relative to each other; they say how
            many of an epoch's samples come from it, whatever its size. Default: equal shares.
        seed: any integer.
        window_shards: shards whose samples are shuffled together.
        epoch_length: samples in an epoch; default: the sum of all data sets' samples.
        shuffle: False gives shards and samples in file order, data set after data set, each
            sample once (evaluation); weights are then not used.

    With one data set and the default length every sample comes exactly once an epoch. In a
    mixture, data set d fills ``quotas[d]`` places of every epoch (largest remainders, so its share
    is exact to one sample); its samples run on from epoch to epoch, pass after pass, so a data
    set larger than its quota is seen whole over several epochs, and a smaller one repeats in
    freshly shuffled passes.

    Raises:
        ValueError: an empty data set, a weight that is not positive, a length below one.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int] | Ints],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        window_shards: int = 16,
        epoch_length: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if not lengths:
            raise ValueError("an order needs at least one data set, received none")
        if window_shards < 1:
            raise ValueError(f"window_shards must be at least 1, received {window_shards}")
        if epoch_length is not None and epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1, received {epoch_length}")
        self._streams = [
            _Passes(np.asarray(shards, dtype=np.int64), number, seed, window_shards, shuffle)
            for number, shards in enumerate(lengths)
        ]
        for number, stream in enumerate(self._streams):
            if stream.total == 0:
                raise ValueError(f"data set {number} of the mixture has no samples: remove it")
        self.totals = tuple(stream.total for stream in self._streams)
        self.seed = seed
        self.shuffle = shuffle
        self.length = sum(self.totals) if epoch_length is None else epoch_length
        if not shuffle:
            if self.length != sum(self.totals):
                raise ValueError(
                    "an unshuffled order has every sample once: leave epoch_length out"
                )
            self.quotas = self.totals
        else:
            self.quotas = quotas_of(self.length, weights, len(self._streams))
        self._blocks = _Recent()

    def __len__(self) -> int:
        return self.length

    def locate(self, epoch: int, positions: Sequence[int] | Ints) -> Located:
        """Find the samples at ``positions`` (each in 0 … length − 1) of an epoch.

        Raises:
            IndexError: a position outside the epoch.
        """
        places = np.asarray(positions, dtype=np.int64)
        if places.size and (int(places.min()) < 0 or int(places.max()) >= self.length):
            raise IndexError(f"positions must be in 0 … {self.length - 1}")
        datasets, counts = self._datasets(epoch, places)
        shard, offset, sample = (np.empty_like(places) for _ in range(3))
        for number, stream in enumerate(self._streams):
            chosen = datasets == number
            if not chosen.any():
                continue
            found = stream.samples(epoch * self.quotas[number] + counts[chosen])
            sample[chosen] = found
            nth = np.searchsorted(stream.starts, found, side="right") - 1
            shard[chosen] = nth
            offset[chosen] = found - stream.starts[nth]
        return Located(datasets, shard, offset, sample)

    def locate_sample(self, dataset: int, sample: int) -> tuple[int, int]:
        """(shard, sample in the shard) of a data set's sample."""
        starts = self._streams[dataset].starts
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        return shard, sample - int(starts[shard])

    def shards_ahead(self, epoch: int, position: int) -> list[list[int]]:
        """For each data set, the shards of the window at a position and of the one after it.

        Where data sets come one after the other, only the one at the position and the next.
        """
        if not self.shuffle:
            result: list[list[int]] = [[] for _ in self._streams]
            starts = np.concatenate([[0], np.cumsum(self.totals)])
            now = int(np.searchsorted(starts, position, side="right")) - 1
            result[now] = self._streams[now].shards_ahead(position - int(starts[now]))
            if now + 1 < len(self._streams):
                result[now + 1] = self._streams[now + 1].shards_ahead(0)
            return result
        counts = [position] if len(self._streams) == 1 else self._cumulative(position)
        return [
            stream.shards_ahead(epoch * quota + count) if quota else []
            for stream, quota, count in zip(self._streams, self.quotas, counts, strict=True)
        ]

    def _datasets(self, epoch: int, places: Ints) -> tuple[Ints, Ints]:
        """Data set of each place, and how many places of that data set come before it."""
        if len(self._streams) == 1:
            return np.zeros_like(places), places
        if not self.shuffle:
            starts = np.concatenate([[0], np.cumsum(self.totals)]).astype(np.int64)
            datasets = np.searchsorted(starts, places, side="right") - 1
            return datasets, places - starts[datasets]
        datasets, counts = np.empty_like(places), np.empty_like(places)
        blocks = places // _BLOCK
        for block in np.unique(blocks):
            chosen = blocks == block
            members, before = self._block(epoch, int(block))
            within = places[chosen] - int(block) * _BLOCK
            datasets[chosen], counts[chosen] = members[within], before[within]
        return datasets, counts

    def _block(self, epoch: int, block: int) -> Ints:
        """Row 0: data set of each place of a block; row 1: that data set's places before it."""
        known = self._blocks.recall((epoch, block))
        if known is not None:
            return known
        start, stop = block * _BLOCK, min((block + 1) * _BLOCK, self.length)
        first, last = self._cumulative(start), self._cumulative(stop)
        members = np.repeat(np.arange(len(first)), np.subtract(last, first))
        members = members[permutation(stop - start, self.seed, Stream.BLOCK, epoch, block)]
        before = np.empty_like(members)
        for number, count in enumerate(first):
            mine = members == number
            before[mine] = count + np.arange(int(mine.sum()))
        return self._blocks.keep((epoch, block), np.stack([members, before]))

    def _cumulative(self, place: int) -> list[int]:
        """Places of each data set among the first ``place`` of an epoch; the sum is ``place``.

        One data set after the other takes its rounded share of what is left over: monotone in
        ``place`` and exactly the quotas at the end of the epoch. Python integers: no overflow.
        """
        counts, left, total = [], place, self.length
        for quota in self.quotas:
            taken = (2 * left * quota + total) // (2 * total) if total else 0
            counts.append(taken)
            left, total = left - taken, total - quota
        return counts


def quotas_of(length: int, weights: Sequence[float] | None, count: int) -> tuple[int, ...]:
    """Samples of an epoch that each data set gives (largest remainders; sum = ``length``)."""
    shares = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(shares) != count:
        raise ValueError(f"expected {count} weights, one a data set, received {len(shares)}")
    if any(not 0 < share < float("inf") for share in shares):
        raise ValueError(f"weights of data sets must be positive and finite, received {shares}")
    exact = [length * share / sum(shares) for share in shares]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(count), key=lambda d: (quotas[d] - exact[d], d))
    for number in by_remainder[: length - sum(quotas)]:
        quotas[number] += 1
    return tuple(quotas)
