"""Terms on labels beside the teachers'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.functional import full_precision, where_images, without_autocast
from multikd.losses.term import Term
from multikd.types import Batch, StudentOutput


class LabelLoss(Term):
    """Cross-entropy of the student's classifier with the batch's labels.

    Soft labels ``(B, K)`` are used where the batch has them, otherwise the class indices. An image
    without a label (index −1, or soft labels that are all 0) has loss 0 and no gradient.

    Args:
        weight: of this term.
        label_smoothing: share of the probability that is spread evenly over the classes.
    """

    uses_logits = True

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), received {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, output: StudentOutput, batch: Batch) -> Tensor:
        """See ``Term``.

        Raises:
            ValueError: if the student has no classifier, or soft labels of another width.
        """
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
            logits = full_precision(logits)
            labelled = batch.labels >= 0 if soft is None else soft.sum(1) > 0
            target = batch.labels.clamp(min=0) if soft is None else soft.to(logits.dtype)
            loss = F.cross_entropy(
                where_images(labelled, logits),
                target,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            return torch.where(labelled, loss, 0.0)
