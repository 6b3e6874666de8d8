"""Adaptive teaching with a shared classifier (ATSC, arXiv 2406.08528).

The teacher bends toward its student and is pulled back to itself; the student is deployed with a
projector into the teacher's feature space and the teacher's own classifier.

For one teacher, with F_s and F_t the last feature maps, P the projector, g the classifier:

    L = a·CE(g(GAP(P(F_s))), y) + d·τ²·KL(teacher ‖ student) + b·MSE(P(F_s), F_t)
        + w·Σ_k ‖θ_k − θ_k⁰‖²

F_t is not detached. A second step then updates g alone by CE(g(GAP(F_t)), y), with the features of
the same forward pass and the classifier as the first step left it. Of several teachers L is the
mean of theirs, and the deployed prediction the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from multikd.backbones import final_features, freeze_unread
from multikd.functional import full_precision, without_autocast
from multikd.modules.distillation import check_names, to_float
from multikd.modules.logits import (
    check_labels,
    check_temperature,
    check_weights,
    divergence,
    label_loss,
    log_scores,
    mean_logits,
    mean_real,
)
from multikd.modules.optimizing import (
    SECOND_KEY,
    SecondOptimizer,
    reduced,
    scaled_optimizer,
    schedule_factor,
    scheduled_optimizer,
)
from multikd.modules.records import StepRecord, mean_norm
from multikd.modules.resumable import (
    Resumable,
    answers,
    log_step,
    refuse_accumulation,
    refuse_views,
)
from multikd.optim import WarmupCosine
from multikd.projectors import BottleneckProjector, to_map
from multikd.projectors.bottleneck import Norm
from multikd.students import StudentEncoder
from multikd.teachers.trainable import TrainableTeacher
from multikd.types import Batch, Grid, TokenFeatures

# What an export needs to build projectors and classifiers again.
DEPLOYED_KEY = "shared_classifier"


class AdaptiveModule(Resumable):
    """ATSC: student, projectors, teachers and their classifiers, trained together.

    Args:
        teachers: name → teacher with a classifier; trained, and in train mode while it is.
        student: the encoder to train, without a classifier of its own.
        labels: a, weight of the deployed prediction's cross-entropy. Published: 0.
        response: d, weight of the KL from the teacher's prediction. Published: 0.
        features: b, weight of the squared error between projected and teacher's map.
        drift: w, weight of the squared distance of the teacher's weight tensors (those with more
            than one dimension, the classifier's among them) from their start. Published: 1
            (CIFAR-100), 10 (ImageNet).
        temperature: τ of the KL.
        bottleneck: f of the projector.
        teacher_rate: the teachers' learning rate in the first step, as a multiple of the
            student's. Published: 1, with SGD; an optimiser whose steps do not shrink with the
            gradient (Adam) moves a pretrained teacher far at that rate.
        norm: of the projector: ``batch`` as published, or ``group``.
        optimizer: makes the optimiser of everything, from parameter groups.
        classifier_optimizer: makes that of the second step; null: as ``optimizer``.
        lr_batch: the batch that learning rates are given for; null for no scaling.
        schedule: warm-up and cosine, of both.
    """

    def __init__(
        self,
        teachers: dict[str, TrainableTeacher],
        student: StudentEncoder,
        labels: float = 0.0,
        response: float = 0.0,
        features: float = 1.0,
        drift: float = 1.0,
        temperature: float = 4.0,
        bottleneck: float = 2.0,
        teacher_rate: float = 1.0,
        norm: Norm = "batch",
        optimizer: OptimizerCallable | None = None,
        classifier_optimizer: OptimizerCallable | None = None,
        lr_batch: int | None = None,
        schedule: WarmupCosine | None = None,
    ) -> None:
        super().__init__()
        check_names(teachers, {})  # type: ignore[arg-type]
        check_temperature(temperature)
        check_weights(labels=labels, response=response, features=features)
        check_weights(drift=drift)
        check_weights(teacher_rate=teacher_rate)
        check_teachers(teachers)
        if student.num_classes:
            raise ValueError(
                "the student is deployed with its teacher's classifier, so one of its own would "
                "never be trained: set student.init_args.num_classes to 0"
            )
        if student.feature_widths.patches is None:
            raise ValueError(f"the student {student.spec.name} has no feature map to project")
        self.teacher_names: tuple[str, ...] = tuple(teachers)
        self.trained_teachers = nn.ModuleDict(teachers)
        self.student = student
        self.weights = {"a": labels, "d": response, "b": features, "w": drift}
        self.temperature = temperature
        freeze_unread(student.model, student.spec.image_size, _last_map)
        self.projectors = nn.ModuleDict()
        for name, teacher in teachers.items():
            teacher.freeze_unread(lambda found: [found.patches])
            self.projectors[name] = BottleneckProjector(
                student.feature_widths.patches,
                cast(int, teacher.spec.widths.patches),
                bottleneck,
                norm,
                teacher.is_rectified,
            )
        self.anchors = nn.ModuleDict({n: Anchor(anchored(t)) for n, t in teachers.items()})
        self.optimizer_factory = optimizer
        self.classifier_factory = classifier_optimizer or optimizer
        self.teacher_rate = teacher_rate
        self.lr_batch = lr_batch
        self.schedule = schedule or WarmupCosine()
        self.second: SecondOptimizer | None = None
        self._second_state: dict[str, Any] | None = None
        # Pooled teacher features and labels of the batch under way, for the second step.
        self._pooled: list[Tensor] = []
        self._batch: Batch | None = None
        # Starts never change and are the same on every rank: DDP need not broadcast them.
        self._ddp_params_and_buffers_to_ignore = [
            f"anchors.{name}" for name, _ in self.anchors.named_buffers()
        ]

    # ------------------------------------------------------------------ one batch

    @property
    def inference_student(self) -> StudentEncoder:
        """The student that is scored and exported."""
        return self.student

    def teacher(self, name: str) -> TrainableTeacher:
        """A teacher by name."""
        return cast(TrainableTeacher, self.trained_teachers[name])

    def project(self, name: str, features: TokenFeatures, image_size: Grid) -> Tensor:
        """The student's map in a teacher's space: ``(B, D_t, h, w)``."""
        found: Tensor = self.projectors[name](to_map(features, self.meeting(name, image_size)))
        return found

    def meeting(self, name: str, image_size: Grid) -> Grid | None:
        """The grid that the student's map is pooled to, for images of this size: the teacher's."""
        teacher = self.teacher(name)
        return teacher.encoder.grid_for(
            teacher.spec.image_size if teacher.resize == "own" else image_size
        )

    def deployed(self, features: TokenFeatures, image_size: Grid) -> Tensor:
        """Logits ``(B, K)`` of projector and shared classifier, averaged over teachers."""
        rows = [
            self.teacher(name).classifier(self.project(name, features, image_size).mean(dim=(2, 3)))
            for name in self.teacher_names
        ]
        return mean_logits(rows)

    def forward(self, images: Tensor) -> TokenFeatures:
        """The student's features, with the logits that are deployed.

        ``images``: uint8 or float in [0, 1], ``(B, 3, H, W)``.
        """
        features = self.student.features(to_float(images))
        features.logits = self.deployed(features, (images.shape[2], images.shape[3]))
        return features

    def step(self, batch: Batch) -> tuple[Tensor, StepRecord]:
        """The first step's loss, and what the second one needs, kept aside."""
        images = to_float(batch.views[0])
        size = (images.shape[2], images.shape[3])
        features = self.student.features(images)
        rows, drifts, norms = [], [], {"student": mean_norm(features.summary)}
        self._pooled = []
        for name in self.teacher_names:
            teacher = self.teacher(name)
            projected = self.project(name, features, size)
            found = teacher(images)
            target = to_map(found, (projected.shape[2], projected.shape[3]))
            # Of the whole map, also where it is pooled to a smaller one for the comparison.
            pooled = to_map(found).mean(dim=(2, 3))
            rows.append(self._losses(teacher, projected, target, pooled, batch.labels))
            anchor = cast(Anchor, self.anchors[name])
            drifts.append(drift(anchored(teacher), anchor.starts()))
            self._pooled.append(pooled.detach())
            norms[f"target/{name}"] = mean_norm(pooled)
        losses = torch.stack(rows)
        real = batch.positions >= 0
        drift_mean = torch.stack(drifts).mean()
        total = torch.where(real, losses, 0.0).mean() + self.weights["w"] * drift_mean
        # With a = d = 0 the first step has no gradient for the bias, which DDP would wait for.
        total = total + 0.0 * sum(
            p.sum() for n in self.teacher_names for p in self.teacher(n).classifier.parameters()
        )
        record = StepRecord(
            names=self.teacher_names,
            losses=losses.detach(),
            keep=torch.ones_like(losses),
            lambdas=torch.ones(len(losses), device=losses.device),
            total=total.detach(),
            terms={"drift": drift_mean.detach().expand(len(batch))},
            keys=batch.keys,
            norms=norms,
        )
        return total, record

    def _losses(
        self,
        teacher: TrainableTeacher,
        projected: Tensor,
        target: Tensor,
        pooled: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """``(B,)``: all of L but the drift. ``pooled (B, D_t)`` is what the teacher classifies."""
        with without_autocast(projected.device):
            error = full_precision(projected) - full_precision(target)
        loss = self.weights["b"] * error.square().flatten(1).mean(1)
        if self.weights["a"] or self.weights["d"]:
            own = teacher.classifier(projected.mean(dim=(2, 3)))
            if self.weights["a"]:
                loss = loss + self.weights["a"] * label_loss(own, labels)
            if self.weights["d"]:
                taught = teacher.classifier(pooled)
                loss = loss + self.weights["d"] * divergence(taught, own, self.temperature)
        return loss

    def second_step(self, optimizer: Optimizer, batch: Batch) -> None:
        """CE(g(GAP(F_t)), y) updates every g. Its gradient bypasses DDP: reduced here."""
        if self.second is None:
            raise ValueError("the optimisers of this module are made by Lightning: use a Trainer")
        classifiers = [self.teacher(name).classifier for name in self.teacher_names]
        with torch.enable_grad(), without_autocast(self._pooled[0].device):
            losses = [
                label_loss(nn.functional.linear(full_precision(f), *_full(g)), batch.labels)
                for g, f in zip(classifiers, self._pooled, strict=True)
            ]
            total = torch.stack([mean_real(loss, batch) for loss in losses]).mean()
            parameters = self.second.parameters
            gradients = torch.autograd.grad(total, parameters)
        self.second.step(parameters, reduced(gradients), schedule_factor(optimizer))
        self._pooled = []

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuse, before training, what the method can't work with."""
        if stage != "fit":
            return
        refuse_accumulation(self, "takes its second step after every batch")
        refuse_views(self)
        check_labels(self, min(self.teacher(name).num_classes for name in self.teacher_names))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the first step; the second follows it in ``optimizer_step``."""
        total, record = self.step(batch)
        self.last_records = (record,)
        self._batch = batch
        log_step(self, record)
        return total

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Both steps of a batch, one after the other."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.skip_step and self._batch is not None:
            self.second_step(getattr(optimizer, "optimizer", optimizer), self._batch)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Cross-entropy and accuracy of what is deployed, and features for the probes."""
        features = self(batch.views[0])
        if dataloader_idx == 0:
            log_scores(self, features.logits, batch)
        return answers(features, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Lightning's optimiser over everything, and the second over the classifiers."""
        classifiers = [
            pair
            for name in self.teacher_names
            for pair in self.teacher(name).classifier.named_parameters()
        ]
        self.second = SecondOptimizer(
            scaled_optimizer(self, classifiers, self.classifier_factory, self.lr_batch)
        )
        named = list(self.named_parameters())
        return scheduled_optimizer(
            self,
            [pair for pair in named if not pair[0].startswith("trained_teachers.")],
            self.optimizer_factory,
            self.lr_batch,
            self.schedule,
            [pair for pair in named if pair[0].startswith("trained_teachers.")],
            self.teacher_rate,
        )

    def on_train_start(self) -> None:
        """Take up the second optimiser's state."""
        super().on_train_start()
        if self._second_state is not None and self.second is not None:
            self.second.optimizer.load_state_dict(self._second_state)
        self._second_state = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the second optimiser's state until there is one."""
        super().on_load_checkpoint(checkpoint)
        self._second_state = checkpoint.get(SECOND_KEY)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the second optimiser's state, and what an export builds from."""
        super().on_save_checkpoint(checkpoint)
        if self.second is not None:
            checkpoint[SECOND_KEY] = self.second.optimizer.state_dict()
        checkpoint[DEPLOYED_KEY] = {
            name: self._layout(name, self.student.spec.image_size) for name in self.teacher_names
        }

    def _layout(self, name: str, size: Grid) -> dict[str, Any]:
        projector = cast(BottleneckProjector, self.projectors[name])
        grid = self.meeting(name, size)
        return {
            "width": self.student.feature_widths.patches,
            "hidden": projector.hidden,
            "target": self.teacher(name).spec.widths.patches,
            "classes": self.teacher(name).num_classes,
            "norm": projector.norm,
            "rectified": projector.rectified,
            "grid": None if grid is None else list(grid),
            "fixed_grid": self.teacher(name).resize == "own",
            "stride": self.teacher(name).spec.patch_size,
        }

    def teacher_facts(self) -> dict[str, dict[str, str]]:
        """Encoder, licence, source and fingerprint of every teacher's start."""
        return {name: self.teacher(name).facts() for name in self.teacher_names}


class Anchor(nn.Module):
    """Where the anchored tensors of a teacher began: float32 buffers, also under ``bf16-true``."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_buffer(str(index), parameter.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Anchor:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def starts(self) -> list[Tensor]:
        """One tensor each, in order."""
        return list(self.buffers())


def anchored(teacher: TrainableTeacher) -> list[nn.Parameter]:
    """The tensors that the drift is measured on: trained, of more than one dimension."""
    return [p for p in teacher.parameters() if p.requires_grad and p.ndim > 1]


def drift(parameters: list[nn.Parameter], starts: list[Tensor]) -> Tensor:
    """``Σ_k ‖θ_k − θ_k⁰‖²`` as a scalar, in float32 (float64 stays)."""
    with without_autocast(starts[0].device):
        parts = [
            (full_precision(now) - full_precision(start)).square().sum()
            for now, start in zip(parameters, starts, strict=True)
        ]
        return torch.stack(parts).sum()


def check_teachers(teachers: dict[str, TrainableTeacher]) -> None:
    """Refuse teachers whose classifiers can't be shared.

    Raises:
        ValueError: label spaces that differ, or a classifier that reads no plain mean of a map.
    """
    classes = {name: teacher.num_classes for name, teacher in teachers.items()}
    if len(set(classes.values())) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in classes.items())
        raise ValueError(
            f"the teachers' classifiers must be of the same classes, and {said}: give each a head "
            "on the labels of this run (multikd teachers fit-head)"
        )
    for name, teacher in teachers.items():
        if teacher.spec.widths.patches is None or not teacher.pools_patches:
            raise ValueError(
                f"the classifier of teacher {name!r} ({teacher.spec.name}) does not read the plain "
                "mean of a feature map, so a projected map can't be put before it: give a CNN such "
                "as packaged:efficientnet_lite0 or timm:resnet50"
            )


def _last_map(model: nn.Module, images: Tensor) -> list[Tensor]:
    patches = final_features(model, images).patches
    return [] if patches is None else [patches]


def _full(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return full_precision(layer.weight), full_precision(layer.bias)
