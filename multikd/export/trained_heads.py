"""The ladders of a checkpoint, one teacher each, with their normalisers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from multikd.backbones import skeleton
from multikd.checkpoints import TrainedStudent
from multikd.errors import unknown_name
from multikd.grids import target_grid
from multikd.imports import only_allowed
from multikd.ladder import Ladder
from multikd.losses.feature import DistillationLoss, FeatureLoss
from multikd.normalizers import EMAStandardizers, FeatureNormalizer, NormalizerFactory
from multikd.projectors import (
    MLPProjectors,
    Projector,
    ProjectorFactory,
)
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.types import TOKEN_TYPES, Grid, StudentOutput, TokenFeatures, Widths

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedHead:
    """One teacher's ladder as it was trained.

    Attributes:
        name: the teacher's name in the run.
        ladder: of this teacher alone; it predicts standardised features.
        normalizer: with the statistics of the run.
        grid: where its patches are predicted for images of the student's own size; None where
            training did not resample the rungs.
        facts: encoder, licence, source and fingerprint of the teacher.
    """

    name: str
    ladder: Ladder
    normalizer: FeatureNormalizer
    grid: Grid | None
    facts: Mapping[str, str]

    @property
    def projectors(self) -> dict[int, Projector]:
        """Rung → projector."""
        own = cast(nn.ModuleDict, self.ladder.projectors[self.name])
        return {int(rung): cast(Projector, projector) for rung, projector in own.items()}


def trained_heads(trained: TrainedStudent, names: Sequence[str]) -> list[TrainedHead]:
    """The ladders of these teachers, with their normalisers, out of a checkpoint.

    Raises:
        ValueError: no such teacher, or a run that trained no ladder.
    """
    settings: dict[str, Any] = trained.config["model"].get("init_args", {})
    known = tuple(settings.get("teachers") or ())
    for name in names:
        if name not in known:
            raise unknown_name("head", name, known, "(heads are called as the run's teachers)")
    state: dict[str, Tensor] = trained.checkpoint.get("state_dict", {})
    heads = []
    for name in names:
        normalizer = _normalizer(settings, state, name)
        factory = _instantiate(ProjectorFactory, settings.get("projectors")) or MLPProjectors()
        loss = _loss(settings, name)
        normalizer.raw = loss.raw
        widths = {name: _projected(name, normalizer.widths, loss)}
        ladder = Ladder(trained.student.widths, widths, factory)
        _load(ladder, name, _part(state, f"ladder.projectors.{name}."))
        facts = trained.teachers.get(name, {})
        grid = _grid(trained.student, settings, name, normalizer.widths)
        heads.append(TrainedHead(name, ladder, normalizer.eval(), grid, facts))
    return heads


def predict(head: TrainedHead, output: StudentOutput) -> TokenFeatures:
    """The unfolded way: the trained ladder, then the normaliser's ``inverse``."""
    prediction = head.ladder(output.rungs, {head.name: head.grid})[head.name]
    return head.normalizer.inverse(prediction)


def _normalizer(settings: dict[str, Any], state: dict[str, Tensor], name: str) -> FeatureNormalizer:
    own = _part(state, f"normalizers.{name}.")
    if not own or not _part(state, f"ladder.projectors.{name}."):
        raise ValueError(
            f"this checkpoint holds no ladder for teacher {name!r}: heads need a run of "
            "multikd.modules.DistillationModule"
        )
    sizes = (own.get(f"{token}_mean") for token in TOKEN_TYPES)
    widths = Widths(*(None if mean is None else int(mean.shape[0]) for mean in sizes))
    factory = _instantiate(NormalizerFactory, settings.get("normalizers")) or EMAStandardizers()
    normalizer = factory.build(widths)
    normalizer.load_state_dict(own)
    return normalizer


def _loss(settings: dict[str, Any], name: str) -> DistillationLoss:
    chosen = (settings.get("teacher_losses") or {}).get(name) or settings.get("loss")
    return _instantiate(DistillationLoss, chosen) or FeatureLoss()


def _projected(name: str, widths: Widths, loss: DistillationLoss) -> Widths:
    from multikd.modules.distillation import projected_widths  # brings Lightning with it

    return projected_widths(name, widths, loss)


def _grid(
    student: StudentEncoder, settings: dict[str, Any], name: str, widths: Widths
) -> Grid | None:
    if widths.patches is None:
        return None
    size = student.spec.image_size
    own = [rung.grid for rung in _rungs(student) if rung.grid is not None]
    try:
        # Shapes alone: no weights are fetched, and none take memory.
        with skeleton(), torch.device("meta"):
            teacher = _instantiate(Teacher, settings["teachers"][name])
            grid = None if teacher is None else teacher.grid_for(size, student.spec.patch_size)
    except Exception as error:  # a user's own teacher may raise anything
        log.warning(
            "teacher %s can't be built here (%s): its head uses the student's grid", name, error
        )
        grid = None
    if grid is None:
        return own[-1] if own else None
    return target_grid(own, grid, settings.get("target_grid") or "smaller") if own else None


def _rungs(student: StudentEncoder) -> list[TokenFeatures]:
    return [TokenFeatures(grid=grid) for grid in student.grids(student.spec.image_size)]


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load(ladder: Ladder, name: str, part: Mapping[str, Tensor]) -> None:
    try:
        cast(nn.ModuleDict, ladder.projectors[name]).load_state_dict(dict(part))
    except RuntimeError as error:
        raise ValueError(
            f"the ladder of teacher {name!r} does not fit its config "
            f"({' '.join(str(error).split())[:160]}): export with the version that trained it"
        ) from error
    ladder.eval().float()


def _instantiate(base: type[Any], settings: dict[str, Any] | None) -> Any:
    """An object of the typed config, or None where the config leaves it to the default."""
    if not settings:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "object")
    with only_allowed():
        return parser.instantiate(parser.parse_object({"object": settings})).object
