"""Which views a step shows, and how many images of each: several resolutions in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from multikd.data.counters import Stream, uniforms
from multikd.errors import unknown_name

ViewMode = Literal["together", "alternate"]


@dataclass(frozen=True)
class ViewSchedule:
    """Which of ``count`` views come in a step, by the number of the batch in its epoch.

    Attributes:
        count: training views.
        mode: ``together``: all of them in every step; ``alternate``: one of them, drawn by (seed,
            epoch, batch), so alike on every rank.
        shares: ``alternate``: how often each comes, relative to each other; None: equally often.
        images: how many images of a rank's batch each view shows; None, or None for one: all.

    Raises:
        ValueError: settings that do not fit one another or the number of views.
    """

    count: int
    mode: ViewMode = "together"
    shares: tuple[float, ...] | None = None
    images: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(ViewMode):
            raise unknown_name("view_mode", self.mode, get_args(ViewMode))
        for name, values in (("view_shares", self.shares), ("view_images", self.images)):
            if values is not None and len(values) != self.count:
                raise ValueError(
                    f"{name} has {len(values)} entries and train_views {self.count}: give one for "
                    "each view"
                )
        if self.shares is not None and self.mode == "together":
            raise ValueError(
                "view_shares say how often views come in turn: set view_mode to alternate"
            )
        if self.shares is not None and not all(0 < s < math.inf for s in self.shares):
            raise ValueError(f"view_shares must be above 0, received {list(self.shares)}")
        if any(n is not None and n < 1 for n in self.images or ()):
            raise ValueError(
                f"view_images must be 1 or more, or null, received {list(self.images or ())}"
            )
        if self.mode == "alternate" and self.count < 2:
            raise ValueError(
                "view_mode=alternate needs two or more views: set train_views to a list of them"
            )

    def views(self, seed: int, epoch: int, batch: int) -> tuple[int, ...]:
        """The views of a batch, by their numbers."""
        if self.mode == "together":
            return tuple(range(self.count))
        shares = self.shares or (1.0,) * self.count
        draw = float(uniforms(1, seed, Stream.VIEW, epoch, batch)[0]) * sum(shares)
        for view, share in enumerate(shares[:-1]):
            if draw < share:
                return (view,)
            draw -= share
        return (self.count - 1,)

    def shown(self, view: int, batch_size: int) -> int:
        """How many images of a batch of so many a view shows."""
        most = None if self.images is None else self.images[view]
        return batch_size if most is None else min(most, batch_size)

    def settings(self) -> dict[str, str]:
        """What the content of batches depends on, as far as it is not the default."""
        if self.mode == "together" and self.images is None:
            return {}
        return {"views": f"{self.mode}, shares {self.shares}, images {self.images}"}


def schedule(
    count: int,
    mode: ViewMode,
    shares: Sequence[float] | None,
    images: Sequence[int | None] | None,
) -> ViewSchedule:
    """From the settings of a data module; see ``ViewSchedule``."""
    return ViewSchedule(
        count,
        mode,
        None if shares is None else tuple(shares),
        None if images is None else tuple(images),
    )
