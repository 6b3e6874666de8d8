"""Several objectives for one teacher, each with a weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from multikd.losses.feature import DistillationLoss, check_weights
from multikd.types import TOKEN_TYPES, Batch, TokenFeatures, Widths


class LossSum(DistillationLoss):
    """``Σ_k weight_k · loss_k``: AM-RADIO's, EUPE's and C-RADIOv4's objectives are such sums.

    A part none of whose token types the teacher has is left out for that teacher (patches of a
    teacher without patches). At least one must be left.

    Args:
        losses: name → objective.
        weights: name → weight of 0 or more; 1 where nothing is said.

    Raises:
        ValueError: no losses, weights for others, or one token type read both raw and normalised.
    """

    def __init__(
        self, losses: dict[str, DistillationLoss], weights: dict[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = weights or {}
        if not losses:
            raise ValueError("a sum of losses needs at least one loss, received none")
        for name in weights:
            if name not in losses:
                raise ValueError(
                    f"weights names {name!r}, which is no loss here: they are {', '.join(losses)}"
                )
        self.factors = {name: float(weights.get(name, 1.0)) for name in losses}
        check_weights("weights", *self.factors.values())
        try:
            self.losses = nn.ModuleDict(losses)
        except KeyError as error:  # a dot, or a word that torch reserves
            raise ValueError(
                f"a loss of a sum can't have this name ({error.args[0]}): use letters, digits, '_'"
            ) from error
        used = [losses[name] for name, factor in self.factors.items() if factor > 0]
        self.tokens = tuple(t for t in TOKEN_TYPES if any(t in one.tokens for one in used))
        self.raw = tuple(t for t in TOKEN_TYPES if any(t in one.raw for one in used))
        for one in used:
            for token in self.raw:
                if token in one.tokens and token not in one.raw:
                    raise ValueError(
                        f"{type(one).__name__} reads the {token} normalised and another loss of "
                        "the sum reads it raw: one head can't predict both"
                    )
        self.uses_shift = any(one.uses_shift for one in used)
        self.means_over_patches = all(
            one.means_over_patches for one in used if "patches" in one.tokens
        )

    def bind(self, widths: Widths) -> None:
        """See ``DistillationLoss``."""
        for one in self.losses.values():
            cast(DistillationLoss, one).bind(widths)

    def forward(
        self,
        prediction: TokenFeatures,
        target: TokenFeatures,
        batch: Batch | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """See ``DistillationLoss``.

        Raises:
            ValueError: no part reads a token type that is here.
        """
        here = {
            token
            for token, s, y in zip(TOKEN_TYPES, prediction.widths, target.widths, strict=True)
            if s is not None and y is not None
        }
        terms = []
        for name, factor in self.factors.items():
            one = cast(DistillationLoss, self.losses[name])
            if factor > 0 and here.intersection(one.tokens):
                extra: dict[str, Any] = {"shift": shift} if one.uses_shift else {}
                terms.append(factor * one(prediction, target, batch, **extra))
        if not terms:
            raise ValueError(
                f"prediction {prediction.widths} and target {target.widths} share no token type "
                f"that a loss of the sum reads: they read {', '.join(self.tokens)}"
            )
        return torch.stack(terms).sum(0)
