"""A target normaliser's inverse, folded into the last linear layers of a head.

A head is a sum over rungs of projectors whose last layer is linear, and it predicts *standardised*
teacher features. The inverse is affine (``y = s·A + b``), so it goes into those last layers:
``W ← Aᵀ W`` and ``bias ← bias·A`` in every rung, and ``b`` once.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from multikd.export.trained_heads import TrainedHead
from multikd.normalizers import FeatureNormalizer
from multikd.projectors import (
    Projector,
    TokenwiseProjector,
    TransformerProjector,
)
from multikd.types import TOKEN_TYPES, TokenFeatures, TokenType

# A map that is affine but for rounding differs from its matrix by no more than this (float64 over
# float32 statistics).
_AFFINE = 1e-5


def affine_map(normalizer: FeatureNormalizer, token: TokenType) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` in float64 with ``inverse(s) = s · scale + shift``.

    What ``affine`` tells, ``(D,)`` or a matrix ``(D, D)`` (then ``s @ scale``), where it is the
    whole inverse; else a matrix that is found by probing ``inverse`` itself.

    Raises:
        ValueError: the inverse is not affine, so that no linear layer can take it up.
    """
    width = cast(int, getattr(normalizer.widths, token))
    if token in normalizer.raw:
        return torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def inverse(rows: Tensor) -> Tensor:
        result = normalizer.inverse(TokenFeatures(**_tokens(token, rows)))
        return cast(Tensor, result.summary if token == "summary" else result.patches)[..., :].view(
            len(rows), -1
        )

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        rows = 3.0 * torch.randn(8, width, dtype=torch.float64, generator=generator)
        expected = inverse(rows)
        scale, shift = (t.detach().double().cpu() for t in normalizer.affine(token))
        told = rows * scale if scale.ndim == 1 else rows @ scale
        if _close(told + shift, expected):
            return scale, shift
        shift = inverse(torch.zeros(1, width, dtype=torch.float64))[0]
        matrix = inverse(torch.eye(width, dtype=torch.float64)) - shift
        if _close(rows @ matrix + shift, expected):
            return matrix, shift
    raise ValueError(
        f"the inverse of {type(normalizer).__name__} is not affine, so it can't be folded into a "
        "linear layer: export without --heads, or train with another normaliser"
    )


def _tokens(token: TokenType, rows: Tensor) -> dict[str, Any]:
    if token == "summary":
        return {"summary": rows}
    return {"patches": rows.unsqueeze(1), "grid": (1, 1)}


def _close(received: Tensor, expected: Tensor) -> bool:
    return bool((received - expected).abs().max() <= _AFFINE * expected.abs().max())


def fold(head: TrainedHead) -> dict[int, Projector]:
    """Copies of the head's projectors whose sum answers in the teacher's own feature space.

    Raises:
        ValueError: a normaliser that is not affine, or a projector that ends in no linear layer.
    """
    folded = {rung: copy.deepcopy(projector) for rung, projector in head.projectors.items()}
    for projector in folded.values():
        if isinstance(projector, TransformerProjector) and projector.shared:
            # One layer for both token types, but each has statistics of its own.
            projector.patches, projector.shared = copy.deepcopy(projector.summary), False
    last = max(folded)
    for token in TOKEN_TYPES:
        layers = {r: last_linear(p, token) for r, p in folded.items()}
        if all(layer is None for layer in layers.values()):
            continue
        scale, shift = affine_map(head.normalizer, token)
        for rung, layer in layers.items():
            if layer is not None:
                _fold_into(layer, scale, shift if rung == last else torch.zeros_like(shift))
    return folded


@torch.no_grad()
def _fold_into(layer: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double()
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.double()
    if scale.ndim == 1:
        weight, bias = scale[:, None] * weight, scale * bias + shift
    else:
        weight, bias = scale.T @ weight, bias @ scale + shift
    layer.weight = nn.Parameter(weight.float())
    layer.bias = nn.Parameter(bias.float())


def last_linear(projector: Projector, token: TokenType) -> nn.Linear | None:
    """The linear layer that a projector's ``token`` comes out of; None where it gives none.

    Raises:
        ValueError: it comes out of something else.
    """
    layers = getattr(projector, token, None)
    if layers is None:
        return None
    if isinstance(layers, nn.Sequential) and len(layers):
        layers = layers[-1]
    if not isinstance(projector, (TokenwiseProjector, TransformerProjector)) or not isinstance(
        layers, nn.Linear
    ):
        raise ValueError(
            f"a {type(projector).__name__} does not end in a linear layer for the {token}, so its "
            "normaliser can't be folded in: export without --heads"
        )
    return layers
