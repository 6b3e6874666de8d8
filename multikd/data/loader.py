"""The loader that Lightning sees: a torch DataLoader with the sampler's epoch and fault counting.

It is deliberately no DataLoader itself. Lightning re-creates DataLoaders under DDP (with
``use_distributed_sampler``) and in prediction, around samplers of its own; this one, which has
already taken its rank's slice, is left alone, and ``set_epoch`` still reaches it through
``batch_sampler.sampler``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from multikd.data.faults import FaultCounter
from multikd.types import Batch


class EpochSampler(Protocol):
    """What tells the loader its epoch: Lightning reaches ``set_epoch`` through ``sampler``."""

    @property
    def sampler(self) -> EpochSampler:
        """Itself."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""

    def __len__(self) -> int:
        """Batches in an epoch."""


class ShardLoader:
    """Iterates the batches of one rank; ``len()`` is the same on every rank.

    Args:
        loader: yields ``Batch``.
        batch_sampler: whose ``set_epoch`` is called.
        faults: counts the batches' faults; raises past its rate.
        fixed_epoch: ignore ``set_epoch`` (Lightning's ``overfit_batches``).
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        batch_sampler: EpochSampler,
        faults: FaultCounter,
        fixed_epoch: bool = False,
    ) -> None:
        self.loader = loader
        self.faults = faults
        if not fixed_epoch:
            self.batch_sampler = batch_sampler
        self.fixed_epoch = fixed_epoch
        self._sampler = batch_sampler
        self._skipped = 0

    @property
    def places(self) -> EpochSampler:
        """Where the batches' places come from. (Lightning would find a ``sampler``.)"""
        return self._sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the place. That it is here tells Lightning so."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""

    def skip(self, batches: int) -> None:
        """Let the next iteration read so many batches and throw them away (plain streams)."""
        self._skipped = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (for loops other than Lightning's)."""
        if (sampler := getattr(self, "batch_sampler", None)) is not None:
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the workers start with the first batch, after set_epoch, not with iter().
        skipped, self._skipped = self._skipped, 0
        for number, batch in enumerate(self.loader):
            if number < skipped:
                continue
            self.faults.add(batch)
            yield batch

    def close(self) -> None:
        """Stop persistent workers."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self.loader._iterator = None


def identity(batch: Batch) -> Batch:
    """Batches come whole from the data set: there is nothing to collate."""
    return batch
