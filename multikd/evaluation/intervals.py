"""How sure a measured accuracy, or a difference of two, is.

Two encoders scored on the same images are compared pair by pair: what both get right or both get
wrong says nothing of their difference, and leaving it out makes the interval honest and narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """An accuracy with its Wilson score interval; everything in 0–1."""

    value: float
    standard_error: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PairedInterval:
    """Accuracy of A minus accuracy of B on the same images.

    Attributes:
        difference: in −1 to 1; above 0 where A is better.
        standard_error: of the difference.
        low: lower end of the bootstrap interval.
        high: upper end.
        accuracy_a: in 0–1.
        accuracy_b: in 0–1.
        count: images.
        confidence: of the interval.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    accuracy_a: float
    accuracy_b: float
    count: int
    confidence: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves 0 out, so that the sign of the difference is known."""
        return self.low > 0 or self.high < 0


class MeanInterval(NamedTuple):
    """Mean of repeated measurements and its two-sided Student-t interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """``mean ± t_{n−1} · s/√n`` of independent repetitions.

    Raises:
        ValueError: fewer than two values, or a confidence out of range.
    """
    if len(values) < 2 or not 0 < confidence < 1:
        raise ValueError(
            "an interval over repetitions needs at least two, and a confidence between 0 and 1, "
            f"received {len(values)} and {confidence}"
        )
    from scipy.stats import t

    rows = np.asarray(values, dtype=np.float64)
    half = float(t.ppf(0.5 + confidence / 2, len(rows) - 1) * rows.std(ddof=1)) / math.sqrt(
        len(rows)
    )
    mean = float(rows.mean())
    return MeanInterval(mean, mean - half, mean + half)


def accuracy_interval(correct: Tensor, confidence: float = 0.95) -> Accuracy:
    """Accuracy and its interval after Wilson (1927), which stays inside 0–1.

    Args:
        correct: bool ``(B,)``, whether each image was answered rightly.
        confidence: between 0 and 1.

    Raises:
        ValueError: no images, a shape other than ``(B,)``, or a confidence out of range.
    """
    _check(correct, confidence)
    n = len(correct)
    p = float(correct.to(torch.float64).mean())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At 0 and 1 the bound is the accuracy itself, up to rounding.
    low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
    return Accuracy(p, math.sqrt(p * (1 - p) / n), low, high, n)


def paired_interval(
    correct_a: Tensor,
    correct_b: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedInterval:
    """Percentile bootstrap of the difference of two accuracies over the same images.

    The difference of one image is −1, 0 or 1, so that drawing images with replacement is drawing
    three counts from a multinomial: that is what is done, with the same distribution.

    Args:
        correct_a: bool ``(B,)``, whether A answered each image rightly.
        correct_b: bool ``(B,)``, the same images in the same order.
        confidence: between 0 and 1.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: unequal or empty inputs, or a setting out of range.
    """
    _check(correct_a, confidence)
    if correct_a.shape != correct_b.shape:
        raise ValueError(
            "a paired interval needs both encoders' answers to the same images, received "
            f"{tuple(correct_a.shape)} and {tuple(correct_b.shape)}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, received {resamples}")
    a, b = (c.detach().cpu().to(torch.bool).numpy() for c in (correct_a, correct_b))
    n = len(a)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    counts = np.array([only_a, only_b, n - only_a - only_b])
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    differences = (draws[:, 0] - draws[:, 1]) / n
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    mean = (only_a - only_b) / n
    variance = max(0.0, (only_a + only_b) / n - mean * mean)
    return PairedInterval(
        difference=mean,
        standard_error=math.sqrt(variance / n),
        low=float(low),
        high=float(high),
        accuracy_a=float(a.mean()),
        accuracy_b=float(b.mean()),
        count=n,
        confidence=confidence,
    )


def _check(correct: Tensor, confidence: float) -> None:
    if correct.ndim != 1 or len(correct) == 0:
        raise ValueError(
            f"expected one right-or-wrong an image, (B,) with B > 0, received "
            f"{tuple(correct.shape)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, received {confidence}")
