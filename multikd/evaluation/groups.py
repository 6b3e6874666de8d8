"""One metric, group by group: an average must not hide what one group loses.

Groups are the values of a metadata column (skin tone, camera, site, age band …). The gap is the
best group minus the worst; the worst group is what group-robust training reports (Sagawa et al.,
"Distributionally Robust Neural Networks for Group Shifts", ICLR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from multikd.errors import unknown_name

Rows = npt.NDArray[np.float64]
Statistic = Callable[[Rows], float]

# Below so many images a group's score says little; it is shown, and never named best or worst.
SMALL_GROUP = 10


@dataclass(frozen=True)
class GroupScore:
    """A metric over the images of one group.

    Attributes:
        value: of the metric; None where it is not defined for these images.
        low: lower end of the bootstrap interval over the group's images, or None.
        high: upper end, or None.
        count: images.
        small: fewer than asked for, so it is left out of worst, best and gap.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    small: bool


@dataclass(frozen=True)
class GroupScores:
    """A metric by group.

    Attributes:
        groups: value of the column → score, in sorted order.
        worst: name of the worst group that is not small, or None.
        best: name of the best, or None.
        gap: absolute difference of the two, or None where fewer than two groups are large enough.
        gap_low: lower end of its bootstrap interval.
        gap_high: upper end.
        confidence: of every interval.
        missing: images without a value in the column, left out.
    """

    groups: Mapping[str, GroupScore]
    worst: str | None
    best: str | None
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    confidence: float
    missing: int

    def details(self) -> dict[str, Any]:
        """JSON values for ``TaskResult.details["groups"][column]``."""
        return {
            "groups": {name: vars(score).copy() for name, score in self.groups.items()},
            **{
                name: getattr(self, name)
                for name in (
                    *("worst", "best", "gap", "gap_low", "gap_high", "confidence", "missing"),
                )
            },
        }


def group_scores(
    per_sample: npt.ArrayLike,
    values: Sequence[str],
    *,
    statistic: Statistic | None = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    resamples: int = 1000,
    small: int = SMALL_GROUP,
    seed: int = 0,
) -> GroupScores:
    """A metric for every group, the worst one, and the gap, with percentile bootstrap intervals.

    Images are drawn with replacement within each group (sizes stay as they are). The gap is
    |worst − best| of the groups that are worst and best on the data as it is; its interval is of
    that difference, with its sign kept, so that it reaches below 0 where resamples change which of
    the two is better. Naming the extremes of G groups is itself a choice that favours a gap: with
    many small groups even equal ones show one, which the interval does not correct for.

    Args:
        per_sample: ``(M,)`` or ``(M, …)``, contribution of each image (as in ``TaskResult``).
        values: M values of the column; an empty one is left out and counted.
        statistic: rows → metric; by default their mean. One that raises ValueError or
            ZeroDivisionError, or gives NaN, for some rows is undefined there.
        higher_is_better: which end is worst.
        confidence: of intervals, between 0 and 1.
        resamples: bootstrap draws.
        small: a group with fewer images is flagged and never worst or best.
        seed: of the draws.

    Raises:
        ValueError: lengths that differ, no images with a value, or settings out of range.

    Example:
        >>> scores = group_scores([1, 1, 0, 1, 0, 0], list("aaabbb"), small=1)
        >>> scores.worst, round(scores.gap, 3)
        ('b', 0.333)
    """
    rows = np.asarray(per_sample, dtype=np.float64)
    if rows.ndim < 1 or len(rows) != len(values):
        raise ValueError(
            f"scores by group need one value of the column for each image, received {len(values)} "
            f"values for {len(rows) if rows.ndim else 'no'} images"
        )
    if not 0 < confidence < 1 or resamples < 1 or small < 1:
        raise ValueError(
            "scores by group need a confidence between 0 and 1, and at least 1 for resamples and "
            f"small, received {confidence}, {resamples} and {small}"
        )
    column = np.array([str(value).strip() for value in values], dtype=object)
    names = sorted(set(column) - {""})
    if not names:
        raise ValueError("no image has a value in the column, so there are no groups to score")
    generator = np.random.default_rng(seed)
    scores: dict[str, GroupScore] = {}
    draws: dict[str, Rows] = {}
    for name in names:
        members = rows[column == name]
        value = _value(members, statistic)
        draws[name] = _bootstrap(members, statistic, resamples, generator)
        low, high = _ends(draws[name], confidence)
        if value is None:
            low = high = None
        scores[name] = GroupScore(value, low, high, len(members), len(members) < small)
    judged = [n for n in names if not scores[n].small and scores[n].value is not None]
    # Of equal groups the first by name is worst, and the last best.
    order = sorted(judged, key=lambda n: (scores[n].value or 0.0) * (1 if higher_is_better else -1))
    worst, best = (order[0], order[-1]) if len(order) > 1 else (None, None)
    gap = gap_low = gap_high = None
    if worst is not None and best is not None:
        sign = 1.0 if higher_is_better else -1.0
        difference = sign * (draws[best] - draws[worst])
        gap = sign * ((scores[best].value or 0.0) - (scores[worst].value or 0.0))
        gap_low, gap_high = _ends(difference, confidence)
    missing = int((column == "").sum())
    return GroupScores(scores, worst, best, gap, gap_low, gap_high, confidence, missing)


def metadata_column(metadata: Mapping[str, Sequence[str]], name: str, data: str) -> Sequence[str]:
    """The column ``name`` of a data set's metadata.

    Raises:
        ValueError: there is none; the message offers the nearest.
    """
    if name not in metadata:
        if not metadata:
            raise ValueError(
                f"scores by {name!r} need a metadata column, and {data} has none: give a metadata "
                "table in the task file"
            )
        raise unknown_name(f"metadata column of {data}", name, metadata)
    return metadata[name]


def _value(rows: Rows, statistic: Statistic | None) -> float | None:
    try:
        value = float(rows.mean() if statistic is None else statistic(rows))
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def _bootstrap(
    rows: Rows, statistic: Statistic | None, resamples: int, generator: np.random.Generator
) -> Rows:
    """The metric of ``resamples`` draws of ``rows``, NaN where it is undefined."""
    if statistic is None and rows.ndim == 1:
        # How often each distinct value is drawn decides the mean: for right-or-wrong that is two
        # counts, whatever the number of images.
        distinct, counts = np.unique(rows, return_counts=True)
        if len(distinct) <= 32:
            drawn = generator.multinomial(len(rows), counts / len(rows), size=resamples)
            means: Rows = drawn @ distinct / len(rows)
            return means
    found = np.full(resamples, np.nan)
    for i in range(resamples):
        value = _value(rows[generator.integers(0, len(rows), len(rows))], statistic)
        if value is not None:
            found[i] = value
    return found


def _ends(draws: Rows, confidence: float) -> tuple[float | None, float | None]:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return None, None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
