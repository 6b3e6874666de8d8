"""Figures of a classifier's answers, computed by torchmetrics.

Shapes: M images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of images whose label is among the ``k`` largest scores.

    Args:
        scores: ``(M, K)``.
        labels: int64 ``(M,)`` in [0, K).
        k: from 1 to K.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    _check(scores, labels)
    classes = scores.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be from 1 to the {classes} classes, received {k}")
    if classes == 1:
        return 1.0
    return float(multiclass_accuracy(scores, labels, classes, average="micro", top_k=k))


def per_class_accuracy(answers: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Share of each class's images that were answered rightly; None for a class without images.

    Args:
        answers: int64 ``(M,)`` in [0, K).
        labels: int64 ``(M,)`` in [0, K).
        classes: K.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    counts = confusion_matrix(answers, labels, classes).to(torch.float64)
    images = counts.sum(dim=1)
    right = counts.diagonal()
    return [float(r / n) if n > 0 else None for r, n in zip(right, images, strict=True)]


def mean_class_accuracy(answers: Tensor, labels: Tensor, classes: int) -> float:
    """Mean over the classes that have images of the share answered rightly (balanced accuracy)."""
    found = [a for a in per_class_accuracy(answers, labels, classes) if a is not None]
    return sum(found) / len(found)


def confusion_matrix(answers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 ``(K, K)`` counts: truth × answer.

    Raises:
        ValueError: shapes that do not fit, no images, or classes out of range.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    if answers.shape != labels.shape or answers.ndim != 1 or not len(answers):
        raise ValueError(
            "answers and labels must both be (M,) with M > 0, received "
            f"{tuple(answers.shape)} and {tuple(labels.shape)}"
        )
    for name, values in (("answers", answers), ("labels", labels)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must be from 0 to {classes - 1}, received {low} to {high}")
    if classes == 1:
        return torch.tensor([[len(answers)]])
    counts: Tensor = multiclass_confusion_matrix(answers, labels, classes)
    return counts.to(torch.int64)


def average_precisions(scores: Tensor, targets: Tensor) -> list[float | None]:
    """Average precision of every class, ``Σ_n (R_n − R_{n−1}) P_n``; None where none is positive.

    Args:
        scores: ``(M, K)``, larger is surer; any range.
        targets: ``(M, K)`` of 0 and 1.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    from torchmetrics.functional.classification import binary_average_precision

    if scores.shape != targets.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(
            "scores and targets must both be (M, K) with M > 0, received "
            f"{tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError("targets of several labels an image must be 0 or 1")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite, received NaN or infinity")
    found: list[float | None] = []
    for column in range(scores.shape[1]):
        truth = targets[:, column].to(torch.int64)
        if not bool(truth.any()):
            found.append(None)
            continue
        # Ranks in place of scores: torchmetrics takes what lies outside 0–1 for logits, and its
        # sigmoid in float32 would make equal what is not.
        ranks = torch.unique(scores[:, column].to(torch.float64), return_inverse=True)[1]
        shares = ranks.to(torch.float64) / max(1, int(ranks.max()))
        found.append(float(binary_average_precision(shares, truth)))
    return found


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean of :func:`average_precisions` over the classes that have positives (macro mAP).

    Raises:
        ValueError: also where no class has any.
    """
    found = [value for value in average_precisions(scores, targets) if value is not None]
    if not found:
        raise ValueError("mean average precision needs a class with a positive image")
    return sum(found) / len(found)


def resampled_average_precision(scores: Tensor, targets: Tensor, times: Tensor) -> Tensor:
    """:func:`mean_average_precision` of many resamples of the same images, float64 ``(R,)``.

    Sorting once a class serves every resample, where the plain function would sort for each.

    Args:
        scores: ``(M, K)``.
        targets: ``(M, K)`` of 0 and 1.
        times: ``(R, M)``, how often each image was drawn.

    Returns:
        NaN for a resample in which no class has a positive.
    """
    times = times.to(torch.float64)
    total = times.new_zeros(len(times))
    defined = times.new_zeros(len(times))
    for column in range(scores.shape[1]):
        order = scores[:, column].argsort(descending=True, stable=True)
        ranked = scores[order, column]
        drawn = times[:, order]
        positives = (drawn * targets[order, column]).cumsum(dim=1)
        answered = drawn.cumsum(dim=1)
        # Equal scores are answered together.
        last = torch.ones(len(ranked), dtype=torch.bool)
        last[:-1] = ranked[:-1] != ranked[1:]
        positives, answered = positives[:, last], answered[:, last]
        gained = positives.diff(dim=1, prepend=positives.new_zeros(len(positives), 1))
        found = (gained * positives / answered.clamp(min=1)).sum(dim=1)
        every = positives[:, -1]
        total += torch.where(every > 0, found / every.clamp(min=1), 0.0)
        defined += (every > 0).to(torch.float64)
    return torch.where(defined > 0, total / defined.clamp(min=1), torch.nan)


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            "scores and labels must be (M, K) and (M,) with M > 0, received "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {scores.shape[1] - 1}, received {low} to {high}"
        )
