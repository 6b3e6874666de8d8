"""When a search ends, and which size it answers with: pure functions of the scores."""

from __future__ import annotations

from collections.abc import Sequence


def levelled_off(scores: Sequence[float], tolerance: float, patience: int) -> bool:
    """Whether the last ``patience`` sizes have each failed to raise the best before by a tolerance.

    Args:
        scores: of the sizes so far, from the smallest up; more is better.
        tolerance: a gain below it is none.
        patience: sizes in a row.
    """
    waited, best = 0, float("-inf")
    for score in scores:
        waited = 0 if score - best >= tolerance else waited + 1
        best = max(best, score)
    return waited >= patience


def smallest_good(scores: Sequence[float], tolerance: float) -> int:
    """Place of the smallest size whose score is less than a tolerance below the best.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("there is no size to choose from: none was trained")
    best = max(scores)
    return next(i for i, score in enumerate(scores) if best - score < tolerance)
