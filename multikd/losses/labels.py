"""Terms on labels beside the teachers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multikd.errors import unknown_name
from multikd.functional import full_precision, in_own_dtype, where_images, without_autocast
from multikd.losses.term import Term
from multikd.types import Batch, StudentOutput

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher

Kind = Literal["cross_entropy", "generalised", "symmetric"]
# What symmetric cross-entropy takes for log 0 (the paper's A).
_LOG_ZERO = -4.0


class LabelLoss(Term):
    """Cross-entropy of the student's classifier with the batch's labels, or a robust loss.

    Soft labels ``(B, K)`` are used where the batch has them, otherwise the class indices. An image
    without a label (index −1, or soft labels that are all 0) has loss 0 and no gradient.

    Noisy labels: ``generalised`` is ``(1 − p_y^q)/q`` (Zhang & Sabuncu 2018, arXiv 1805.07836),
    cross-entropy for q → 0 and the mean absolute error for q = 1; ``symmetric`` is
    ``CE + reverse·RCE`` with log 0 = −4 (Wang et al. 2019, arXiv 1908.06112).

    Further label columns: a term with ``column`` reads ``batch.columns`` (``data.label_columns``)
    and has a classifier of its own on the student's summary, which is not exported. So several
    terms learn several columns at once, each with its weight.

    Args:
        weight: of this term.
        label_smoothing: share of the probability that is spread evenly over the classes; of
            cross-entropy only.
        kind: of loss.
        q: of ``generalised``, above 0 and at most 1.
        reverse: weight of the reverse cross-entropy in ``symmetric``.
        column: name of a further label column; null: the labels themselves.
        num_classes: of that column.

    Raises:
        ValueError: a setting out of range, or one that goes with another kind.
    """

    def __init__(
        self,
        weight: float = 1.0,
        label_smoothing: float = 0.0,
        kind: Kind = "cross_entropy",
        q: float = 0.7,
        reverse: float = 1.0,
        column: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), received {label_smoothing}")
        if kind not in get_args(Kind):
            raise unknown_name("kind of label loss", kind, get_args(Kind))
        if label_smoothing and kind != "cross_entropy":
            raise ValueError(
                f"label_smoothing goes with cross_entropy, not with {kind}: set it to 0"
            )
        if not 0.0 < q <= 1.0 or reverse < 0:
            raise ValueError(
                f"q must be above 0 and at most 1 and reverse 0 or more, received {q} and {reverse}"
            )
        if (column is None) != (num_classes is None) or (
            num_classes is not None and num_classes < 2
        ):
            raise ValueError(
                "a label column needs num_classes of 2 or more, and num_classes a column, received "
                f"column={column!r} and num_classes={num_classes}"
            )
        self.label_smoothing = label_smoothing
        self.kind: Kind = kind
        self.q = q
        self.reverse = reverse
        self._column = column
        self.num_classes = num_classes
        self.uses_logits = column is None
        self.head: nn.Linear | None = None

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``.

        Raises:
            ValueError: a column, and a student without a summary.
        """
        if self.num_classes is None:
            return
        width = student.feature_widths.summary
        if width is None:
            raise ValueError(
                f"term {name!r} puts a classifier on the student's summary, and "
                f"{student.spec.name} has none: give global_pool='avg'"
            )
        self.head = nn.Linear(width, self.num_classes)

    @property
    def reads_labels(self) -> bool:
        """See ``Term``."""
        return self._column is None

    @property
    def column(self) -> str | None:
        """See ``Term``."""
        return self._column

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        features = output.features
        read = features.logits if self.column is None else features.summary
        return [] if read is None else [read]

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        """See ``Term``.

        Raises:
            ValueError: if the student has no classifier, soft labels have another width, or the
                batch lacks the column.
        """
        if self.column is not None:
            return self._of_column(output, batch)
        logits = output.features.logits
        if logits is None:
            raise ValueError(
                "LabelLoss needs class logits, but the student has no classifier: "
                "set student.init_args.num_classes to the number of classes"
            )
        soft = batch.soft_labels
        if soft is not None and soft.shape != logits.shape:
            raise ValueError(
                f"soft labels must have the shape of the logits {tuple(logits.shape)}, "
                f"received {tuple(soft.shape)}: set num_classes to the labels' number of classes"
            )
        with without_autocast(logits.device):
            return self._loss(full_precision(logits), batch.labels, soft)

    def _of_column(self, output: StudentOutput, batch: Batch) -> Tensor:
        labels = (batch.columns or {}).get(self.column or "")
        if labels is None:
            raise ValueError(
                f"this batch has no label column {self.column!r}: add it to data.label_columns"
            )
        summary = output.features.summary
        if summary is None or self.head is None:
            raise ValueError("a label column needs a student with a summary, and bind() first")
        with without_autocast(summary.device):
            return self._loss(in_own_dtype(self.head, summary), labels, None)

    def _loss(self, logits: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
        labelled = labels >= 0 if soft is None else soft.sum(1) > 0
        logits = where_images(labelled, logits)
        target = labels.clamp(min=0) if soft is None else soft.to(logits.dtype)
        if self.kind == "cross_entropy":
            loss = F.cross_entropy(
                logits, target, reduction="none", label_smoothing=self.label_smoothing
            )
        else:
            if soft is None:
                # Not one_hot, which looks at the values and so waits for the device.
                y = torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)
            else:
                y = target
            loss = (
                generalised_cross_entropy(logits, y, self.q)
                if self.kind == "generalised"
                else symmetric_cross_entropy(logits, y, self.reverse)
            )
        return torch.where(labelled, loss, 0.0)


def generalised_cross_entropy(logits: Tensor, y: Tensor, q: float) -> Tensor:
    """``Σ_k y_k (1 − p_k^q)/q``: ``(B, K)`` twice → ``(B,)``, in [0, 1/q] (equation 6)."""
    powers = torch.exp(q * torch.log_softmax(logits, dim=1))
    return (y * (1.0 - powers) / q).sum(1)


def symmetric_cross_entropy(logits: Tensor, y: Tensor, reverse: float) -> Tensor:
    """``−Σ y log p − reverse · Σ p log y`` with log y at least −4: ``(B, K)`` twice → ``(B,)``."""
    log_p = torch.log_softmax(logits, dim=1)
    log_y = y.clamp(min=torch.finfo(y.dtype).tiny).log().clamp(min=_LOG_ZERO)
    return -(y * log_p).sum(1) - reverse * (log_p.exp() * log_y).sum(1)
