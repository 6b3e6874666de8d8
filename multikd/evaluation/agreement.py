"""How alike two encoders see the same images.

Linear CKA after Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML
2019, eq. 3 with a linear kernel); mutual k-nearest neighbours after Huh et al., "The Platonic
Representation Hypothesis" (ICML 2024, section 2 and appendix A); cosine of what a student predicts
of a teacher against what the teacher says.

Shapes: M images, D_a and D_b widths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multikd.evaluation.neighbours import Neighbours, nearest_neighbours
from multikd.evaluation.task import EncodedSplit
from multikd.types import TokenType


def linear_cka(a: Tensor, b: Tensor) -> float:
    """``‖BᵀA‖²_F / (‖AᵀA‖_F · ‖BᵀB‖_F)`` of centred features, in 0–1; float64.

    Equal to ``HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L))`` with ``K = AAᵀ``, ``L = BBᵀ``. Not changed by
    rotating or scaling either side. With few images and wide features it is biased upward: use at
    least as many images as features.

    Args:
        a: ``(M, D_a)``.
        b: ``(M, D_b)``, the same images in the same order.

    Raises:
        ValueError: shapes that do not fit, fewer than two images, values that are not finite, or
            features that are the same for all images.
    """
    _check_pair(a, b)
    x, y = (rows.detach().cpu().to(torch.float64) for rows in (a, b))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    own_x, own_y = (float(_cross(rows, rows)) for rows in (x, y))
    if own_x <= 0 or own_y <= 0:
        raise ValueError("CKA is not defined where an encoder gives all images the same features")
    return float(_cross(x, y)) / math.sqrt(own_x * own_y)


def mutual_neighbours(a: Tensor, b: Tensor, k: int = 10) -> Tensor:
    """Share of each image's k nearest others on which both encoders agree; float64 ``(M,)``.

    ``|N_a(i) ∩ N_b(i)| / k`` with cosine similarity and the image itself left out. Two unrelated
    encoders have about ``k / (M − 1)``.

    Args:
        a: ``(M, D_a)``.
        b: ``(M, D_b)``, the same images in the same order.
        k: from 1 to M − 1.

    Raises:
        ValueError: shapes that do not fit, k out of range, or values that are not finite.
    """
    _check_pair(a, b)
    if not 1 <= k < len(a):
        raise ValueError(
            f"k must be from 1 to {len(a) - 1}, the other images, received {k}: use a smaller k"
        )
    near_a, near_b = (nearest_others(rows, k).indices for rows in (a, b))
    shared = (near_a.unsqueeze(2) == near_b.unsqueeze(1)).any(dim=2).sum(dim=1)
    return shared.to(torch.float64).cpu() / k


def prediction_cosine(predicted: Tensor, truth: Tensor) -> Tensor:
    """Cosine of predicted against true features; float64 ``(M,)``, or mean over N of ``(M, N, D)``.

    A row of zeros has cosine 0.

    Args:
        predicted: ``(M, D)`` or ``(M, N, D)``, of a student's head for a teacher.
        truth: the same shape, of that teacher.

    Raises:
        ValueError: shapes that differ.
    """
    if predicted.shape != truth.shape or predicted.ndim not in (2, 3):
        raise ValueError(
            "predicted and true features must both be (M, D) or (M, N, D), received "
            f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
        )
    a, b = (
        torch.nn.functional.normalize(rows.detach().cpu().to(torch.float64), dim=-1)
        for rows in (predicted, truth)
    )
    cosine = (a * b).sum(dim=-1)
    return cosine if cosine.ndim == 1 else cosine.mean(dim=1)


def head_cosine(
    predicted: EncodedSplit, truth: EncodedSplit, of: TokenType, kept: Tensor, chunk: int = 256
) -> Tensor:
    """:func:`prediction_cosine` of the images ``kept`` of two encoded splits, chunk by chunk.

    Raises:
        ValueError: a token type that one of them lacks, or widths or grids that differ.
    """
    sides = [getattr(side, of) for side in (predicted, truth)]
    if sides[0] is None or sides[1] is None:
        raise ValueError(f"the head or its teacher has no {of} to compare: compare the others")
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise ValueError(
            f"a head predicts {of} of shape {tuple(sides[0].shape[1:])} where its teacher has "
            f"{tuple(sides[1].shape[1:])}: give both the image size at which their grids agree"
        )
    parts = []
    for start in range(0, len(kept), chunk):
        rows = kept[start : start + chunk]
        a, b = (torch.as_tensor(side[rows]) for side in sides)
        parts.append(prediction_cosine(a, b))
    return torch.cat(parts)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """``‖XᵀY‖²_F``, through whichever of the two Gram forms is smaller."""
    if len(x) <= x.shape[1] or len(x) <= y.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def nearest_others(rows: Tensor, k: int) -> Neighbours:
    """The k nearest other rows of every row, nearest first; k from 1 to M − 1."""
    found = nearest_neighbours(rows, rows, k + 1)
    own = torch.arange(len(rows), device=found.indices.device).unsqueeze(1)
    is_self = found.indices == own
    # A row with k + 1 exact copies of lower index does not see itself: its last one goes instead.
    is_self[~is_self.any(dim=1), -1] = True
    shape = (len(rows), k)
    return Neighbours(found.indices[~is_self].view(shape), found.similarities[~is_self].view(shape))


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            "two encoders are compared on (M, D) features of the same images, at least 2, received "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, rows in (("first", a), ("second", b)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the features of the {name} must be finite, received NaN or infinity")
