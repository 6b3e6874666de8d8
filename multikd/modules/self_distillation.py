"""Self-distillation: the teacher is an exponential moving average of the student.

``L = a·CE(z_s, y) + d·τ²·KL(p_ema ‖ p_s) + b·(1 − cos(f_s, f_ema))``, f the summaries: mean teacher
(Tarvainen & Valpola 2017) with the distillation loss of Hinton 2015. Born-again generations
(Furlanello 2018), where the teacher is the previous generation's export, are a chain of stages.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from multikd.backbones import freeze_unread
from multikd.functional import cosine_distance, full_precision, without_autocast
from multikd.modules.distillation import to_float
from multikd.modules.ema import StudentAverage
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


class SelfDistillationModule(Resumable):
    """A student with a classifier that learns from labels and from its own moving average.

    What is scored, and exported unless ``--weights raw`` says otherwise, is the average.

    Args:
        student: with a classifier.
        labels: a, weight of the cross-entropy.
        response: d, weight of the KL from the average's prediction.
        features: b, weight of the cosine distance of the summaries.
        temperature: τ.
        ema_decay: of the average; warmed up, so that the teacher is not the random start.
        optimizer: makes the optimiser of the student.
        lr_batch: the batch that the learning rate is given for; null for no scaling.
        schedule: warm-up and cosine.
    """

    def __init__(
        self,
        student: StudentEncoder,
        labels: float = 1.0,
        response: float = 1.0,
        features: float = 0.0,
        temperature: float = 2.0,
        ema_decay: float = 0.99,
        optimizer: OptimizerCallable | None = None,
        lr_batch: int | None = None,
        schedule: WarmupCosine | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(labels=labels, response=response, features=features)
        if not student.num_classes:
            raise ValueError(
                "self-distillation compares class predictions, and the student has no classifier: "
                "set student.init_args.num_classes to the number of classes"
            )
        if labels == 0.0:
            raise ValueError(
                "labels must be above 0: without labels a student that agrees with its own average "
                "has nothing to learn"
            )
        self.student = student
        freeze_unread(student.model, student.spec.image_size, read_logits)
        self.average = StudentAverage(student, ema_decay)
        self.weights = {"a": labels, "d": response, "b": features}
        self.temperature = temperature
        self.optimizer_factory = optimizer
        self.lr_batch = lr_batch
        self.schedule = schedule or WarmupCosine()

    # ------------------------------------------------------------------ one batch

    @property
    def inference_student(self) -> StudentEncoder:
        """The average, which is scored and exported."""
        return self.average.student

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features and logits of the average. ``images``: uint8 or float in [0, 1]."""
        return self.average.student.features(to_float(images))

    def step(self, batch: Batch, view: int) -> tuple[Tensor, StepRecord]:
        """Loss of one view, on which both look."""
        images = to_float(batch.views[view])
        own = self.student.features(images)
        with torch.no_grad():
            teacher = self.average.student.features(images)
        losses = self._losses(own, teacher, batch.labels)
        total = torch.where(batch.positions >= 0, losses, 0.0).mean()
        record = StepRecord(
            names=("average",),
            losses=losses.detach()[None],
            keep=torch.ones(1, len(batch), device=losses.device),
            lambdas=torch.ones(1, device=losses.device),
            total=total.detach(),
            terms={},
            keys=batch.keys,
            norms={"student": mean_norm(own.summary), "average": mean_norm(teacher.summary)},
        )
        return total, record

    def _losses(self, own: TokenFeatures, teacher: TokenFeatures, labels: Tensor) -> Tensor:
        logits, taught = logits_of(own), logits_of(teacher)
        loss = self.weights["a"] * label_loss(logits, labels)
        if self.weights["d"]:
            loss = loss + self.weights["d"] * divergence(taught, logits, self.temperature)
        if self.weights["b"]:
            ours, theirs = cast(Tensor, own.summary), cast(Tensor, teacher.summary)
            with without_autocast(ours.device):
                distance = cosine_distance(full_precision(ours), full_precision(theirs))
            loss = loss + self.weights["b"] * distance
        return loss

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuse labels that are missing, before training."""
        if stage == "fit":
            check_labels(self, self.student.num_classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch: the mean over its views."""
        return mean_over_views(self, batch)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Cross-entropy and accuracy of the average, and its features for the probes."""
        features = self(batch.views[0])
        if dataloader_idx == 0:
            log_scores(self, logits_of(features), batch)
        return answers(features, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser of the student; the average moves behind each of its steps."""
        made: Any = scheduled_optimizer(
            self,
            self.student.named_parameters(),
            self.optimizer_factory,
            self.lr_batch,
            self.schedule,
        )
        # Here, not in a hook after the batch: a checkpoint may be written between the two.
        made["optimizer"].register_step_post_hook(self._move_average)
        return cast(OptimizerLRScheduler, made)

    def _move_average(self, *_: Any) -> None:
        if not self.skip_step:
            self.average.update(self.student)
