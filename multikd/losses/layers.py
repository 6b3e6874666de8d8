"""Terms on feature maps: FitNets' hints and attention transfer.

Romero et al. 2015 (arXiv 1412.6550); Zagoruyko & Komodakis 2017 (arXiv 1612.03928). A student rung
meets a layer of a teacher, or its final patches, on the smaller of both grids. Shapes: B images,
N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from multikd.functional import full_precision, in_own_dtype, per_image, without_autocast
from multikd.grids import resample_patches, target_grid
from multikd.losses.term import Targets, TeacherTerm, chosen_teachers, nothing, nothing_of
from multikd.types import Batch, StudentOutput, TokenFeatures

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher


class HintTerm(TeacherTerm):
    """FitNets' hint: ``mean of (r(x_rung) − y_layer)²``, with a linear regressor ``r`` a teacher.

    The mean over patches and width stands for the paper's sum, so that the weight does not depend
    on sizes. Nothing is normalised: the regressor's bias and scale take that part.

    Args:
        weight: of this term.
        teachers: names; null: all.
        rung: of the student, among those that it returns; negative from the end.
        layer: block or stage of the teachers, negative from the end; null: their final patches (a
            summary where they have none), which alone a feature cache keeps.
    """

    def __init__(
        self,
        weight: float = 1.0,
        teachers: list[str] | None = None,
        rung: int = -1,
        layer: int | None = None,
    ) -> None:
        super().__init__(weight)
        self.asked = teachers
        self.rung = rung
        self.layer = layer
        self.names: tuple[str, ...] = ()
        self.numbers: dict[str, int] = {}
        self.regressors = nn.ModuleDict()

    @property
    def layers_of(self) -> tuple[str, ...]:
        """See ``Term``."""
        return tuple(self.numbers)

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``.

        Raises:
            ValueError: a rung or layer that is not there.
        """
        self.names = chosen_teachers(name, self.asked, teachers)
        check_rungs(name, [self.rung], len(student.widths))
        own = student.widths[self.rung]
        for teacher in self.names:
            widths = teachers[teacher].widths
            if self.layer is not None:
                self.numbers[teacher], widths = teachers[teacher].ask_layers([self.layer])[0]
            pair = (own.patches, widths.patches)
            if widths.patches is None:
                pair = (own.summary, widths.summary)
            if pair[0] is None or pair[1] is None:
                raise ValueError(
                    f"term {name!r}: the student's rung has {own} and teacher {teacher!r} has "
                    f"{widths}, which share no token type: leave this teacher out"
                )
            self.regressors[teacher] = nn.Linear(pair[0], pair[1])

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        return read_rung(output.rungs[self.rung])

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``TeacherTerm``: the mean over the teachers that ran."""
        rung = output.rungs[self.rung]
        losses = [nothing(*read_rung(rung))]
        present = [name for name in self.names if name in (targets or {})]
        with without_autocast(losses[0].device):
            losses[0] = losses[0] + nothing_of(self.regressors, losses[0])
            for name in present:
                found = read_layer(cast(Targets, targets)[name], name, self.numbers.get(name))
                s, y = meeting(rung, found)
                regressed = in_own_dtype(cast(nn.Linear, self.regressors[name]), s)
                losses.append(hint_distance(regressed, full_precision(y)) / len(present))
            return torch.stack(losses).sum(0)


class AttentionTransferTerm(TeacherTerm):
    """``mean over places of (Q_s/‖Q_s‖ − Q_t/‖Q_t‖)²``, ``Q = mean over channels of A²``.

    The published code's mean over the map (the paper writes the norm); one map for each pair of a
    rung and a layer, and the mean over pairs and teachers. No parameters.

    Args:
        weight: of this term; the paper's is 1000 and more, since a map of unit norm has small
            squares.
        teachers: names; null: all.
        rungs: of the student, among those that it returns, negative from the end.
        layers: blocks or stages of the teachers, one for each rung; null: their final patches for
            each rung, which alone a feature cache keeps.
    """

    def __init__(
        self,
        weight: float = 1000.0,
        teachers: list[str] | None = None,
        rungs: list[int] | None = None,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__(weight)
        self.asked = teachers
        self.rungs = [-1] if rungs is None else list(rungs)
        self.layers = layers
        if not self.rungs or (layers is not None and len(layers) != len(self.rungs)):
            raise ValueError(
                f"attention transfer pairs rungs with layers, received {len(self.rungs)} and "
                f"{len(layers or [])}: give as many of both, or leave layers out"
            )
        self.names: tuple[str, ...] = ()
        self.numbers: dict[str, list[int]] = {}

    @property
    def layers_of(self) -> tuple[str, ...]:
        """See ``Term``."""
        return tuple(self.numbers)

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``.

        Raises:
            ValueError: a rung or layer that is not there, or a teacher without a map.
        """
        self.names = chosen_teachers(name, self.asked, teachers)
        check_rungs(name, self.rungs, len(student.widths))
        for teacher in self.names:
            widths = [teachers[teacher].widths]
            if self.layers is not None:
                found = teachers[teacher].ask_layers(self.layers)
                self.numbers[teacher] = [number for number, _ in found]
                widths = [width for _, width in found]
            if any(w.patches is None for w in widths):
                raise ValueError(
                    f"term {name!r} compares attention maps, and teacher {teacher!r} has no "
                    "patches: name the teachers that have in its teachers"
                )

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        return [t for r in self.rungs if (t := output.rungs[r].patches) is not None]

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``TeacherTerm``."""
        losses = [nothing(*self.reads(output))]
        present = [name for name in self.names if name in (targets or {})]
        with without_autocast(losses[0].device):
            for name in present:
                numbers = self.numbers.get(name, [None] * len(self.rungs))
                for rung, layer in zip(self.rungs, numbers, strict=True):
                    y = read_layer(cast(Targets, targets)[name], name, layer)
                    s_map, y_map = (attention_map(f) for f in (output.rungs[rung], y))
                    s, t = meeting(s_map, y_map)
                    count = len(present) * len(self.rungs)
                    losses.append(attention_distance(s.squeeze(2), t.squeeze(2)) / count)
            return torch.stack(losses).sum(0)


def hint_distance(regressed: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but images: ``(B, …)`` twice → ``(B,)``."""
    return per_image((regressed - target).square().mean(-1))


def attention_map(features: TokenFeatures) -> TokenFeatures:
    """Mean square over the channels, as patches of width 1: ``(B, N, D)`` → ``(B, N, 1)``."""
    if features.patches is None:
        raise ValueError("an attention map is one of patches, and these features have none")
    squares = full_precision(features.patches).square().mean(2, keepdim=True)
    return TokenFeatures(patches=squares, grid=features.grid)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (Q_s/‖Q_s‖₂ − Q_t/‖Q_t‖₂)²`` of maps ``(B, N)`` ≥ 0: ``(B,)``.

    A map of zeros stays one, as in ``torch.nn.functional.normalize``.
    """
    s, t = (nn.functional.normalize(q, dim=1) for q in (student, teacher))
    return (s - t).square().mean(1)


def read_layer(target: TokenFeatures, name: str, layer: int | None) -> TokenFeatures:
    """A teacher's layer, or its final features.

    Raises:
        ValueError: the layer was not computed: it came from a feature cache.
    """
    if layer is None:
        return target
    if layer in target.layer_numbers:
        return target.layers[target.layer_numbers.index(layer)]
    raise ValueError(
        f"the targets of teacher {name!r} hold no layer {layer}: a feature cache keeps final "
        "features only; remove data.cache, or set layer to null"
    )


def read_rung(rung: TokenFeatures) -> list[Tensor]:
    """A rung's tensors."""
    return [t for t in (rung.summary, rung.patches) if t is not None]


def meeting(student: TokenFeatures, teacher: TokenFeatures) -> tuple[Tensor, Tensor]:
    """Both sides' patches on the smaller of their grids, ``(B, N, D)`` each; or their summaries.

    Raises:
        ValueError: a cache kept only some of the teacher's patches, or no token type is in both.
    """
    if teacher.places is not None:
        raise ValueError(
            "a term on feature maps needs all patches, and this feature cache kept some: set "
            "data.cache_storage.patch_sample to null"
        )
    s, y = student.patches, teacher.patches
    if s is None or y is None:
        if student.summary is None or teacher.summary is None:
            raise ValueError(f"{student.widths} and {teacher.widths} share no token type")
        return student.summary, teacher.summary
    if student.grid is None or teacher.grid is None or student.grid == teacher.grid:
        return s, y
    grid = target_grid([student.grid], teacher.grid, "smaller")
    return resample_patches(s, student.grid, grid), resample_patches(y, teacher.grid, grid)


def check_rungs(term: str, rungs: Sequence[int], count: int) -> None:
    """Refuse indices outside the rungs that the student returns."""
    for rung in rungs:
        if not -count <= rung < count:
            raise ValueError(
                f"term {term!r} reads rung {rung} of the student, which returns {count}: choose "
                f"from {-count} to {count - 1}, or add to model.student.rungs"
            )
