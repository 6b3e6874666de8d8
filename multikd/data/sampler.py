"""Batches of positions for one rank: the loader's state is one integer.

A global batch is a run of ``batch_size × world`` consecutive positions; rank r takes its r-th
slice. Whole batches go to workers, so the sequence of samples is the same for every number of
ranks (at the same global batch) and workers.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

FILLER = -1
"""Position of a place that only pads an evaluation set to equal batches on every rank."""

Place = tuple[int, int]  # (epoch, position)


class GlobalBatchSampler(Sampler[list[Place]]):
    """Yields, for one rank, lists of (epoch, position) of equal length.

    Args:
        length: positions in an epoch (``EpochOrder.length``).
        batch_size: samples per batch on each rank.
        rank, world: this process and how many there are.
        drop_last: True (training) drops the incomplete last global batch; False (evaluation)
            pads it with places of position ``FILLER`` so that every rank has as many batches.

    ``len()`` is the number of batches of a whole epoch, also when ``resume`` makes the next
    iteration begin later.

    Raises:
        ValueError: fewer samples than one global batch with ``drop_last``; a rank outside
            ``world``; a size below one.
    """

    def __init__(
        self, length: int, batch_size: int, rank: int = 0, world: int = 1, drop_last: bool = True
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, received {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"the rank must be in 0 … {world - 1}, received {rank}")
        if length < 1:
            raise ValueError("there are no samples to make batches of")
        self.length = length
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0
        self._size = batch_size
        span = batch_size * world
        self._batches = length // span if drop_last else -(-length // span)
        if self._batches == 0:
            raise ValueError(
                f"the training set has {length} samples, fewer than one global batch of {span} "
                f"({batch_size} on each of {world} processes): lower the batch size"
            )

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; another epoch begins at its first batch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.start = 0

    def resume(self, epoch: int, batches: int) -> None:
        """Let the next iteration begin after ``batches`` batches of ``epoch``, in O(1)."""
        if not 0 <= batches <= self._batches:
            raise ValueError(
                f"cannot resume after {batches} batches of an epoch that has {self._batches}"
            )
        self.epoch = epoch
        self.start = batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, start = self.epoch, self.start
        self.start = 0  # only the next iteration is shortened
        span = self._size * self.world
        for batch in range(start, self._batches):
            first = batch * span + self.rank * self._size
            yield [
                (epoch, position if position < self.length else FILLER)
                for position in range(first, first + self._size)
            ]
