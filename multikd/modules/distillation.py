"""The LightningModule that holds teachers, student, ladder, normalisers and losses, and no more.

One step, in the order of the README's picture: views → teachers → normalisers, student → ladder,
losses ``L (T, B)``, dropping and weights ``w (T, B)``, and one number.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from multikd.data.claims import PARTIAL, TeacherData, claims
from multikd.data.module import ShardDataModule
from multikd.data.resuming import LoaderState
from multikd.distributed import rank
from multikd.functional import without_autocast
from multikd.grids import GridPolicy, resample_patches, target_grid
from multikd.ladder import Ladder, NoLadder
from multikd.losses.balancing import FixedWeights, LossBalancer
from multikd.losses.curriculum import Curriculum
from multikd.losses.dropping import NoDropping, TeacherDropper, weigh
from multikd.losses.feature import DistillationLoss, FeatureLoss
from multikd.losses.shift import view_shift
from multikd.losses.term import Term, nothing_of
from multikd.modules.allotment import Allotment, allot, allotted_targets, anchored
from multikd.modules.ema import StudentAverage
from multikd.modules.partition import Partition, check_told, facts_of, load_own
from multikd.modules.patch_sampling import PatchSample, check_share
from multikd.modules.records import StepRecord, gradient_norm, mean_norm
from multikd.modules.resuming import (
    begin_batch,
    go_on,
    note_validation,
    read_place,
    settle_lengths,
    write_place,
)
from multikd.modules.sharding import shard_modules
from multikd.modules.undo import StepUndo
from multikd.normalizers import EMAStandardizers, FeatureNormalizer, NormalizerFactory
from multikd.optim import WarmupCosine, fuse, parameter_groups, scale_learning_rate
from multikd.projectors import MLPProjectors, Projector, ProjectorFactory, TokenwiseProjector
from multikd.students import StudentEncoder
from multikd.teachers import Teacher, TeacherDict
from multikd.teachers.resized import shared_sizes
from multikd.teachers.streams import TeacherStreams
from multikd.types import TOKEN_TYPES, Batch, Grid, StudentOutput, TokenFeatures, TokenType, Widths

log = logging.getLogger(__name__)


class DistillationModule(pl.LightningModule):
    """Distil several frozen teachers into one student.

    Args:
        teachers: name → frozen teacher. Names are yours; they appear in logs, caches and exports.
        student: the encoder to train, seen as rungs.
        projectors: makes the projector of each (rung, teacher). Default: UNIC's MLPs.
        normalizers: makes each teacher's target normaliser. Default: UNIC's running one.
        loss: the objective between prediction and normalised target.
        teacher_losses: objectives of single teachers, in place of ``loss``.
        dropper: which teachers run, and which count for which image.
        balancer: weights of the teachers.
        terms: losses beside the ladder (labels, responses, relations, …), each with a weight of
            its own. With ``loss: NoFeatureLoss`` there are these alone, and with terms on labels
            the run needs no ``teachers``.
        teacher_view: which of several training views the teachers see while the student learns
            from each of the others; null: each learns from what both see.
        view_weights: weight of each training view's loss, scaled to a mean of 1; null: equal.
        teacher_data: whose the images of ``data.train``'s data sets are (``multikd.data.claims``).
        partition: groups of teachers; rank r loads and runs those of group r mod G only.
        patch_share: of the patches that a training step's patch loss is taken over, drawn anew in
            every step for every image: less work in the ladder for a noisier gradient. 1 is all.
        target_grid: on which patch grid prediction and target meet: the ``teacher``'s, the
            ``student``'s, or the ``smaller`` of the two.
        optimizer: makes the optimiser from parameter groups; its ``lr`` is that of a batch of
            ``lr_batch`` images and is scaled linearly with the global batch.
        lr_batch: the batch the learning rate is given for; null for no scaling.
        schedule: warm-up and cosine.
        ema_decay: keep an exponential moving average of the student; null for none.
        validate_losses: run the teachers in validation too, for their losses there.
        compile_student: ``torch.compile`` student, ladder and losses.
        teacher_streams: on a GPU (CUDA, XPU), run each teacher in a stream of its own: for small
            teachers at small batches, at the price of the memory of all at once.
        curriculum: which images count yet, easy ones first; null: all of them.
    """

    seed: Tensor

    def __init__(
        self,
        teachers: dict[str, Teacher],
        student: StudentEncoder,
        projectors: ProjectorFactory | None = None,
        normalizers: NormalizerFactory | None = None,
        loss: DistillationLoss | None = None,
        teacher_losses: dict[str, DistillationLoss] | None = None,
        dropper: TeacherDropper | None = None,
        balancer: LossBalancer | None = None,
        terms: dict[str, Term] | None = None,
        teacher_view: int | None = None,
        target_grid: GridPolicy = "smaller",
        optimizer: OptimizerCallable | None = None,
        lr_batch: int | None = 256,
        schedule: WarmupCosine | None = None,
        ema_decay: float | None = None,
        validate_losses: bool = True,
        compile_student: bool = False,
        curriculum: Curriculum | None = None,
        view_weights: list[float] | None = None,
        teacher_data: TeacherData | None = None,
        partition: list[list[str]] | None = None,
        patch_share: float = 1.0,
        teacher_streams: bool = False,
    ) -> None:
        super().__init__()
        check_names(teachers, terms or {})
        self.teachers = TeacherDict(teachers)
        self.teacher_names: tuple[str, ...] = tuple(teachers)
        self.student = student
        self.terms = nn.ModuleDict(terms or {})
        for name, term in (terms or {}).items():
            term.bind(name, student, teachers)
        self.logits_of = {n for term in (terms or {}).values() for n in term.logits_of}
        self.curriculum = curriculum
        if curriculum is not None:
            curriculum.bind(teachers)
            self.logits_of |= {*curriculum.names}
        if any(term.uses_logits for term in (terms or {}).values()) and not student.num_classes:
            raise ValueError(
                "a term needs class logits, but the student has no classifier: "
                "set student.init_args.num_classes to the number of classes"
            )
        self.losses = nn.ModuleDict(self._losses(loss or FeatureLoss(), teacher_losses or {}))
        # A projector that no loss reads would never get a gradient, and DDP would wait for it.
        projected = {
            name: projected_widths(name, teacher.widths, cast(DistillationLoss, self.losses[name]))
            for name, teacher in teachers.items()
            if cast(DistillationLoss, self.losses[name]).tokens
        }
        # Those whose features the student predicts; the others, terms alone compare it with.
        self.ladder_names: tuple[str, ...] = tuple(projected)
        self.ladder: Ladder = (
            Ladder(student.widths, projected, projectors or MLPProjectors())
            if projected
            else NoLadder(student.widths)
        )
        check_trained(self.ladder_names, terms or {})
        self._tokens = tokens_read(self.ladder, projected.values())
        student.freeze_unreached(False, self._tokens, self.reads)
        factory = normalizers or EMAStandardizers()
        self.normalizers = nn.ModuleDict(
            {name: factory.for_teacher(name, teachers[name].widths) for name in projected}
        )
        for name in projected:
            objective = cast(DistillationLoss, self.losses[name])
            objective.bind(teachers[name].widths)
            self.normalizer(name).raw = objective.raw
        self.dropper = dropper if dropper is not None else NoDropping()
        self.dropper.bind(self.teacher_names)
        # Without a ladder it has nothing to weigh, and its state would never move.
        self.balancer = balancer if balancer is not None and projected else FixedWeights()
        if projected:
            self.balancer.bind(self.ladder_names)
        self.teacher_view = teacher_view
        self.view_weights = checked_weights(view_weights)
        self.teacher_data: TeacherData | None = teacher_data
        self.claims: dict[str, frozenset[int]] | None = None  # known when the data are
        self.partition = None if partition is None else Partition(partition, self.teacher_names)
        # Where an image has one teacher, `image` would divide its λ away.
        if (self.partition is not None or teacher_data in PARTIAL) and self.dropper.by_default:
            self.dropper.normalize = "teacher"
        check_share(
            patch_share, self._objectives(), tokenwise(self.ladder), bool(teacher_data or partition)
        )
        self.patch_share = patch_share
        self.teacher_streams = TeacherStreams() if teacher_streams else None
        self._told: dict[str, dict[str, str]] = {}  # of a partition's teachers, all ranks'
        self.grid_policy: GridPolicy = target_grid
        self.optimizer_factory = optimizer
        self.lr_batch = lr_batch
        self.schedule = schedule or WarmupCosine()
        self.average = None if ema_decay is None else StudentAverage(student, ema_decay)
        self.validate_losses = validate_losses
        self.last_records: tuple[StepRecord, ...] = ()
        # Set by a diagnosis that asks for each teacher's part of the loss, with its graph.
        self.keeps_parts = False
        self.kept_parts: dict[str, Tensor] = {}
        # Of dropout and drop path. A buffer, so that a resumed run goes on with the same draws.
        seed = torch.initial_seed() & (2**63 - 1)
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self._run_seed = seed
        self._validated_at = -1
        self._resumed: LoaderState | None = None
        self._gradients: dict[str, Tensor] = {}
        # Set by a guard that may skip an optimiser step: what to put back then, and that it does.
        self.undo: StepUndo | None = None
        self.skip_step = False
        # Teachers are the same on every rank already: DDP neither broadcasts nor reduces them.
        self._ddp_params_and_buffers_to_ignore = [
            f"teachers.{name}"
            for name, _ in [*self.teachers.named_parameters(), *self.teachers.named_buffers()]
        ]
        if compile_student:
            for part in (self.student, self.ladder, *dict.fromkeys(self.losses.values())):
                part.compile()

    def _losses(
        self, default: DistillationLoss, own: Mapping[str, DistillationLoss]
    ) -> dict[str, nn.Module]:
        for name in own:
            if name not in self.teacher_names:
                raise ValueError(
                    f"teacher_losses names {name!r}, which is no teacher of this run: "
                    f"they are {', '.join(self.teacher_names)}"
                )
        # What a loss learns of its teacher is not another's.
        states = any(True for _ in default.buffers()) or any(True for _ in default.parameters())
        return {
            name: own[name] if name in own else copy.deepcopy(default) if states else default
            for name in self.teacher_names
        }

    # ------------------------------------------------------------------ one batch

    @property
    def inference_student(self) -> StudentEncoder:
        """The student that is scored and exported: the average where one is kept."""
        return self.student if self.average is None else self.average.student

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features of the student. ``images``: uint8 or float in [0, 1], ``(B, 3, H, W)``."""
        output: StudentOutput = self.inference_student(to_float(images))
        return output.features

    def targets(
        self,
        batch: Batch,
        images: Tensor,
        view: int,
        names: Sequence[str],
        allotment: Allotment | None = None,
    ) -> dict[str, TokenFeatures]:
        """Teacher features of one view: from the batch where a cache served them, else live."""
        if view == 0 and batch.cached is not None:
            missing = [name for name in names if name not in batch.cached]
            if missing:
                raise ValueError(
                    f"the feature cache holds {', '.join(sorted(batch.cached))} and lacks "
                    f"{', '.join(missing)}: delete its folder to compute it anew"
                )
            if allotment is None:
                return {name: batch.cached[name] for name in names}
        with shared_sizes():
            if allotment is not None:
                patch = self.student.spec.patch_size
                return allotted_targets(
                    allotment, batch, images, view == 0, self.teacher, self.run_teacher, patch
                )
            if self.teacher_streams is not None and images.device.type in ("cuda", "xpu"):
                return self._side_by_side(self.teacher_streams, images, names)
            return {name: self.run_teacher(name, images) for name in names}

    @torch.no_grad()
    def _side_by_side(
        self, streams: TeacherStreams, images: Tensor, names: Sequence[str]
    ) -> dict[str, TokenFeatures]:
        patch = self.student.spec.patch_size

        def share(name: str) -> object:
            with without_autocast(images.device):
                return self.teacher(name).resize_images(images, patch)

        return streams.run(names, images, share, lambda name: self.run_teacher(name, images))

    def run_teacher(self, name: str, images: Tensor) -> TokenFeatures:
        """One teacher's features of float images in [0, 1], live; also what a cache stores.

        Logits are among them only where a term reads them (``logits_of``).
        """
        features: TokenFeatures = self.teacher(name)(images, self.student.spec.patch_size)
        return features if name in self.logits_of else dataclasses.replace(features, logits=None)

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """What the terms read of a student's output."""
        return [t for term in self.terms.values() for t in cast(Term, term).reads(output)]

    def _objectives(self) -> dict[str, DistillationLoss]:
        return {name: cast(DistillationLoss, self.losses[name]) for name in self.ladder_names}

    def normalizer(self, name: str) -> FeatureNormalizer:
        """The target normaliser of a teacher."""
        return cast(FeatureNormalizer, self.normalizers[name])

    def teacher(self, name: str) -> Teacher:
        """A teacher by name."""
        return cast(Teacher, self.teachers[name])

    def step(
        self, batch: Batch, view: int, batch_idx: int, training: bool
    ) -> tuple[Tensor, StepRecord]:
        """Loss of one view of a batch, and the record of how it came about."""
        images = to_float(batch.views[view])
        ran = self.here()
        if training and ran:
            ran = self.dropper.select(self._step_number(batch_idx))
        allotment = self._allot(batch, ran, images) if training else None
        output: StudentOutput = self.student(images)
        seen = view if self.teacher_view is None or not training else self.teacher_view
        shown = images if seen == view else to_float(batch.views[seen])
        targets = self.targets(batch, shown, seen, ran, allotment)
        names = tuple(name for name in ran if name in self.ladder_names)
        shift = None if seen == view else view_shift(batch, view, seen)
        student_grids = [rung.grid for rung in output.rungs if rung.grid is not None]
        grids: dict[str, Grid | None] = {
            # Of a teacher of whom only some patches were kept, the others can't be resampled.
            name: targets[name].places_grid or self._grid(student_grids, targets[name].grid)
            for name in names
        }
        present = [n for n in names if allotment is None or allotment.rows[n]]
        sample = None
        if training and self.patch_share < 1.0:
            live = [grids[name] for name in names if targets[name].places is None]
            sample = PatchSample(self.patch_share, live, len(images), images.device)
        predictions = self.ladder(output.rungs, grids, present, sample and sample.of)
        rows: list[Tensor] = []
        norms: dict[str, Tensor] = {"student": mean_norm(output.features.summary)}
        for name in names:
            raw = targets[name]
            normalizer = self.normalizer(name)
            # Forward before update: UNIC standardises with the statistics before this batch.
            target = on_grid(normalizer(raw), grids[name])
            if sample is not None and raw.places is None:
                target = sample.of(target, grids[name])
            if training:
                normalizer.update(raw)
            if allotment is None:
                own, prediction, moved = batch, predictions[name], shift
            else:
                own, prediction = (
                    allotment.own(name, batch),
                    allotment.prediction(name, predictions, target),
                )
                moved = None if shift is None else allotment.part(name, shift)
            extra = {"shift": moved} if self.losses[name].uses_shift else {}
            loss = self.losses[name](at_places(prediction, raw), target, own, **extra)
            rows.append(loss if allotment is None else allotment.spread(name, loss))
            if name not in present:
                continue
            norms[f"prediction/{name}"] = mean_norm(
                predictions[name].summary, predictions[name].patches
            )
            norms[f"target/{name}"] = mean_norm(raw.summary, raw.patches)
        losses = torch.stack(rows) if rows else images.new_zeros((0, len(batch)))
        # Places that only make the batches of all ranks equal (after a change of their number).
        counted, scale = batch.positions >= 0, None
        if training and self.curriculum is not None:
            counted, scale = self.curriculum(targets, counted, self._progress())
        if training and names:
            judged, counts, means = losses.detach(), counted, losses.mean(dim=1)
            if allotment is not None:
                belongs = allotment.belongs(names)
                counts = counted & belongs
                # So that an image's hardest teacher is one of its own.
                judged = torch.where(belongs, judged, -torch.inf)
                means = allotment.means(judged, belongs)
            keep = self.dropper.keep(judged, batch.positions, self.current_epoch, names)
            keep = torch.where(counts, keep, 0.0)
            lambdas, regulariser = self.balancer(means, names)
            total, weights = weigh(losses, keep, lambdas, self.dropper.normalize)
            if self.keeps_parts:
                self._keep_parts(names, present, losses, weights)
            if scale is not None and self.dropper.normalize == "image":
                total = total * scale  # with `batch`, what is kept is the divisor already
            total = total + regulariser
            if allotment is not None:
                total = total + anchored(output, self._tokens)
        else:
            keep = torch.ones_like(losses)
            lambdas = torch.ones(len(names), device=losses.device)
            total = losses.mean() if names else losses.sum()
        absent = [name for name in self.ladder_names if training and name not in present]
        if absent:
            total = total + self.ladder.unused_zero(absent)
            if not names:  # nor was there anything to balance
                total = total + nothing_of(self.balancer, total)
        terms: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            values = term(output, batch, targets) if term.uses_teachers else term(output, batch)
            terms[name] = values.detach()
            if training:
                values = torch.where(counted, values, 0.0)
            mean = values.mean() if scale is None else scale * values.mean()
            total = total + term.weight * mean
        record = StepRecord(
            names=tuple(names),
            losses=losses.detach(),
            keep=keep.detach(),
            lambdas=lambdas.detach(),
            total=total.detach(),
            terms=terms,
            keys=batch.keys,
            norms=norms,
            images=None if allotment is None else allotment.images,
        )
        return total, record

    def here(self) -> tuple[str, ...]:
        """The teachers that this rank runs: all of them without a partition."""
        if self.partition is None:
            return self.teacher_names
        return self.partition.here(rank() if self._trainer is None else self.global_rank)

    def _allot(self, batch: Batch, names: Sequence[str], images: Tensor) -> Allotment | None:
        """Who gets what; None where every image is every teacher's, on every rank."""
        if self.claims is None and self.partition is None:
            return None
        return allot(batch, names, self.claims, self.here(), images.device)

    def _keep_parts(
        self, names: Sequence[str], present: Collection[str], losses: Tensor, weights: Tensor
    ) -> None:
        parts = torch.where(weights > 0, weights * losses, 0.0).mean(dim=1)
        for index, name in enumerate(names):
            if name not in present:
                continue
            earlier = self.kept_parts.get(name)
            self.kept_parts[name] = parts[index] if earlier is None else earlier + parts[index]

    def _step_number(self, batch_idx: int) -> int:
        """Number of this batch since the start of the run: the same on every rank."""
        if self._trainer is None:
            return batch_idx
        per_epoch = self.trainer.num_training_batches
        if isinstance(per_epoch, float) and not math.isfinite(per_epoch):
            return batch_idx
        return self.current_epoch * int(per_epoch) + batch_idx

    def _progress(self) -> float:
        """How much of the run is over, 0 to 1; 1 outside one and where its length is unknown."""
        if self._trainer is None:
            return 1.0
        total = float(self.trainer.estimated_stepping_batches)
        return min(self.trainer.global_step / total, 1.0) if math.isfinite(total) else 1.0

    def _grid(self, student: Sequence[Grid], teacher: Grid | None) -> Grid | None:
        if teacher is None or not student:
            return None
        return target_grid(student, teacher, self.grid_policy)

    def target_grid(self, name: str, image_size: Grid) -> Grid | None:
        """Where prediction and target of a teacher meet, for images of this size."""
        grid = self.teacher(name).grid_for(image_size, self.student.spec.patch_size)
        return self._grid([g for g in self.student.grids(image_size) if g is not None], grid)

    # ------------------------------------------------------------------ Lightning's hooks

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch: the mean over its views."""
        losses, records = [], []
        self.kept_parts = {}
        for view in self.student_views(len(batch.views)):
            number = view if batch.view_numbers is None else batch.view_numbers[view]
            shown = batch.first(len(batch.views[view]))
            loss, record = self.step(shown, view, batch_idx, training=True)
            losses.append(loss if self.view_weights is None else loss * self._view_weight(number))
            records.append(record)
            self._log_step(record, len(shown))
            if len({seen.shape[-1] for seen in batch.views}) > 1 or batch.view_numbers is not None:
                side = batch.views[view].shape[-1]
                self.log(f"train/loss_at/{side}", record.total, batch_size=len(shown))
        self.last_records = tuple(records)
        return torch.stack(losses).mean()

    def _view_weight(self, number: int) -> float:
        weights = self.view_weights or []
        chosen = [weights[view] for view in self.student_views(len(weights))]
        return weights[number] * len(chosen) / sum(chosen)

    def student_views(self, count: int) -> list[int]:
        """Which of ``count`` views the student learns from: all but the teachers' own.

        Raises:
            ValueError: none is left, or the teachers' is none of them.
        """
        views = [view for view in range(count) if view != self.teacher_view]
        if not views or (self.teacher_view is not None and not 0 <= self.teacher_view < count):
            raise ValueError(
                f"teacher_view={self.teacher_view} leaves the student none of {count} views: set "
                "data.train_views to a list of two or more, of which it is one (from 0 on)"
            )
        return views

    def setup(self, stage: str) -> None:
        """Learn whose the data are; of a partition's teachers load those that this rank runs."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ShardDataModule):
            self.claims = claims(data.mixture(), self.teacher_names, self.teacher_data)
        if self.partition is not None and stage == "fit":
            self.partition.check_ranks(self.trainer.world_size)
            teachers = {name: self.teacher(name) for name in self.teacher_names}
            self._told = load_own(teachers, self.here())

    def on_train_start(self) -> None:
        """After a checkpoint was restored: read the seed from its device, once; go on inside an
        epoch."""
        state = go_on(self)
        if state is None:
            return
        data = cast(ShardDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        batches = self.trainer.world_size * data.batch_size / (state.world * state.batch_size)
        for name in self.ladder_names:
            self.normalizer(name).rescale_updates(1.0 / batches)

    def on_train_epoch_start(self) -> None:
        """An epoch after one that went on in another layout has its own length again."""
        settle_lengths(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Note that the validation due after this batch has run."""
        note_validation(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the balancer that an epoch is over, and seed dropout and drop path.

        Here, since checkpoints written after the last batch or after validation are of a moment
        before the epoch's end, and Lightning resumes from them without the hooks of epochs.
        """
        if batch_idx == 0:
            self.balancer.end_epoch()
        begin_batch(self, batch_idx)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Losses on the validation set (never dropped), and features for the probes.

        Loader 0 is the validation set, loader 1 the bank of labelled images that a k-NN probe
        reads; filler rows (position −1) are marked so that nobody scores them.
        """
        if dataloader_idx == 0 and self.validate_losses:
            _, record = self.step(batch, 0, batch_idx, training=False)
            real = batch.positions >= 0
            count = int(real.sum())
            values = {n: _mean_of(record.losses[i], real) for i, n in enumerate(record.names)}
            total = torch.stack(list(values.values()) or [record.total.new_zeros(())]).mean()
            for name, term in record.terms.items():
                total = total + cast(Term, self.terms[name]).weight * _mean_of(term, real)
            # Of every teacher on every rank, in one order: where it does not run, of no image.
            counts = {f"val/loss/{n}": count if n in values else 0 for n in self.teacher_names}
            logged = {f"val/loss/{n}": value for n, value in values.items()} | {"val/loss": total}
            # Weighted with the real images: a batch that only pads a rank counts nothing. Times the
            # ranks, since Lightning takes the mean over them of these integers, rounded down.
            for key, size in {**counts, "val/loss": count}.items():
                value, size = logged.get(key, torch.zeros_like(total)), size * self._ranks()
                self.log(key, value, batch_size=size, sync_dist=True, add_dataloader_idx=False)
        features = self(batch.views[0])
        return {
            "features": features,
            "labels": batch.labels,
            "positions": batch.positions,
            "keys": batch.keys,
        }

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Summaries of the student with the keys they belong to.

        Without the patches: Lightning keeps all predictions until the end.
        """
        features = self(batch.views[0])
        return {
            "features": TokenFeatures(summary=features.summary, logits=features.logits),
            "labels": batch.labels,
            "positions": batch.positions,
            "keys": batch.keys,
        }

    def on_fit_start(self) -> None:
        """Tell the normalisers how long the run is (UNIC's momentum follows a cosine over it)."""
        accumulated = self.trainer.accumulate_grad_batches
        batches = float(self.trainer.estimated_stepping_batches) * accumulated
        epochs = self.trainer.max_epochs
        if epochs is not None and epochs > 0:  # exact where accumulation does not divide an epoch
            batches = min(batches, epochs * float(self.trainer.num_training_batches))
        if math.isfinite(batches):
            views = getattr(getattr(self.trainer, "datamodule", None), "train_views", [None])
            steps = max(len(views) - (self.teacher_view is not None), 1)
            if getattr(getattr(self.trainer, "datamodule", None), "view_mode", None) == "alternate":
                steps = 1
            for name in self.ladder_names:
                self.normalizer(name).set_total_steps(max(int(batches) * steps, 1))

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy`` (FSDP2), shard whatever is trained, and its average."""
        if self.device_mesh is None:
            return
        if self.partition is not None:
            raise ValueError(
                "partition divides teachers over the ranks of DDP, where every rank has the whole "
                "student: set trainer.strategy to ddp, or leave partition out"
            )
        parts = [self.student, self.ladder, self.balancer, *self.losses.values()]
        parts += self.terms.values()
        if self.average is not None:
            parts.append(self.average.student)
        shard_modules(parts, self.device_mesh)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring Lightning's counters to one form, whatever hook the checkpoint was written in."""
        if self._told:
            check_told(self._told, checkpoint.get("teachers"), self.teacher_names)
        read_place(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note who taught, under which licence: an export must say so. Their weights stay out."""
        write_place(self, checkpoint)
        checkpoint["teachers"] = self.teacher_facts()

    def teacher_facts(self) -> dict[str, dict[str, str]]:
        """Encoder, licence, source and fingerprint of every teacher, for checkpoints."""
        return {
            name: self._told.get(name) or facts_of(self.teacher(name))
            for name in self.teacher_names
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over what is trained, its rate scaled with the global batch."""
        trained = [
            (name, parameter)
            for name, parameter in self.named_parameters()
            if not name.startswith(("teachers.", "average."))
        ]
        groups = parameter_groups(trained)
        factory = self.optimizer_factory or default_optimizer
        optimizer = factory(groups)
        if getattr(self.trainer, "scaler", None) is None:
            fuse(optimizer)
        if self.average is not None:
            # Here, not in a hook after the batch: a checkpoint may be written between the two.
            optimizer.register_step_post_hook(self._move_average)
        scale_learning_rate(optimizer, self._global_batch(), self.lr_batch)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(float(total)):
            raise ValueError(
                "the learning rate follows the length of the run, which is unbounded here: "
                "set trainer.max_epochs or trainer.max_steps"
            )
        if not math.isfinite(float(self.trainer.num_training_batches)):
            self.trainer.fit_loop.setup_data()  # with max_steps alone nobody has asked yet
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        scheduler = self.schedule.build(optimizer, int(total), per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def _ranks(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def _move_average(self, *_: Any) -> None:
        if self.average is not None and not self.skip_step:
            self.average.update(self.student)

    def _global_batch(self) -> int:
        datamodule = getattr(self.trainer, "datamodule", None)
        batch = getattr(datamodule, "batch_size", None)
        if batch is None:
            if self.lr_batch is not None:
                log.warning(
                    "the data module has no batch_size, so the learning rate is used as it is"
                )
            return self.lr_batch or 1
        return int(batch) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    # ------------------------------------------------------------------ logging

    def _log_step(self, record: StepRecord, batch_size: int) -> None:
        """Log every term, weight, share and norm as device tensors: no synchronisation here."""
        self.log("train/loss", record.total, prog_bar=True, batch_size=batch_size)
        self.log_dict(record.values(), batch_size=batch_size)
        means = {f"epoch/loss/{n}": value for n, value in record.mean(record.losses).items()}
        if record.images is not None:  # each weighted with its own images
            for name, size in record.images.items():
                value = means.pop(f"epoch/loss/{name}")
                self.log(
                    f"epoch/loss/{name}", value, on_step=False, on_epoch=True, sync_dist=True,
                    batch_size=size * self._ranks(),
                )  # fmt: skip
        means["epoch/loss"] = record.total
        self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradient norms of student and of each teacher's part of the ladder, when logging."""
        if not self.trainer._logger_connector.should_update_logs:
            return
        values = {"train/grad_norm/student": gradient_norm(list(self.student.parameters()))}
        for name in self.ladder_names:
            parameters = self.ladder.teacher_parameters(name)
            values[f"train/grad_norm/{name}"] = gradient_norm(parameters)
        self.log_dict(values)


def default_optimizer(groups: Any) -> torch.optim.Optimizer:
    """AdamW with UNIC's settings: betas (0.9, 0.99), lr 3e-4 a batch of 256, decay 0.03."""
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.03)


def to_float(view: Tensor) -> Tensor:
    """uint8 to float in [0, 1], on the device the view is on; floats pass unchanged."""
    return view.float().div_(255.0) if view.dtype == torch.uint8 else view


def on_grid(features: TokenFeatures, grid: Grid | None) -> TokenFeatures:
    """The same features with the patches on ``grid``."""
    if features.patches is None or features.grid is None or grid is None:
        return features
    return TokenFeatures(
        summary=features.summary,
        patches=resample_patches(features.patches, features.grid, grid),
        grid=grid,
        logits=features.logits,
    )


def at_places(prediction: TokenFeatures, target: TokenFeatures) -> TokenFeatures:
    """The prediction at the patches that ``target`` has, where a cache kept only some."""
    if target.places is None or prediction.patches is None:
        return prediction
    places = target.places.unsqueeze(2).expand(-1, -1, prediction.patches.shape[2])
    return TokenFeatures(
        summary=prediction.summary,
        patches=prediction.patches.gather(1, places),
        logits=prediction.logits,
    )


def projected_widths(name: str, widths: Widths, loss: DistillationLoss) -> Widths:
    """The widths that a teacher's projectors need: of the token types that its loss reads.

    Raises:
        ValueError: the loss reads nothing that the teacher has.
    """
    read = Widths(
        *(w if t in loss.tokens else None for t, w in zip(TOKEN_TYPES, widths, strict=True))
    )
    if read == Widths(None, None):
        raise ValueError(
            f"the loss of teacher {name!r} reads only {' and '.join(loss.tokens)}, which that "
            "teacher does not have: give it another one in model.teacher_losses"
        )
    return read


def tokenwise(ladder: Ladder) -> bool:
    """Whether no projector of the ladder mixes tokens."""
    projectors = [m for m in ladder.modules() if isinstance(m, Projector)]
    return all(isinstance(projector, TokenwiseProjector) for projector in projectors)


def tokens_read(ladder: Ladder, widths: Iterable[Widths]) -> set[TokenType]:
    """The token types of the student's rungs that the ladder reads."""
    if not tokenwise(ladder):
        return set(TOKEN_TYPES)  # other kinds may mix them
    return {t for w in widths for t, width in zip(TOKEN_TYPES, w, strict=True) if width is not None}


def checked_weights(weights: list[float] | None) -> list[float] | None:
    """Weights of views as they are given.

    Raises:
        ValueError: one below 0, or none above.
    """
    if weights is not None and (
        not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0
    ):
        raise ValueError(
            f"view_weights must be 0 or more and one of them above, received {weights}"
        )
    return weights


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen ones of ``(B,)``; 0 of none."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def check_trained(ladder: Sequence[str], terms: Mapping[str, Term]) -> None:
    """Refuse a run in which nothing is learned."""
    if not ladder and not any(term.weight > 0 for term in terms.values()):
        raise ValueError(
            "no loss is left: with NoFeatureLoss for every teacher give model.terms at least one "
            "term with a weight above 0, for example a ResponseTerm"
        )


def check_names(teachers: Mapping[str, Teacher], terms: Mapping[str, Term]) -> None:
    """Refuse an empty set of teachers (unless there are terms, which may do without), and names
    that can't be parts of a log or parameter name."""
    if not teachers and not terms:
        raise ValueError(
            "no teachers: give at least one, for example "
            "--model.teachers.lite0.init_args.encoder=packaged:efficientnet_lite0"
        )
    for name in teachers:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ValueError(
                f"teacher name {name!r} must consist of letters, digits, '_' and '-' and begin "
                "with a letter: it becomes part of log and file names"
            )
