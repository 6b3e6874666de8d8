"""What stands beside the ladder: losses of the student's own output, each with a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from multikd.errors import unknown_name
from multikd.types import Batch, StudentOutput, TokenFeatures

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher

Targets = Mapping[str, TokenFeatures]
"""Teacher → its features as it gives them: not normalised, not resampled, of those that ran."""


class Term(nn.Module):
    """A loss of the student's own output, with a weight.

    Attributes:
        weight: the training module adds ``weight · mean of forward``.
        uses_logits: the student must have a classifier.
        uses_features: the student's final features, not only its rungs, must be trained.
        uses_teachers: ``forward`` also takes the teachers' raw features (``TeacherTerm``).
    """

    uses_logits: bool = False
    uses_features: bool = True
    uses_teachers: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"the weight of a term must be 0 or more, received {weight}")
        self.weight = weight

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """Learn who takes part, before training: check what is read, and make what is trained.

        Args:
            name: of this term, for messages.
            student: the encoder that is trained.
            teachers: all of the run's, by name.
        """

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """The student's tensors that this loss is a function of.

        Parameters that none of all terms' and of the ladder's reach are frozen, so that DDP waits
        for none of them.
        """
        final = output.features
        parts = (final.summary, final.patches, final.logits) if self.uses_features else ()
        return [part for part in parts if part is not None]

    @property
    def logits_of(self) -> tuple[str, ...]:
        """Teachers whose class logits are read; a feature cache keeps these."""
        return ()

    @property
    def reads_labels(self) -> bool:
        """Whether the batch's labels are learned from."""
        return False

    @property
    def column(self) -> str | None:
        """The further label column that is learned from."""
        return None

    @property
    def layers_of(self) -> tuple[str, ...]:
        """Teachers whose intermediate layers are read; no feature cache keeps these."""
        return ()

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        """Unweighted loss of each image: ``(B,)`` float32, 0 where it does not apply."""
        raise NotImplementedError


class TeacherTerm(Term):
    """A term that compares the student with teachers, past ladder and normalisers.

    ``bind`` comes first. A teacher that a ``TeacherDropper`` left out of a step is missing in
    ``targets``: the loss is then of the others, or 0, and every trained parameter still gets a
    gradient (of zeros).
    """

    uses_features = False
    uses_teachers = True

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``Term``; ``targets`` holds the teachers that ran, of the images in ``batch``."""
        raise NotImplementedError


def chosen_teachers(
    term: str, asked: Iterable[str] | None, teachers: Mapping[str, object]
) -> tuple[str, ...]:
    """The teachers that a term compares with: those asked for, or all.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    names = tuple(teachers) if asked is None else tuple(asked)
    for name in names:
        if name not in teachers:
            raise unknown_name(f"teacher in term {term!r}", name, teachers)
    if not names:
        raise ValueError(
            f"term {term!r} compares the student with teachers, and this run has none: give "
            "model.teachers, or leave the term out"
        )
    return names


def nothing(*tensors: Tensor) -> Tensor:
    """0 for each image, ``(B,)``, with a gradient of zeros on ``tensors`` ``(B, …)``."""
    rows = [0.0 * tensor.float().flatten(1).sum(1) for tensor in tensors]
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def nothing_of(module: nn.Module, like: Tensor) -> Tensor:
    """0 as a scalar that depends on every trained parameter of ``module``."""
    total = like.new_zeros((), dtype=like.dtype)
    for parameter in module.parameters():
        if parameter.requires_grad:
            # Under FSDP2 a parameter is a shard here; the zero of the local shard is as good.
            shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            total = total + 0.0 * shard.to(like.dtype).sum()
    return total
