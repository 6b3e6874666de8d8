"""Coverage and accuracy of pseudo-labels at several thresholds, summed shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def thresholds_with(chosen: float) -> tuple[float, ...]:
    """The grid of the report, the chosen threshold in it."""
    return tuple(sorted({*GRID, chosen}))


@dataclass
class Tally:
    """Counts at each threshold.

    Attributes:
        thresholds: ascending.
        images: images seen.
        unreadable: images that could not be read.
        kept: images of at least that confidence, for each threshold.
        labelled: those of them whose true class is known.
        right: those of them where it is the label.
        classes: labels of each class at the chosen threshold.
    """

    thresholds: tuple[float, ...]
    images: int = 0
    unreadable: int = 0
    kept: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    @staticmethod
    def of(
        probabilities: NDArray[np.float32],
        truth: NDArray[np.int64],
        thresholds: Sequence[float],
        chosen: float,
        unreadable: int = 0,
    ) -> Tally:
        """Count ``(B, K)`` probabilities with true classes ``(B,)``, −1 where there is none."""
        confidence, label = probabilities.max(axis=1), probabilities.argmax(axis=1)
        known, right = truth >= 0, truth == label
        over = [confidence >= t for t in thresholds]
        kept = label[confidence >= chosen]
        return Tally(
            tuple(thresholds),
            len(probabilities),
            unreadable,
            [int(o.sum()) for o in over],
            [int((o & known).sum()) for o in over],
            [int((o & right).sum()) for o in over],
            np.bincount(kept, minlength=probabilities.shape[1]).tolist(),
        )

    def __add__(self, other: Tally) -> Tally:
        if not self.images:
            return Tally(**{**vars(other), "unreadable": self.unreadable + other.unreadable})
        if not other.images:
            return Tally(**{**vars(self), "unreadable": self.unreadable + other.unreadable})

        def both(a: list[int], b: list[int]) -> list[int]:
            return [x + y for x, y in zip(a, b, strict=True)]

        return Tally(
            self.thresholds,
            self.images + other.images,
            self.unreadable + other.unreadable,
            both(self.kept, other.kept),
            both(self.labelled, other.labelled),
            both(self.right, other.right),
            both(self.classes, other.classes),
        )

    def to_json(self) -> dict[str, Any]:
        """For the log."""
        return {**vars(self), "thresholds": list(self.thresholds)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Tally:
        """Back from the log.

        Raises:
            TypeError: other fields.
        """
        return Tally(**{**values, "thresholds": tuple(values["thresholds"])})

    def rows(self) -> list[dict[str, Any]]:
        """(threshold, coverage, accuracy or None) of the report; shares from 0 to 1."""
        return [
            {
                "threshold": t,
                "kept": kept,
                "coverage": kept / max(1, self.images),
                "labelled": known,
                "accuracy": right / known if known else None,
            }
            for t, kept, known, right in zip(
                self.thresholds, self.kept, self.labelled, self.right, strict=True
            )
        ]
