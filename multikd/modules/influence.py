"""Distillation influence (LGTM, arXiv 2305.09651): a teacher that learns how its lessons are taken.

Student θ, teacher φ, training batch b, held-out batch v (a split of the training data):

1. ``L_S = α·KL(p_t ‖ p_s) + (1 − α)·CE_s``, ``L_T = α_t·KL(p_s ‖ p_t) + (1 − α_t)·CE_t``.
2. θ' is one optimiser step from θ on ``∇L_S(b)``; ``g = ∇_θ' CE(student(θ'), v)``.
3. ``I = [∇_φ L_T(φ, θ + εg) − ∇_φ L_T(φ, θ − εg)] / (2ε)``, ``ε = 0.01/‖g‖``: how the teacher's
   loss leads the student along g. Exactly: ``∇_φ ⟨∇_θ L_T(φ, θ), g⟩``.
4. The teacher steps on ``∇_φ L_T − η·I``, relabels b, and the student takes its real step.

Gradients are linear, so the three of step 4 are one backward pass of one scalar. All of them but
the student's last are taken functionally, out of DDP's sight, and reduced here: DDP sees one
backward for each forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from multikd.backbones import freeze_unread
from multikd.data.held_out import HeldOutBatches
from multikd.data.module import ShardDataModule
from multikd.distributed import broadcast_first
from multikd.functional import without_autocast
from multikd.modules.distillation import to_float
from multikd.modules.logits import (
    check_labels,
    check_temperature,
    divergence,
    label_loss,
    log_scores,
    logits_of,
    mean_real,
    read_logits,
)
from multikd.modules.optimizing import (
    SECOND_KEY,
    SecondOptimizer,
    reduced,
    scaled_optimizer,
    schedule_factor,
    scheduled_optimizer,
    virtual_step,
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
from multikd.students import StudentEncoder
from multikd.teachers.trainable import TrainableTeacher
from multikd.types import Batch, TokenFeatures


class Influence(NamedTuple):
    """What one batch says of the teacher.

    Attributes:
        gradients: ``∇_φ L_T − η·I``, one a trained tensor of the teacher, over all ranks.
        samples: ``(B,)`` influence of each image of this rank: above 0 where learning it lowers
            the held-out loss.
        losses: ``(B,)`` L_T of each image.
    """

    gradients: list[Tensor]
    samples: Tensor
    losses: Tensor


class InfluenceModule(Resumable):
    """LGTM: a student, and a teacher that is trained by what its lessons do to the student.

    The held-out batches come from ``data.held_out``: every so-manieth sample of each training
    shard, never trained on and never the evaluation set.

    Args:
        teacher: with a classifier; trained, and in train mode while it is.
        student: with a classifier of the same classes.
        alpha: α, share of the KL in the student's loss; the rest is cross-entropy.
        teacher_alpha: α_t, the same for the teacher.
        temperature: τ.
        influence_rate: η; null: the student's present learning rate. (The published code takes
            the teacher's.)
        reach: ε·‖g‖, how far the finite difference looks to either side. Published: 0.01; its error
            falls with the square.
        exact: the mixed second derivative by double backward, in place of the finite difference;
            for small models.
        held_out_batch: images of a held-out batch on each process; null: ``data.batch_size``.
        optimizer: makes the student's optimiser.
        teacher_optimizer: makes the teacher's; null: as ``optimizer``.
        lr_batch: the batch that learning rates are given for; null for no scaling.
        schedule: warm-up and cosine, of both.
    """

    held_out_taken: Tensor

    def __init__(
        self,
        teacher: TrainableTeacher,
        student: StudentEncoder,
        alpha: float = 1.0,
        teacher_alpha: float = 0.4,
        temperature: float = 1.0,
        influence_rate: float | None = None,
        reach: float = 0.01,
        exact: bool = False,
        held_out_batch: int | None = None,
        optimizer: OptimizerCallable | None = None,
        teacher_optimizer: OptimizerCallable | None = None,
        lr_batch: int | None = None,
        schedule: WarmupCosine | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        for name, value in (("alpha", alpha), ("teacher_alpha", teacher_alpha)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], received {value}")
        if teacher_alpha == 0.0:
            raise ValueError(
                "teacher_alpha must be above 0: without the KL the teacher's loss does not depend "
                "on the student, and its influence is 0"
            )
        if influence_rate is not None and not 0.0 <= influence_rate < float("inf"):
            raise ValueError(f"influence_rate must be 0 or more, received {influence_rate}")
        if not 0.0 < reach < float("inf"):
            raise ValueError(f"reach must be above 0 and finite, received {reach}")
        if held_out_batch is not None and held_out_batch < 1:
            raise ValueError(f"held_out_batch must be 1 or more, received {held_out_batch}")
        if student.num_classes != teacher.num_classes:
            raise ValueError(
                f"student and teacher must classify alike: the teacher has {teacher.num_classes} "
                f"classes and the student {student.num_classes}: set student.init_args.num_classes "
                f"to {teacher.num_classes}, or give the teacher another head"
            )
        self.trained_teacher = teacher
        self.student = student
        freeze_unread(student.model, student.spec.image_size, read_logits)
        teacher.freeze_unread(lambda found: [found.summary])
        self.alpha, self.teacher_alpha = alpha, teacher_alpha
        self.temperature = temperature
        self.influence_rate = influence_rate
        self.reach = reach
        self.exact = exact
        self.held_out_batch = held_out_batch
        self.optimizer_factory = optimizer
        self.teacher_factory = teacher_optimizer or optimizer
        self.lr_batch = lr_batch
        self.schedule = schedule or WarmupCosine()
        self.second: SecondOptimizer | None = None
        self._second_state: dict[str, Any] | None = None
        # Batches taken of the held-out stream: with it a run goes on at the right one.
        self.register_buffer("held_out_taken", torch.zeros((), dtype=torch.int64))
        self._held_out: Iterator[Batch] | None = None
        self.last_influence: Tensor | None = None
        # Its gradients are reduced here, not by DDP; its batch statistics are broadcast as usual.
        self._ddp_params_and_buffers_to_ignore = [
            f"trained_teacher.{name}" for name, _ in teacher.named_parameters()
        ]

    # ------------------------------------------------------------------ the mathematics

    @property
    def inference_student(self) -> StudentEncoder:
        """The student that is scored and exported."""
        return self.student

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features and logits of the student. ``images``: uint8 or float in [0, 1]."""
        return self.student.features(to_float(images))

    def student_losses(self, taught: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """L_S of each image, ``(B,)``; the teacher's logits are not differentiated."""
        loss = self.alpha * divergence(taught.detach(), logits, self.temperature)
        return loss + (1.0 - self.alpha) * label_loss(logits, labels)

    def teacher_losses(self, taught: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """L_T of each image, ``(B,)``, a function of both."""
        loss = self.teacher_alpha * divergence(logits, taught, self.temperature)
        return loss + (1.0 - self.teacher_alpha) * label_loss(taught, labels)

    def direction(
        self,
        optimizer: Optimizer,
        batch: Batch,
        held: Batch,
        logits: Tensor,
        taught: Tensor,
    ) -> dict[str, Tensor]:
        """g: the held-out gradient after the student's virtual step, over all ranks.

        Args:
            optimizer: the student's; not changed.
            batch: b.
            held: v.
            logits: ``(B, K)`` of the student on b, with their graph, which stays.
            taught: ``(B, K)`` of the teacher on b.
        """
        names, parameters = _trained(self.student)
        loss = mean_real(self.student_losses(taught, logits, batch.labels), batch)
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        moved = virtual_step(optimizer, parameters, reduced(first))
        ahead = dict(zip(names, moved, strict=True))
        seen = self.student_logits(to_float(held.views[0]), ahead)
        held_loss = mean_real(label_loss(seen, held.labels), held)
        return dict(zip(names, reduced(torch.autograd.grad(held_loss, moved)), strict=True))

    def influence(
        self,
        batch: Batch,
        direction: Mapping[str, Tensor],
        logits: Tensor,
        taught: Tensor,
        rate: float,
        draws: int,
    ) -> Influence:
        """The teacher's gradient on b with the influence in it, and each image's influence.

        Args:
            batch: b.
            direction: g.
            logits: ``(B, K)`` of the student on b, with their graph where it is ``exact``.
            taught: ``(B, K)`` of the teacher on b, with their graph.
            rate: η.
            draws: seed of the student's dropout on b.
        """
        losses = self.teacher_losses(taught, logits.detach(), batch.labels)
        total = mean_real(losses, batch)
        if self.exact:
            lead, samples = self._exact(batch, direction, logits, taught)
        else:
            lead, samples = self._difference(batch, direction, taught, draws)
        _, parameters = _trained(self.trained_teacher)
        gradients = torch.autograd.grad(total - rate * lead, parameters)
        return Influence(reduced(gradients), samples.detach(), losses.detach())

    def _difference(
        self, batch: Batch, direction: Mapping[str, Tensor], taught: Tensor, draws: int
    ) -> tuple[Tensor, Tensor]:
        """A scalar whose gradient in φ is I, by a central difference; and the images'."""
        epsilon = self.reach / _norm(direction).clamp(min=1e-30)
        images, sides = to_float(batch.views[0]), []
        own = dict(self.student.named_parameters())
        for sign in (1.0, -1.0):
            there = {n: own[n].detach() + sign * epsilon * g for n, g in direction.items()}
            # In float32: the difference of two bfloat16 passes would be rounding alone.
            with torch.no_grad(), without_autocast(images.device):
                sides.append(self.student_logits(images, there, draws))
        up, down = (self.teacher_losses(taught, side, batch.labels) for side in sides)
        with torch.no_grad():
            lessons = [divergence(taught, side, self.temperature) for side in sides]
        return (
            mean_real(up - down, batch) / (2.0 * epsilon),
            (lessons[0] - lessons[1]) / (2.0 * epsilon),
        )

    def _exact(
        self, batch: Batch, direction: Mapping[str, Tensor], logits: Tensor, taught: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same by double backward: ``⟨∇_θ L_T, g⟩`` with its graph in φ."""
        names, parameters = _trained(self.student)
        along = [direction[name] for name in names]

        def slope(value: Tensor) -> Tensor:
            parts = torch.autograd.grad(value, parameters, create_graph=True)
            return torch.stack([(p * g).sum() for p, g in zip(parts, along, strict=True)]).sum()

        lead = slope(mean_real(self.teacher_losses(taught, logits, batch.labels), batch))
        # Of each image: the slope of Σ u_i ℓ_i is linear in u.
        lessons = divergence(taught.detach(), logits, self.temperature)
        weights = torch.ones_like(lessons).requires_grad_()
        (samples,) = torch.autograd.grad(slope((weights * lessons).sum()), weights)
        return lead, samples

    def student_logits(
        self, images: Tensor, parameters: Mapping[str, Tensor], draws: int | None = None
    ) -> Tensor:
        """Logits of the student with other parameters; no batch statistics move."""
        with seeded(draws, images.device):
            found: TokenFeatures = functional_call(
                _Features(self.student), _state(self.student, "student.", parameters), (images,)
            )
        return logits_of(found)

    # ------------------------------------------------------------------ one batch

    def teach(self, batch: Batch, held: Batch, optimizer: Optimizer) -> tuple[Tensor, Influence]:
        """Steps 1 to 4 but the student's own: its logits with their graph, and the influence."""
        if self.second is None:
            raise ValueError("the optimisers of this module are made by Lightning: use a Trainer")
        images = to_float(batch.views[0])
        draws = int(torch.randint(2**31, ()))
        with self._differentiable(), seeded(draws, images.device):
            logits = logits_of(self.student.features(images))
        taught = self.trained_teacher(images).logits
        rate = self.influence_rate
        if rate is None:
            rate = float(optimizer.param_groups[0]["lr"])
        g = self.direction(optimizer, batch, held, logits, taught)
        found = self.influence(batch, g, logits, taught, rate, draws)
        # The same on every rank. One look at the device, as a gradient scaler has it.
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(found.gradients))):
            _, parameters = _trained(self.trained_teacher)
            self.second.step(parameters, found.gradients, schedule_factor(optimizer))
            # Which would go on with the weights as they were before the step.
            torch.clear_autocast_cache()
        else:
            found = found._replace(losses=torch.full_like(found.losses, float("nan")))
        return logits, found

    def _differentiable(self) -> Any:
        # The fused kernels of attention can't be differentiated twice.
        return sdpa_kernel(SDPBackend.MATH) if self.exact else nullcontext()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The teacher's step, and the loss of the student's."""
        held = next(self._batches()).to(self.device)
        self.held_out_taken += 1
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        logits, found = self.teach(batch, held, optimizer)
        with torch.no_grad():
            relabelled = functional_call(
                self.trained_teacher,
                _state(self.trained_teacher, "", {}),
                (to_float(batch.views[0]),),
            ).logits
        losses = self.student_losses(relabelled, logits, batch.labels)
        total = mean_real(losses, batch)
        self.last_influence = found.samples
        record = StepRecord(
            names=("student",),
            losses=losses.detach()[None],
            keep=torch.ones(1, len(batch), device=losses.device),
            lambdas=torch.ones(1, device=losses.device),
            total=total.detach(),
            terms={"teacher": found.losses, "influence": found.samples},
            keys=batch.keys,
            norms={"student": mean_norm(logits), "teacher": mean_norm(relabelled)},
        )
        self.last_records = (record,)
        log_step(self, record)
        return total

    def _batches(self) -> Iterator[Batch]:
        if self._held_out is None:
            self._held_out = self._open_held_out(int(self.held_out_taken))
        return self._held_out

    def _open_held_out(self, start: int) -> Iterator[Batch]:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ShardDataModule):
            raise ValueError(
                "InfluenceModule takes held-out batches from multikd's ShardDataModule: set data "
                "to it, with held_out"
            )
        size = self.held_out_batch or data.batch_size
        found: HeldOutBatches = data.held_out_batches(size, start)
        return found

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuse, before training, what the method can't work with."""
        if stage != "fit":
            return
        refuse_accumulation(self, "steps its teacher with every batch")
        refuse_views(self)
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "64-true", "bf16-mixed"):
            raise ValueError(
                "InfluenceModule needs weights in float32 and gradients that no scaler sees: set "
                f"trainer.precision to bf16-mixed or 32-true in place of {precision}"
            )
        self._held_out = None
        self._open_held_out(0)  # raises where the split is too small
        check_labels(self, self.student.num_classes)

    def on_fit_start(self) -> None:
        """One teacher for all ranks."""
        with torch.no_grad():
            for parameter in self.trained_teacher.parameters():
                parameter.copy_(broadcast_first(parameter))

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Cross-entropy and accuracy of the student, and features for the probes."""
        features = self(batch.views[0])
        if dataloader_idx == 0:
            log_scores(self, logits_of(features), batch)
        return answers(features, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Lightning's optimiser over the student, and the second over the teacher."""
        self.second = SecondOptimizer(
            scaled_optimizer(
                self,
                self.trained_teacher.named_parameters(),
                self.teacher_factory,
                self.lr_batch,
            )
        )
        return scheduled_optimizer(
            self,
            self.student.named_parameters(),
            self.optimizer_factory,
            self.lr_batch,
            self.schedule,
        )

    def on_train_start(self) -> None:
        """Take up the teacher's optimiser and the place in the held-out batches."""
        super().on_train_start()
        self._held_out = None
        if self._second_state is not None and self.second is not None:
            self.second.optimizer.load_state_dict(self._second_state)
        self._second_state = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the teacher's optimiser state until there is one."""
        super().on_load_checkpoint(checkpoint)
        self._second_state = checkpoint.get(SECOND_KEY)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's optimiser state."""
        super().on_save_checkpoint(checkpoint)
        if self.second is not None:
            checkpoint[SECOND_KEY] = self.second.optimizer.state_dict()

    def teacher_facts(self) -> dict[str, dict[str, str]]:
        """Encoder, licence, source and fingerprint of the teacher's start."""
        return {"teacher": self.trained_teacher.facts()}


class _Features(nn.Module):
    """``StudentEncoder.features`` as a forward pass, for functional calls."""

    def __init__(self, student: StudentEncoder) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> TokenFeatures:
        return self.student.features(images)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws of their own inside, and those outside untouched; None: nothing of the kind."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _state(module: nn.Module, prefix: str, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a module under ``prefix``: some changed, buffers as copies to be thrown away.

    Parameters as they are, so that gradients may be asked for.
    """
    state: dict[str, Tensor] = {f"{prefix}{n}": p for n, p in module.named_parameters()}
    state |= {f"{prefix}{n}": b.clone() for n, b in module.named_buffers()}
    return state | {f"{prefix}{n}": t for n, t in changed.items()}


def _trained(module: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    pairs = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [n for n, _ in pairs], [p for _, p in pairs]


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    norm: Tensor = torch.nn.utils.get_total_norm(list(tensors.values()))
    return norm
