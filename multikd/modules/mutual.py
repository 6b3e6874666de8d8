"""Mutual learning (Zhang et al. 2018, arXiv 1706.00384): students that teach one another.

Student m of M learns by ``CE_m + w · mean_{j≠m} τ²·KL(p_j ‖ p_m)``, the others' predictions being
taken as they are. All M take their step at once, from one backward pass of the sum.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from multikd.backbones import freeze_unread
from multikd.distributed import all_reduce_sum
from multikd.modules.distillation import to_float
from multikd.modules.logits import (
    check_labels,
    check_temperature,
    check_weights,
    divergence,
    label_loss,
    log_scores,
    logits_of,
    read_logits,
)
from multikd.modules.optimizing import scheduled_optimizer
from multikd.modules.records import StepRecord, mean_norm
from multikd.modules.resumable import Resumable, answers, mean_over_views
from multikd.optim import WarmupCosine
from multikd.students import StudentEncoder
from multikd.types import Batch, TokenFeatures


class MutualModule(Resumable):
    """M students with classifiers, trained at once on labels and on one another.

    The best of them by validation accuracy (at first: the first) is what ``forward`` runs, what
    the probes score and what ``multikd evaluate`` and ``multikd export`` take;
    ``export --student NAME`` takes another.

    Args:
        students: name → student; two or more, with as many classes.
        labels: weight of the cross-entropy.
        divergence: w, weight of the mean KL from the others. Published: 1.
        temperature: τ. Published: 1.
        optimizer: makes the optimiser of all students.
        lr_batch: the batch that the learning rate is given for; null for no scaling.
        schedule: warm-up and cosine.
    """

    best: Tensor

    def __init__(
        self,
        students: dict[str, StudentEncoder],
        labels: float = 1.0,
        divergence: float = 1.0,
        temperature: float = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_batch: int | None = None,
        schedule: WarmupCosine | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(labels=labels, divergence=divergence)
        check_students(students)
        self.student_names: tuple[str, ...] = tuple(students)
        self.students = nn.ModuleDict(students)
        for student in students.values():
            freeze_unread(student.model, student.spec.image_size, read_logits)
        self.labels, self.divergence, self.temperature = labels, divergence, temperature
        self.optimizer_factory = optimizer
        self.lr_batch = lr_batch
        self.schedule = schedule or WarmupCosine()
        # Index of the best student of the last validation.
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))
        self._right: Tensor | None = None

    # ------------------------------------------------------------------ one batch

    @property
    def inference_student(self) -> StudentEncoder:
        """The best student so far."""
        index = 0 if self.best.is_meta else int(self.best)
        return self.student_of(self.student_names[index])

    def student_of(self, name: str) -> StudentEncoder:
        """A student by name."""
        return cast(StudentEncoder, self.students[name])

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features and logits of the best student. ``images``: uint8 or float in [0, 1]."""
        return self.inference_student.features(to_float(images))

    def step(self, batch: Batch, view: int) -> tuple[Tensor, StepRecord]:
        """The sum of the students' losses on one view."""
        images = to_float(batch.views[view])
        found = {name: self.student_of(name).features(images) for name in self.student_names}
        logits = [logits_of(features) for features in found.values()]
        losses = torch.stack(mutual_losses(logits, batch.labels, self))
        real = batch.positions >= 0
        total = torch.where(real, losses, 0.0).mean(dim=1).sum()
        record = StepRecord(
            names=self.student_names,
            losses=losses.detach(),
            keep=torch.ones_like(losses),
            lambdas=torch.ones(len(losses), device=losses.device),
            total=total.detach(),
            terms={},
            keys=batch.keys,
            norms={name: mean_norm(features.summary) for name, features in found.items()},
        )
        return total, record

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuse labels that are missing, before training."""
        if stage == "fit":
            check_labels(self, self.inference_student.num_classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch: the mean over its views."""
        return mean_over_views(self, batch)

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._right = torch.zeros(len(self.student_names), dtype=torch.int64, device=self.device)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Every student's cross-entropy and accuracy, and the best one's features for probes."""
        images = to_float(batch.views[0])
        if dataloader_idx > 0 or self._right is None:
            return answers(self(images), batch)
        best = self.student_names[int(self.best)]
        chosen = (batch.positions >= 0) & (batch.labels >= 0)
        features = TokenFeatures()
        for index, name in enumerate(self.student_names):
            found = self.student_of(name).features(images)
            logits = logits_of(found)
            self._right[index] += ((logits.argmax(dim=-1) == batch.labels) & chosen).sum()
            log_scores(self, logits, batch, f"/{name}")
            if name == best:
                features = found
                log_scores(self, logits, batch)
        return answers(features, batch)

    def on_validation_epoch_end(self) -> None:
        """Choose the best: of equal ones the first."""
        super().on_validation_epoch_end()
        if self._right is not None and not self.trainer.sanity_checking:
            self.best.copy_(all_reduce_sum(self._right).argmax())
        self._right = None

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Cross-entropy and accuracy of the best student."""
        features = self(batch.views[0])
        if dataloader_idx == 0:
            log_scores(self, logits_of(features), batch)
        return answers(features, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser over all students."""
        return scheduled_optimizer(
            self, self.named_parameters(), self.optimizer_factory, self.lr_batch, self.schedule
        )


def mutual_losses(logits: list[Tensor], labels: Tensor, weights: MutualModule) -> list[Tensor]:
    """``(B,)`` of each student: cross-entropy, and the mean KL from each of the others."""
    losses = []
    for own in logits:
        others = [other for other in logits if other is not own]
        taught = [divergence(other.detach(), own, weights.temperature) for other in others]
        mean = torch.stack(taught).mean(dim=0)
        losses.append(weights.labels * label_loss(own, labels) + weights.divergence * mean)
    return losses


def check_students(students: dict[str, StudentEncoder]) -> None:
    """Refuse what can't learn mutually.

    Raises:
        ValueError: fewer than two students, names that can't be parts of a log name, a student
            without a classifier, or classifiers of different classes.
    """
    if len(students) < 2:
        raise ValueError(
            f"mutual learning needs two students or more, received {len(students)}: add another "
            "under model.students"
        )
    for name in students:
        if not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"student name {name!r} must consist of letters, digits, '_' and '-' and begin "
                "with a letter: it becomes part of log names"
            )
    classes = {name: student.num_classes for name, student in students.items()}
    if 0 in classes.values() or len(set(classes.values())) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in classes.items())
        raise ValueError(
            f"students learn from one another's classifiers, which must be of the same classes, "
            f"and {said}: set num_classes alike"
        )
