"""What projectors share: the two interfaces, the token-wise one, initialisation and widths."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
        summary = None if self.summary is None else self.summary(summary_of(features))
        if self.patches is None or features.patches is None:
            return TokenFeatures(summary=summary)
        patches = self.patches(features.patches)
        return TokenFeatures(summary=summary, patches=patches, grid=features.grid)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as UNIC initialises it: truncated normal of deviation 0.02, biases 0."""
    layer = nn.Linear(inputs, outputs)
    initialise(layer)
    return layer


def initialise(layer: nn.Linear) -> None:
    """Truncated normal of deviation 0.02, bias 0, in place."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def summary_of(features: TokenFeatures) -> Tensor:
    """The summary, or the mean of the patches where there is none."""
    if features.summary is not None:
        return features.summary
    if features.patches is None:
        raise ValueError("a projector needs a summary or patches, received neither")
    return features.patches.mean(dim=1)


def width_pairs(
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
