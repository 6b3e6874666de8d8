"""Projectors of single tokens: linear, UNIC's MLP, RADIO's and EUPE's LN-GELU MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multikd.projectors.base import (
    Projector,
    ProjectorFactory,
    TokenwiseProjector,
    linear,
    width_pairs,
)
from multikd.types import TOKEN_TYPES, TokenType, Widths


@dataclass
class LinearProjectors(ProjectorFactory):
    """One linear layer for the summary and one for the patches."""

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        summary, patches = width_pairs(student, teacher)
        return TokenwiseProjector(
            None if summary is None else linear(*summary),
            None if patches is None else linear(*patches),
        )


@dataclass
class MLPProjectors(ProjectorFactory):
    """UNIC's (arXiv 2408.05088): Linear · GELU · Linear, apart for summary and patches.

    Args:
        hidden: width of the hidden layer on inner rungs.
        last_hidden: width of the hidden layer on the student's last rung.
    """

    hidden: int = 768
    last_hidden: int = 3072

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.last_hidden < 1:
            raise ValueError(
                "hidden and last_hidden must be 1 or more, "
                f"received {self.hidden} and {self.last_hidden}"
            )

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        hidden = self.last_hidden if last else self.hidden

        def mlp(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(linear(inputs, hidden), nn.GELU(), linear(hidden, outputs))

        summary, patches = width_pairs(student, teacher)
        return TokenwiseProjector(
            None if summary is None else mlp(*summary),
            None if patches is None else mlp(*patches),
        )


class Residual(nn.Sequential):
    """``x + layers(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(…, D)`` → the same shape."""
        change: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + change


@dataclass
class ResidualMLPProjectors(ProjectorFactory):
    """RADIO's and EUPE's: Linear, residual blocks of LN · GELU · Linear, LN · GELU · Linear.

    Without blocks it is the two-layer Linear · LN · GELU · Linear of AM-RADIO (arXiv 2312.06709)
    and EUPE; one or two blocks make it C-RADIO's. Apart for summary and patches.

    Args:
        hidden: width of the hidden layers.
        blocks: residual blocks between the two linear layers.
        patches_hidden: width for patches; None for the same.
    """

    hidden: int = 1536
    blocks: int = 0
    patches_hidden: int | None = None

    def __post_init__(self) -> None:
        widths = (self.hidden, self.hidden if self.patches_hidden is None else self.patches_hidden)
        if min(widths) < 1 or self.blocks < 0:
            raise ValueError(
                "hidden widths must be 1 or more and blocks 0 or more, received "
                f"{self.hidden}, {self.patches_hidden} and {self.blocks}"
            )

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""

        def mlp(inputs: int, outputs: int, hidden: int) -> nn.Module:
            def step(to: int) -> list[nn.Module]:
                return [nn.LayerNorm(hidden), nn.GELU(), linear(hidden, to)]

            inner = [Residual(*step(hidden)) for _ in range(self.blocks)]
            return nn.Sequential(linear(inputs, hidden), *inner, *step(outputs))

        summary, patches = width_pairs(student, teacher)
        of_patches = self.hidden if self.patches_hidden is None else self.patches_hidden
        return TokenwiseProjector(
            None if summary is None else mlp(*summary, self.hidden),
            None if patches is None else mlp(*patches, of_patches),
        )


def mlp_weights(
    projector: nn.Module,
) -> dict[TokenType, tuple[Tensor, Tensor, Tensor, Tensor]] | None:
    """Weights (w1, b1, w2, b2) of each token type of a projector that is UNIC's and nothing else.

    None for other kinds, and where hooks, parametrisations, sharding (FSDP) or quantisation stand
    between the weights and what a call computes.
    """
    if type(projector) is not TokenwiseProjector or _watched(projector):
        return None
    found: dict[TokenType, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for token in TOKEN_TYPES:
        network = getattr(projector, token)
        if network is None:
            continue
        if type(network) is not nn.Sequential or len(network) != 3 or _watched(network):
            return None
        first, activation, second = network
        if any(_watched(layer) for layer in network) or type(activation) is not nn.GELU:
            return None
        # A subclass (sharded, parametrised, quantised) computes something else.
        if type(first) is not nn.Linear or type(second) is not nn.Linear:
            return None
        if activation.approximate != "none" or first.bias is None or second.bias is None:
            return None
        weights = (first.weight, first.bias, second.weight, second.bias)
        if any(type(w) not in (nn.Parameter, torch.Tensor) for w in weights):
            return None
        found[token] = weights
    return found or None


def _watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
