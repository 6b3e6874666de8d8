"""Continual distillation: the student stays near what it was before.

Learning without forgetting (arXiv 1606.09282), on features: the previous student is one of the
teachers, and of the same architecture, so that its features are compared as they are, without a
projector. Shapes: B images, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.functional import full_precision, without_autocast
from multikd.losses.term import Targets, TeacherTerm, chosen_teachers, nothing
from multikd.types import Batch, StudentOutput, TokenType

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher

Measure = Literal["cosine", "mse"]


class RetentionTerm(TeacherTerm):
    """Distance of the student's final features from those of the previous student.

    The previous student is named as a teacher, ``exported:FOLDER``, and left out of the ladder
    (``teacher_losses: {previous: NoFeatureLoss}``) unless it shall teach there, too.

    Args:
        weight: of this term.
        teacher: name of the previous student among the run's teachers.
        measure: ``cosine`` (1 − cos, blind to lengths) or ``mse``.
        summary: weight of the summary's distance, at least 0.
        patches: weight of the patches' mean distance, at least 0.

    Raises:
        ValueError: another measure, a weight below 0, or both 0.
    """

    def __init__(
        self,
        weight: float = 1.0,
        teacher: str = "previous",
        measure: Measure = "cosine",
        summary: float = 1.0,
        patches: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if measure not in ("cosine", "mse"):
            raise ValueError(f"measure must be 'cosine' or 'mse', received {measure!r}")
        if not (0.0 < summary + patches < float("inf") and min(summary, patches) >= 0):
            raise ValueError(
                "summary and patches must be finite, 0 or more and not both 0, received "
                f"{summary} and {patches}"
            )
        self.teacher, self.measure = teacher, measure
        self.shares: dict[TokenType, float] = {"summary": summary, "patches": patches}

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``.

        Raises:
            ValueError: no teacher of that name, or one whose features are not of the student's
                widths.
        """
        chosen_teachers(name, [self.teacher], teachers)
        previous = teachers[self.teacher]
        for token, share in self.shares.items():
            own, other = getattr(student.feature_widths, token), getattr(previous.widths, token)
            if share and (own is None or own != other):
                raise ValueError(
                    f"term {name!r} keeps the student near teacher {self.teacher!r}, whose {token} "
                    f"is {other} wide and the student's {own}: take the export that this student "
                    f"starts from, or set {token}: 0"
                )

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        found = [getattr(output.features, token) for token, share in self.shares.items() if share]
        return [tensor for tensor in found if tensor is not None]

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``TeacherTerm``.

        Raises:
            ValueError: patches on another grid than the student's.
        """
        read = self.reads(output)
        with without_autocast(read[0].device):
            loss = nothing(*(full_precision(tensor) for tensor in read))
            previous = (targets or {}).get(self.teacher)
            if previous is None:
                return loss
            for token, share in self.shares.items():
                if not share:
                    continue
                own = cast(Tensor, getattr(output.features, token))
                before = getattr(previous, token)
                if before is None or before.shape != own.shape:
                    received = None if before is None else tuple(before.shape)
                    raise ValueError(
                        f"the {token} of teacher {self.teacher!r} must have the student's shape "
                        f"{tuple(own.shape)}, received {received}: show it the student's images "
                        "(resize: none)"
                    )
                loss = loss + share * retention(own, before, self.measure)
        return loss


def retention(own: Tensor, before: Tensor, measure: Measure) -> Tensor:
    """Mean distance of an image's tokens: ``(B, [N,] D)`` twice → ``(B,)`` float32, ≥ 0.

    Args:
        own: the student's.
        before: the previous student's; no gradient goes there.
        measure: ``cosine``: 1 − cos; ``mse``: mean squared difference.
    """
    own, before = full_precision(own), full_precision(before.detach())
    if measure == "cosine":
        distance = 1.0 - F.cosine_similarity(own, before, dim=-1, eps=1e-8)
    else:
        distance = torch.mean((own - before) ** 2, dim=-1)
    return distance if distance.ndim == 1 else distance.flatten(1).mean(1)
