"""Batches balanced over data sets: every global batch holds the same number of each (DUNE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multikd.data.order import EpochOrder, Ints, quotas_of


class BalancedOrder(EpochOrder):
    """A mixture in which each run of ``batch`` positions holds exactly ``counts`` of the data sets.

    Their places in it are spread evenly, so that the slice of each rank is balanced too, to one or
    two images, whatever the number of ranks. As in every order the samples of a data set run on
    from batch to batch and from epoch to epoch; only which data set a place shows is fixed.

    Args:
        lengths: for every data set the number of samples in each of its shards.
        weights: share of each data set in a batch, relative to each other.
        batch: positions of a global batch: images on a process × processes.
        names: of the data sets, for errors.
        seed, window_shards, epoch_length: as ``EpochOrder``.

    Raises:
        ValueError: as ``EpochOrder``; or a batch too small for a data set.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int] | Ints],
        weights: Sequence[float],
        batch: int,
        names: Sequence[str],
        seed: int = 0,
        window_shards: int = 16,
        epoch_length: int | None = None,
    ) -> None:
        super().__init__(lengths, weights, seed, window_shards, epoch_length)
        self.counts = quotas_of(batch, weights, len(lengths))
        for name, count in zip(names, self.counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"a balanced batch of {batch} images has none of data set {name!r}: raise its "
                    "weight or data.batch_size, or set data.balanced to false"
                )
        # The i-th of c images of a data set at (i + 1/2)/c of the batch.
        members = np.repeat(np.arange(len(lengths)), self.counts)
        places = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        self._members = members[np.argsort(places, kind="stable")].astype(np.int64)
        seen = self._members[:, None] == np.arange(len(lengths))
        self._before = np.concatenate([np.zeros((1, len(lengths)), np.int64), seen.cumsum(0)])
        self._batch = batch
        self.quotas = tuple(self._cumulative(self.length))

    def _datasets(self, epoch: int, places: Ints) -> tuple[Ints, Ints]:
        batches, within = np.divmod(places, self._batch)
        datasets = self._members[within]
        counts = batches * np.asarray(self.counts, dtype=np.int64)[datasets]
        return datasets, counts + self._before[within, datasets]

    def _cumulative(self, place: int) -> list[int]:
        batches, within = divmod(place, self._batch)
        rest = self._before[within].tolist()
        return [batches * count + more for count, more in zip(self.counts, rest, strict=True)]
