"""Convolutional translators of patch maps (Theia, arXiv 2407.20179)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from multikd.projectors.base import (
    Projector,
    ProjectorFactory,
    TokenwiseProjector,
    linear,
    summary_of,
    width_pairs,
)
from multikd.types import TokenFeatures, Widths


class ConvStage(nn.Module):
    """3×3 convolution, layer norm over channels, ReLU: ``(B, h, w, D)`` → ``(B, h, w, D')``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """See the class."""
        convolved = self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        activated: Tensor = self.norm(convolved).relu()
        return activated


class ConvProjector(TokenwiseProjector):
    """Convolutions over the patch map, then a linear layer; the summary has a linear layer alone.

    Args:
        stages: ``(B, h, w, D)`` → ``(B, h, w, H)``.
        patches: ``(B, N, H)`` → ``(B, N, D_p)``.
        summary: ``(B, D)`` → ``(B, D_s)``, or None.
    """

    def __init__(self, stages: nn.Sequential, patches: nn.Module, summary: nn.Module | None):
        super().__init__(summary, patches)
        self.stages = stages

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``Projector``.

        Raises:
            ValueError: features without patches or their grid.
        """
        if features.patches is None or features.grid is None or self.patches is None:
            raise ValueError("a convolutional projector needs patches on a grid, received none")
        summary = None if self.summary is None else self.summary(summary_of(features))
        maps = features.patches.reshape(len(features.patches), *features.grid, -1)
        patches = self.patches(self.stages(maps).flatten(1, 2))
        return TokenFeatures(summary=summary, patches=patches, grid=features.grid)


@dataclass
class ConvProjectors(ProjectorFactory):
    """Theia's light translators: 3×3 convolutions with LN and ReLU, then a linear layer.

    The map is brought to the teacher's grid before (where Theia's first layer strides or
    transposes), so all teachers have the same layers.

    Args:
        depth: number of convolutions.
        hidden: their width; None for the student's.
    """

    depth: int = 3
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1 or (self.hidden is not None and self.hidden < 1):
            raise ValueError(
                f"depth and hidden must be 1 or more, received {self.depth} and {self.hidden}"
            )

    def build(self, student: Widths, teacher: Widths, *, last: bool) -> Projector:
        """See ``ProjectorFactory``."""
        summary, patches = width_pairs(student, teacher)
        if patches is None:
            raise ValueError(
                "a convolutional projector needs a teacher with patches, received one without: "
                "use MLPProjectors"
            )
        inputs, outputs = patches
        hidden = self.hidden or inputs
        stages = nn.Sequential(
            *[ConvStage(inputs if i == 0 else hidden, hidden) for i in range(self.depth)]
        )
        return ConvProjector(
            stages, linear(hidden, outputs), None if summary is None else linear(*summary)
        )
