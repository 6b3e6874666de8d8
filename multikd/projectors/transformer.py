"""Transformer projectors: all tokens of a rung together (DUNE; Theia's second kind)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from multikd.projectors.base import (
    Projector,
    ProjectorFactory,
    initialise,
    linear,
    summary_of,
    width_pairs,
)
from multikd.types import TokenFeatures, Widths


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
        tokens = [summary_of(features).unsqueeze(1)]
        if features.patches is not None:
            tokens.append(features.patches)
        mixed = self.blocks(torch.cat(tokens, dim=1))
        summary = None if self.summary is None else self.summary(mixed[:, 0])
        to_patches = self.summary if self.shared else self.patches
        if to_patches is None or features.patches is None:
            return TokenFeatures(summary=summary)
        return TokenFeatures(summary=summary, patches=to_patches(mixed[:, 1:]), grid=features.grid)


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

    def __post_init__(self) -> None:
        if self.depth < 1 or self.mlp_ratio <= 0 or self.layer_scale < 0:
            raise ValueError(
                "depth must be 1 or more, mlp_ratio above 0 and layer_scale 0 or more, received "
                f"{self.depth}, {self.mlp_ratio} and {self.layer_scale}"
            )

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        from timm.models.vision_transformer import Block  # takes seconds to import

        width_pairs(student, teacher)  # refuses widths that can't be joined
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
                initialise(module)
        return TransformerProjector(blocks, width, teacher)


class _LayerNorm(nn.LayerNorm):
    """Layer norm with a ViT's epsilon; a class, since timm asks for one."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, eps=1e-6, **options)
