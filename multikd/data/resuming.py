"""Where an epoch was left, in samples: what a checkpoint keeps of the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LoaderState:
    """The place in the data, and what it depends on; plain numbers and strings.

    Attributes:
        epoch: the epoch under way, or the next one.
        batches: batches of it that were consumed. What workers had prefetched does not count.
        position: samples of it in those batches, over all ranks.
        stop: samples of it in all its batches (its incomplete last global batch is left out).
        batch_size: of each process.
        world: processes.
        accumulate: batches of an optimiser step.
        order: what the order of samples is a function of; name → value.
    """

    epoch: int
    batches: int
    position: int
    stop: int
    batch_size: int
    world: int
    accumulate: int
    order: dict[str, str]

    @property
    def inside(self) -> bool:
        """Whether the epoch is begun."""
        return self.batches > 0

    @property
    def step_samples(self) -> int:
        """Samples of an optimiser step."""
        return self.batch_size * self.world * self.accumulate

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LoaderState | None:
        """Read back; None for a checkpoint that has no such state.

        Raises:
            ValueError: it has one that is not whole.
        """
        if not state:
            return None
        names = [field.name for field in fields(cls)]
        numbers = [state.get(name) for name in names[:-1]]
        order = state.get("order")
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(order, dict):
            raise ValueError(
                "the checkpoint's place in the data can't be read: give another checkpoint of the "
                "run"
            )
        settings = dict(zip(names[:-1], numbers, strict=True))
        return cls(**settings, order={str(k): str(v) for k, v in order.items()})  # type: ignore[arg-type]

    def batches_before(self, batch_size: int, world: int, accumulate: int) -> int:
        """The number of batches to go on counting from, in batches of another layout.

        The same number where the global batch is the same. Otherwise whole optimiser steps, at
        least one (0 would begin the epoch anew, for the balancers), rounded down.
        """
        span = batch_size * world
        if not self.inside or span == self.batch_size * self.world:
            return self.batches
        return accumulate * max(1, self.position // (span * accumulate))

    def other_order(self, order: Mapping[str, str]) -> list[str]:
        """``name: kept → now`` of all that makes the order another one."""
        return [
            f"{name}: {self.order.get(name)} → {order.get(name)}"
            for name in sorted({*self.order, *order})
            if self.order.get(name) != order.get(name)
        ]
