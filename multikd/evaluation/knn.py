"""Weighted k-nearest-neighbour classification over cosine similarity.

The probe of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(CVPR 2018, section 3.4), with the k = 20 and τ = 0.07 that DINO and UNIC report.

Shapes: M rows of the bank, B queries, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multikd.evaluation.neighbours import Neighbours, nearest_neighbours

__all__ = ["Neighbours", "knn_predict", "knn_scores", "knn_votes", "nearest_neighbours"]

# Votes counted at once: (queries × classes) values.
_COUNTED = 2**22


def knn_votes(
    found: Neighbours, labels: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Share of the votes of every class among the first ``k`` of the neighbours found.

    One search with the largest k serves every smaller one, and every temperature.

    Args:
        found: of B queries, ``k`` or more neighbours each.
        labels: int64 ``(M,)`` in [0, K).
        k: neighbours that vote.
        temperature: τ of the votes ``exp(sim/τ)``, above 0.
        classes: K.

    Returns:
        float64 ``(B, K)``, non-negative, rows summing to 1.

    Raises:
        ValueError: k beyond the neighbours found, or τ ≤ 0.
    """
    if not 1 <= k <= found.indices.shape[1]:
        raise ValueError(f"k must be from 1 to {found.indices.shape[1]} neighbours, received {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, received {temperature}")
    similarities = found.similarities[:, :k]
    # Relative to the nearest: the shares are the same, and no small τ overflows.
    votes = ((similarities - similarities[:, :1]) / temperature).exp()
    of_class = labels.to(found.indices.device)[found.indices[:, :k]]
    totals = votes.new_zeros((len(votes), classes)).scatter_add_(1, of_class, votes)
    return totals / totals.sum(dim=1, keepdim=True)


def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    memory_mb: float = 512.0,
) -> Tensor:
    """Share of the votes of every class: ``Σ exp(sim/τ)`` over the neighbours of that class.

    Args:
        bank: ``(M, D)`` features of the labelled images.
        labels: int64 ``(M,)`` in [0, K).
        queries: ``(B, D)``.
        k: neighbours that vote.
        temperature: τ above 0; small lets the nearest decide, large makes all votes equal.
        num_classes: K; by default the largest label + 1.
        memory_mb: megabytes of working memory of the search.

    Returns:
        float64 ``(B, K)``, non-negative, rows summing to 1.

    Raises:
        ValueError: see :func:`nearest_neighbours`; also labels out of range, or τ ≤ 0.
    """
    if not temperature > 0:  # before the search, not after it
        raise ValueError(f"temperature must be above 0, received {temperature}")
    classes = class_count(bank, labels, num_classes)
    return knn_votes(
        nearest_neighbours(bank, queries, k, memory_mb), labels, k, temperature, classes
    )


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    memory_mb: float = 512.0,
) -> Tensor:
    """The class with the most votes for every query; of equal ones, the lowest index.

    Arguments and errors are those of :func:`knn_scores`.

    Returns:
        int64 ``(B,)`` on the device of ``bank``.

    Example:
        >>> import torch
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_predict(bank, torch.tensor([0, 1]), torch.tensor([[0.2, 0.9]]), k=1)
        tensor([1])
    """
    return knn_sweep(
        bank, labels, queries, [k], [temperature], num_classes=num_classes, memory_mb=memory_mb
    )[k, temperature]


def knn_sweep(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = (20,),
    temperatures: Sequence[float] = (0.07,),
    *,
    num_classes: int | None = None,
    memory_mb: float = 512.0,
) -> dict[tuple[int, float], Tensor]:
    """:func:`knn_predict` for every k and temperature, out of one search.

    Args:
        bank: ``(M, D)``.
        labels: int64 ``(M,)``.
        queries: ``(B, D)``.
        ks: values of k.
        temperatures: values of τ.
        num_classes: K; by default the largest label + 1.
        memory_mb: megabytes of working memory of the search.

    Returns:
        ``(k, τ)`` → int64 ``(B,)``.

    Raises:
        ValueError: see :func:`knn_scores`; also no k or no temperature.
    """
    if not ks or not temperatures:
        raise ValueError("k-NN needs at least one k and one temperature, received none")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, received {temperature}")
    classes = class_count(bank, labels, num_classes)
    found = nearest_neighbours(bank, queries, max(ks), memory_mb)
    return {
        (k, temperature): vote(found, labels, k, temperature, classes)
        for k in ks
        for temperature in temperatures
    }


def vote(found: Neighbours, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Class with the most votes, int64 ``(B,)``; some queries at a time where K is large."""
    step = max(1, _COUNTED // classes)
    parts = [
        knn_votes(Neighbours(indices, similarities), labels, k, temperature, classes).argmax(dim=1)
        for indices, similarities in zip(
            torch.split(found.indices, step), torch.split(found.similarities, step), strict=True
        )
    ]
    return torch.cat(parts)


def class_count(bank: Tensor, labels: Tensor, num_classes: int | None) -> int:
    """K, after checking that every row of the bank has a label in [0, K).

    Raises:
        ValueError: labels of another shape or out of range.
    """
    if labels.shape != bank.shape[:1]:
        raise ValueError(
            f"labels must be ({bank.shape[0]},), one for every row of the bank, "
            f"received {tuple(labels.shape)}"
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels of the bank must be from 0 to {classes - 1}, received {low} to {high}: "
            "leave unlabelled images out of the bank"
        )
    return classes
