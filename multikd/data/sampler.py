"""Batches of positions for one rank: the loader's state is one integer.

A global batch is a run of ``batch_size × world`` consecutive positions; rank r takes its r-th
slice. Whole batches go to workers, so the sequence of samples is the same for every number of
ranks (at the same global batch) and workers.

The state counts **samples**, not batches: an epoch that was interrupted goes on with other ranks,
or with another batch size, and what was left of it is seen exactly once (``resume``).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

FILLER = -1
"""Position of a place that only pads a batch, so that batches are equal on every rank."""

# (epoch, position), and the batch's number in its epoch where a sampler is to say it.
Place = tuple[int, int] | tuple[int, int, int]


class GlobalBatchSampler(Sampler[list[Place]]):
    """Yields, for one rank, lists of (epoch, position) of equal length.

    Args:
        length: positions in an epoch (``EpochOrder.length``).
        batch_size: samples per batch on each rank.
        rank, world: this process and how many there are.
        drop_last: True (training) drops the incomplete last global batch; False (evaluation)
            pads it with places of position ``FILLER`` so that every rank has as many batches.

    ``len()`` is the number of batches of the epoch that was set, those before its start included.
    With ``numbered`` set, places also carry the number of their batch, the same on every rank.

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
        self.numbered = False
        self._size = batch_size
        span = batch_size * world
        self._batches = length // span if drop_last else -(-length // span)
        if self._batches == 0:
            raise ValueError(
                f"the training set has {length} samples, fewer than one global batch of {span} "
                f"({batch_size} on each of {world} processes): lower the batch size"
            )
        self._rest: Rest | None = None

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on ``batch_sampler.sampler``."""
        return self

    @property
    def span(self) -> int:
        """Samples of one global batch."""
        return self._size * self.world

    @property
    def whole(self) -> int:
        """Batches of an epoch that begins at its beginning."""
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; another epoch begins at its first batch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.start = 0
            self._rest = None

    def resume(
        self, epoch: int, batches: int, position: int | None = None, stop: int | None = None
    ) -> None:
        """Let the next iteration begin after ``batches`` batches of ``epoch``, in O(1).

        Args:
            epoch: the epoch under way.
            batches: how many of its batches were taken.
            position: samples that they held; None: whole global batches of this sampler. Given,
                the epoch may have been begun with other ranks or another batch size, and
                ``batches`` is a mere number to go on counting from.
            stop: samples that the epoch holds, from its beginning; None: as many as go into whole
                global batches. What is left of them comes exactly once: where it is no multiple
                of the global batch, the last two batches share it, and at most ``world − 1``
                places of each are ``FILLER``.
        """
        own = position is None or (
            position == batches * self.span and stop in (None, self._batches * self.span)
        )
        if own:
            if not 0 <= batches <= self._batches:
                raise ValueError(
                    f"cannot resume after {batches} batches of an epoch that has {self._batches}"
                )
            self._rest = None
        else:
            stop = self._batches * self.span if stop is None else stop
            if position is None or not 0 <= position <= stop <= self.length or batches < 0:
                raise ValueError(
                    f"cannot resume after {position} of {stop} samples of an epoch that has "
                    f"{self.length}"
                )
            self._rest = Rest(batches, position, stop, self._size, self.world)
        self.epoch = epoch
        self.start = batches

    def consumed(self, batches: int) -> int:
        """Samples of the epoch in its first ``batches`` batches, over all ranks."""
        if self._rest is not None:
            return self._rest.edge(batches)
        return min(batches * self.span, self.length)

    def stop(self, batches: int) -> int:
        """Samples of the epoch where it ends after ``batches`` batches."""
        return self._rest.stop if self._rest is not None else self.consumed(batches)

    def __len__(self) -> int:
        return self._batches if self._rest is None else self._rest.total

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, start, rest = self.epoch, self.start, self._rest
        self.start = 0  # only the next iteration is shortened
        if rest is not None:
            for batch in range(rest.before, rest.total):
                yield self._places(epoch, batch, rest.places(batch, self.rank))
            return
        for batch in range(start, self._batches):
            first = batch * self.span + self.rank * self._size
            places = range(first, first + self._size)
            yield self._places(epoch, batch, [p if p < self.length else FILLER for p in places])

    def _places(self, epoch: int, batch: int, positions: list[int]) -> list[Place]:
        if self.numbered:
            return [(epoch, position, batch) for position in positions]
        return [(epoch, position) for position in positions]


class Rest:
    """What is left of an epoch that was begun otherwise, in batches for ``world`` ranks.

    Args:
        before: number of the first batch.
        position, stop: the samples that are left, ``position … stop − 1``.
        size, world: of the batches that are to come.

    Whole global batches, in order; where that leaves a remainder, it and the last whole batch are
    shared by two batches, since a batch of one sample or two would disturb batch statistics.
    """

    def __init__(self, before: int, position: int, stop: int, size: int, world: int) -> None:
        span, left = size * world, stop - position
        whole, remainder = divmod(left, span)
        sizes = (whole, 0, 0)
        if remainder and whole:
            shared = span + remainder
            sizes = (whole - 1, shared - shared // 2, shared // 2)
        elif remainder:
            sizes = (0, remainder, 0)
        self.before, self.position, self.stop = before, position, stop
        self._span, self._world = span, world
        self._whole, self._last = sizes[0], [size for size in sizes[1:] if size]
        self.total = before + self._whole + len(self._last)

    def edge(self, batch: int) -> int:
        """Where batch number ``batch`` begins."""
        done = min(max(batch - self.before, 0), self.total - self.before)
        full = min(done, self._whole)
        return self.position + full * self._span + sum(self._last[: done - full])

    def places(self, batch: int, rank: int) -> list[int]:
        """Positions of one rank in a batch, and ``FILLER``."""
        first, end = self.edge(batch), self.edge(batch + 1)
        each = -(-(end - first) // self._world)
        mine = range(first + rank * each, first + (rank + 1) * each)
        return [place if place < end else FILLER for place in mine]
