"""Projectors: from the student's widths to one teacher's.

A projector sees summary, patches and grid together, since some kinds mix them; it returns the
token types that its teacher has. The factories are typed objects, so that YAML can choose one by
``class_path`` and ``init_args``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multikd.types import TokenFeatures, Widths


class Projector(nn.Module):
    """Maps student features to the token types and widths of one teacher."""

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """``features`` in the student's widths → features in the teacher's, on the same grid."""
        raise NotImplementedError

    # For type checkers: nn.Module's call returns Any.
    def __call__(self, features: TokenFeatures) -> TokenFeatures:
        """See ``forward``."""
        result: TokenFeatures = super().__call__(features)
        return result


class ProjectorFactory(ABC):
    """Makes the projector of one (rung, teacher) from widths."""

    @abstractmethod
    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """A projector.

        Args:
            student: widths of the rung.
            teacher: widths of the teacher; None where it lacks a token type.
            last: whether this is the student's last rung.

        Raises:
            ValueError: where the widths cannot be joined.
        """


class TokenwiseProjector(Projector):
    """One network for the summary and one for each patch; they share nothing.

    Args:
        summary: ``(B, D)`` → ``(B, D_s)``, or None where the teacher has no summary.
        patches: ``(B, N, D)`` → ``(B, N, D_p)``, or None where it has no patches.
    """

    def __init__(self, summary: nn.Module | None, patches: nn.Module | None) -> None:
        super().__init__()
        self.summary = summary
        self.patches = patches

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``Projector``. A student without a summary gives the mean of its patches."""
        summary = None if self.summary is None else self.summary(_summary_of(features))
        if self.patches is None or features.patches is None:
            return TokenFeatures(summary=summary)
        patches = self.patches(features.patches)
        return TokenFeatures(summary=summary, patches=patches, grid=features.grid)


class TransformerProjector(Projector):
    """DUNE's projector (arXiv 2503.14405): ViT blocks over all tokens, then a linear layer.

    Summary and patches go through the blocks as one sequence, also where the teacher has only one
    of them. The linear layer is shared where the teacher's two widths are equal, as published, and
    otherwise there is one for each.

    Args:
        blocks: ``(B, 1 + N, D)`` → the same shape.
        width: D.
        teacher: widths of the teacher.
    """

    def __init__(self, blocks: nn.Sequential, width: int, teacher: Widths) -> None:
        super().__init__()
        self.blocks = blocks
        shared = teacher.summary is not None and teacher.summary == teacher.patches
        self.summary = None if teacher.summary is None else linear(width, teacher.summary)
        self.patches = None if teacher.patches is None or shared else linear(width, teacher.patches)
        self.shared = shared

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``Projector``."""
        tokens = [_summary_of(features).unsqueeze(1)]
        if features.patches is not None:
            tokens.append(features.patches)
        mixed = self.blocks(torch.cat(tokens, dim=1))
        summary = None if self.summary is None else self.summary(mixed[:, 0])
        to_patches = self.summary if self.shared else self.patches
        if to_patches is None or features.patches is None:
            return TokenFeatures(summary=summary)
        return TokenFeatures(summary=summary, patches=to_patches(mixed[:, 1:]), grid=features.grid)


@dataclass
class LinearProjectors(ProjectorFactory):
    """One linear layer for the summary and one for the patches."""

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        summary, patches = _pairs(student, teacher)
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

        summary, patches = _pairs(student, teacher)
        return TokenwiseProjector(
            None if summary is None else mlp(*summary),
            None if patches is None else mlp(*patches),
        )


@dataclass
class TransformerProjectors(ProjectorFactory):
    """DUNE's: pre-norm ViT blocks with LayerScale over all tokens, then a linear layer.

    Args:
        depth: number of blocks.
        heads: attention heads; None for one head per 64 channels.
        mlp_ratio: hidden width of a block's MLP over its width.
        layer_scale: start of LayerScale; 0 for none.
    """

    depth: int = 1
    heads: int | None = None
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-4

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        from timm.models.vision_transformer import Block  # takes seconds to import

        _pairs(student, teacher)  # refuses widths that can't be joined
        width = student.patches if student.patches is not None else student.summary
        if width is None or student.summary not in (None, width):
            raise ValueError(
                "a transformer projector needs a student whose summary and patches have one "
                f"width, received {student.summary} and {student.patches}: use MLPProjectors"
            )
        heads = max(1, width // 64) if self.heads is None else self.heads
        if heads < 1 or width % heads:
            raise ValueError(
                f"{heads} attention heads do not divide the student's width {width}: "
                "set heads to a divisor"
            )
        blocks = nn.Sequential(
            *[
                Block(
                    width,
                    heads,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=True,
                    init_values=self.layer_scale or None,
                    norm_layer=_LayerNorm,
                )
                for _ in range(self.depth)
            ]
        )
        for module in blocks.modules():
            if isinstance(module, nn.Linear):
                _initialise(module)
        return TransformerProjector(blocks, width, teacher)


class _LayerNorm(nn.LayerNorm):
    """Layer norm with a ViT's epsilon; a class, since timm asks for one."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, eps=1e-6, **options)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as UNIC initialises it: truncated normal of deviation 0.02, biases 0."""
    layer = nn.Linear(inputs, outputs)
    _initialise(layer)
    return layer


def _initialise(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _summary_of(features: TokenFeatures) -> Tensor:
    if features.summary is not None:
        return features.summary
    if features.patches is None:
        raise ValueError("a projector needs a summary or patches, received neither")
    return features.patches.mean(dim=1)


def _pairs(
    student: Widths, teacher: Widths
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(student width, teacher width) for summary and for patches, None where there is no such."""
    if teacher.summary is None and teacher.patches is None:
        raise ValueError("a projector needs a teacher with a summary or patches, received neither")
    if teacher.patches is not None and student.patches is None:
        raise ValueError(
            f"the teacher has patches ({teacher.patches} wide) but this student rung has none: "
            "choose rungs with a feature map, or a teacher whose summary alone is distilled"
        )
    source = student.summary if student.summary is not None else student.patches
    summary = None
    if teacher.summary is not None:
        if source is None:
            raise ValueError("a projector needs a student with a summary or patches")
        summary = (source, teacher.summary)
    patches = None
    if teacher.patches is not None and student.patches is not None:
        patches = (student.patches, teacher.patches)
    return summary, patches
