"""Weighted k-nearest-neighbour classification over cosine similarity.

The probe of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(CVPR 2018, section 3.4), with the k = 20 and τ = 0.07 that DINO and UNIC report.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Up to so many products the similarities are computed in float64; a larger bank gets float32.
_FLOAT64_PRODUCTS = 2**38


class Neighbours(NamedTuple):
    """The k nearest bank rows of every query, nearest first; equally near ones by index."""

    indices: Tensor  # int64 (B, k)
    similarities: Tensor  # (B, k) cosine in [-1, 1]


def nearest_neighbours(bank: Tensor, queries: Tensor, k: int, chunk: int = 256) -> Neighbours:
    """The ``k`` rows of ``bank`` with the largest cosine similarity to every query, exactly.

    Similarities are float64 while M·B·D is at most 2³⁸ (and the device has float64), else
    float32. A row of zeros has similarity 0 to everything.

    Args:
        bank: ``(M, D)``, any floating dtype.
        queries: ``(B, D)``.
        k: neighbours, from 1 to M.
        chunk: queries compared at once; memory is about ``chunk · M`` similarities.

    Returns:
        Indices ``(B, k)`` and similarities ``(B, k)`` on the device of ``bank``. Of several rows
        equally near, those with the lowest index are taken.

    Raises:
        ValueError: shapes that do not fit, k out of range, or values that are not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            "bank and queries must be (M, D) and (B, D) of one width, received "
            f"{tuple(bank.shape)} and {tuple(queries.shape)}"
        )
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(
            f"k must be from 1 to the {bank.shape[0]} rows of the bank, received {k}: "
            "use a smaller k or a larger bank"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, received {chunk}")
    for name, rows in (("bank", bank), ("queries", queries)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the features of the {name} must be finite, received NaN or infinity")
    products = bank.shape[0] * queries.shape[0] * bank.shape[1]
    small = products <= _FLOAT64_PRODUCTS and bank.device.type != "mps"
    dtype = torch.float64 if small else torch.float32
    bank_t = _unit(bank, dtype).T
    parts = [
        _top(_unit(queries[start : start + chunk].to(bank.device), dtype) @ bank_t, k)
        for start in range(0, len(queries), chunk)
    ]
    if not parts:
        empty = queries.new_empty((0, k), dtype=dtype)
        return Neighbours(empty.to(torch.int64), empty)
    return Neighbours(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.similarities for part in parts]),
    )


def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 256,
) -> Tensor:
    """Share of the votes of every class: ``Σ exp(sim/τ)`` over the neighbours of that class.

    Args:
        bank: ``(M, D)`` features of the labelled images.
        labels: int64 ``(M,)`` in [0, K).
        queries: ``(B, D)``.
        k: neighbours that vote.
        temperature: τ above 0; small lets the nearest decide, large makes all votes equal.
        num_classes: K; by default the largest label + 1.
        chunk: queries compared at once.

    Returns:
        ``(B, K)`` non-negative, rows summing to 1, in the dtype of the similarities.

    Raises:
        ValueError: see :func:`nearest_neighbours`; also labels out of range, or τ ≤ 0.
    """
    if labels.shape != bank.shape[:1]:
        raise ValueError(
            f"labels must be ({bank.shape[0]},), one for every row of the bank, "
            f"received {tuple(labels.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, received {temperature}")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels of the bank must be from 0 to {classes - 1}, received {low} to {high}: "
            "leave unlabelled images out of the bank"
        )
    found = nearest_neighbours(bank, queries, k, chunk)
    # Relative to the nearest: the shares are the same, and no small τ overflows.
    votes = ((found.similarities - found.similarities[:, :1]) / temperature).exp()
    neighbour_labels = labels.to(found.indices.device)[found.indices]
    totals = votes.new_zeros((len(votes), classes)).scatter_add_(1, neighbour_labels, votes)
    return totals / totals.sum(dim=1, keepdim=True)


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 256,
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
    return knn_scores(bank, labels, queries, k, temperature, num_classes, chunk).argmax(dim=1)


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(rows.detach().to(dtype), dim=1)


def _top(similarities: Tensor, k: int) -> Neighbours:
    """Top k of every row; ties go to the lower index, which ``topk`` alone does not promise."""
    bound = similarities.topk(k, dim=1, sorted=True).values[:, -1:]
    candidates = similarities >= bound
    tied = candidates.sum(dim=1) > k
    if bool(tied.any()):
        # Rare (duplicates in the bank, collapsed features): a stable sort keeps index order.
        rows = similarities[tied]
        kept = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
        candidates[tied] = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, kept, True)
    indices = candidates.nonzero()[:, 1].view(len(similarities), k)
    values = similarities.gather(1, indices)
    order = values.sort(dim=1, descending=True, stable=True).indices
    return Neighbours(indices.gather(1, order), values.gather(1, order))
