"""What an encoder kept of the best teacher, task by task, and how sure that is.

The share kept is ``own / best teacher`` (``best teacher / own`` where less is better), so that 1 is
level and more is better. Intervals are percentile bootstraps over test images (Efron & Tibshirani,
"An Introduction to the Bootstrap", 1993, chapter 13), paired: the images of one draw are the same
for all encoders, and for all tasks on the same data set, so that what is hard for everybody says
nothing of a difference.

**The best teacher is fixed**: it is the one that is best on the test images as they are, in every
draw. The interval is of the comparison with that named teacher. Being chosen on the same images,
its score is, if anything, too high, which makes the share kept, if anything, too low.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]
Statistic = Callable[[Rows], float]

RESAMPLES = 1000
CONFIDENCE = 0.95
# Counts of draws × images held at once.
_CHUNK = 2**22


@dataclass(frozen=True)
class Measured:
    """A task's value of one encoder, with what can be resampled.

    Attributes:
        value: of the metric.
        rows: one an image ``(M, …)``, so that ``statistic`` of them is ``value``; None: no
            interval.
        statistic: rows → value; None: their mean. One with a method ``weighted(rows, times (R, M))
            → (R,)`` is asked for all draws at once, ``times`` being how often each image was drawn.
    """

    value: float
    rows: Rows | None = None
    statistic: Statistic | None = None


@dataclass(frozen=True)
class Kept:
    """Share of the best teacher's score, and difference to it (above 0 where own is larger).

    None where it is not defined: no interval, a score of 0 or less, or no teacher.
    """

    share: float | None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True)
class MatrixRow:
    """One task.

    Attributes:
        best_teacher: None where no teacher was scored.
        best_value: its value.
        kept: every other encoder than a teacher → what it kept.
        values: encoder → interval of its value, where it has one.
        draws: encoder → share kept in every draw ``(R,)``, where it was drawn.
    """

    best_teacher: str | None
    best_value: float | None
    kept: Mapping[str, Kept]
    values: Mapping[str, tuple[float, float]]
    draws: Mapping[str, Rows] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class MeanKept:
    """Mean share over the tasks that have one.

    Attributes:
        share: None where no task has one.
        low: of the interval; tasks without one count as exact. None where no task has one.
        high: of the interval.
        tasks: how many are in the mean.
        drawn: how many of them were resampled.
    """

    share: float | None
    low: float | None
    high: float | None
    tasks: int
    drawn: int


@dataclass(frozen=True)
class ParetoPoint:
    """An encoder by score (more is better) and cost (less is better)."""

    encoder: str
    score: float
    cost: float
    on_front: bool


def matrix_row(
    measured: Mapping[str, Measured],
    teachers: Sequence[str],
    *,
    higher_is_better: bool = True,
    data: str = "",
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> MatrixRow:
    """One row of the retention matrix.

    Args:
        measured: encoder → value and rows.
        teachers: which of them are teachers; of equally good ones the first is the best.
        higher_is_better: whether more is better.
        data: the data set; tasks on one data set with as many test images see the same draws.
        resamples: bootstrap draws.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: settings out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "a retention matrix needs at least 1 resample and a confidence between 0 and 1, "
            f"received {resamples} and {confidence}"
        )
    draws = bootstrap(measured, resamples, [seed, zlib.crc32(data.encode())])
    values = {
        name: ends
        for name, drawn in draws.items()
        if (ends := interval(drawn, confidence)) is not None
    }
    sign = 1.0 if higher_is_better else -1.0
    scored = [name for name in teachers if name in measured]
    best = max(scored, key=lambda name: sign * measured[name].value, default=None)
    kept: dict[str, Kept] = {}
    shares: dict[str, Rows] = {}
    for name, own in measured.items():
        if name in teachers:
            continue
        if best is None:
            kept[name] = Kept(None)
            continue
        reference = measured[best].value
        share = _shares(np.array([own.value]), np.array([reference]), higher_is_better)[0]
        difference = own.value - reference
        ends = gap = None
        # Only what has the same images can be paired.
        if name in draws and best in draws and _count(own) == _count(measured[best]):
            drawn = _shares(draws[name], draws[best], higher_is_better)
            if math.isfinite(share):
                ends, shares[name] = interval(drawn, confidence), drawn
            gap = interval(draws[name] - draws[best], confidence)
        low, high = ends or (None, None)
        gap_low, gap_high = gap or (None, None)
        kept[name] = Kept(
            float(share) if math.isfinite(share) else None, low, high, difference, gap_low, gap_high
        )
    return MatrixRow(best, None if best is None else measured[best].value, kept, values, shares)


def mean_kept(rows: Sequence[MatrixRow], encoder: str, confidence: float = CONFIDENCE) -> MeanKept:
    """Mean share of an encoder over tasks, each task counting alike.

    The draws of different rows are combined one by one, so that tasks on the same test images are
    resampled together.
    """
    shares: list[float] = []
    total: Rows | None = None
    exact = 0.0
    drawn = 0
    for row in rows:
        share = row.kept[encoder].share if encoder in row.kept else None
        if share is None:
            continue
        shares.append(share)
        if encoder in row.draws:
            part = row.draws[encoder]
            total = part.copy() if total is None else total + part
            drawn += 1
        else:
            exact += share
    if not shares:
        return MeanKept(None, None, None, 0, 0)
    ends = None if total is None else interval((total + exact) / len(shares), confidence)
    low, high = ends or (None, None)
    return MeanKept(math.fsum(shares) / len(shares), low, high, len(shares), drawn)


def pareto(scores: Mapping[str, float], costs: Mapping[str, float]) -> list[ParetoPoint]:
    """Encoders with a score and a cost, cheapest first.

    On the front are those for which no other is at least as good and as cheap, and better in one.
    """
    names = sorted((n for n in scores if n in costs), key=lambda n: (costs[n], -scores[n]))
    return [
        ParetoPoint(
            name,
            scores[name],
            costs[name],
            not any(
                scores[other] >= scores[name]
                and costs[other] <= costs[name]
                and (scores[other] > scores[name] or costs[other] < costs[name])
                for other in names
            ),
        )
        for name in names
    ]


def bootstrap(
    measured: Mapping[str, Measured], resamples: int, seed: int | Sequence[int]
) -> dict[str, Rows]:
    """Value of every encoder in every draw ``(R,)``; NaN where a draw has none.

    Encoders with as many rows see the same draws, in which image i is the same image for all.
    """
    drawn: dict[str, Rows] = {}
    for count in sorted({_count(m) for m in measured.values() if m.rows is not None}):
        names = [n for n, m in measured.items() if m.rows is not None and _count(m) == count]
        if count:
            drawn |= _draw({n: measured[n] for n in names}, count, resamples, seed)
    return drawn


def interval(draws: Rows, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Percentile interval of the finite draws; None where half of them are not finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) * 2 <= len(draws):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _draw(
    measured: Mapping[str, Measured], count: int, resamples: int, seed: int | Sequence[int]
) -> dict[str, Rows]:
    means = [n for n, m in measured.items() if m.statistic is None and _rows(m).ndim == 1]
    stacked = np.stack([_rows(measured[n]) for n in means], axis=1) if means else None
    weighted = [n for n, m in measured.items() if hasattr(m.statistic, "weighted")]
    found = {name: np.full(resamples, np.nan) for name in measured}
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        where = slice(start, start + size)
        images = generator.integers(0, count, (size, count))
        if stacked is not None or weighted:
            # How often each image was drawn: a mean is a product with that.
            offset = images + count * np.arange(size)[:, None]
            times = np.bincount(offset.ravel(), minlength=size * count).reshape(size, count)
            times = times.astype(np.float64)
            values = times @ stacked / count if stacked is not None else times[:, :0]
            for column, name in enumerate(means):
                found[name][where] = values[:, column]
            for name in weighted:
                statistic: Any = measured[name].statistic
                found[name][where] = statistic.weighted(_rows(measured[name]), times)
        for name in set(measured) - {*means, *weighted}:
            rows, statistic = _rows(measured[name]), measured[name].statistic
            for i in range(size):
                found[name][start + i] = _value(rows[images[i]], statistic)
    return found


def _value(rows: Rows, statistic: Statistic | None) -> float:
    try:
        return float(np.mean(rows) if statistic is None else statistic(rows))
    except (ValueError, ZeroDivisionError):  # not defined for this draw, for instance no positives
        return math.nan


def _shares(own: Rows, best: Rows, higher_is_better: bool) -> Rows:
    """Share kept; NaN where the divisor is not above 0 or the result would be negative."""
    above, below = (own, best) if higher_is_better else (best, own)
    defined = (below > 0) & (above >= 0)
    return np.where(defined, above / np.where(defined, below, 1.0), np.nan)


def _rows(measured: Measured) -> Rows:
    if measured.rows is None:
        raise ValueError("this score has no rows to draw from")
    return np.asarray(measured.rows, dtype=np.float64)


def _count(measured: Measured) -> int:
    return 0 if measured.rows is None else len(measured.rows)
