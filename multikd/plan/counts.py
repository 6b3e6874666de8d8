"""Counting a step on the meta device: no weights, no memory, no images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from multikd.modules.distillation import DistillationModule
from multikd.types import Grid, StudentOutput, TokenFeatures


@dataclass(frozen=True)
class StepCounts:
    """What one image costs, and what a rank holds. FLOP are of products, attention, convolutions.

    Attributes:
        teachers: name → FLOP of its forward pass.
        heads: name → FLOP of its part of the ladder, forward.
        student: FLOP of the student's forward pass.
        backward: FLOP of the backward pass of student and ladder.
        trained: parameters that are trained.
        student_parameters, ladder_parameters: of these.
        teacher_parameters: name → parameters.
        kept: bytes that an image's forward pass keeps for the backward pass, in float32.
        targets: bytes of an image's teacher features in float32.
        averaged: parameters of the moving average, 0 without one.
    """

    teachers: dict[str, float]
    heads: dict[str, float]
    student: float
    backward: float
    trained: int
    student_parameters: int
    ladder_parameters: int
    teacher_parameters: dict[str, int]
    kept: float
    targets: float
    averaged: int = 0
    views: int = field(default=1)

    @property
    def training(self) -> float:
        """FLOP of student and ladder, forward and backward."""
        return self.student + sum(self.heads.values()) + self.backward

    @property
    def total(self) -> float:
        """FLOP of an image's step with every teacher run."""
        return self.training + sum(self.teachers.values())


def count_step(
    module: DistillationModule,
    size: Grid,
    views: int = 1,
    names: Sequence[str] | None = None,
) -> StepCounts:
    """Count a step of a module whose tensors are on the meta device.

    Args:
        module: as ``multikd.backbones.skeleton`` and ``torch.device("meta")`` built it.
        size: (H, W) of the training views.
        views: how many of them the student learns from.
        names: the teachers of a rank; None: all.

    Raises:
        ValueError: a teacher or the student does not run on the meta device.
    """
    images = torch.empty((2, 3, *size), device="meta")
    module.to("meta")  # a few constants are made on the CPU whatever the default device
    patch = module.student.spec.patch_size
    names = module.teacher_names if names is None else names
    teachers: dict[str, float] = {}
    targets: dict[str, TokenFeatures] = {}
    for name in names:
        teacher = module.teacher(name)
        try:
            teachers[name] = views * _flop(lambda t=teacher: t(images, patch)) / 2  # type: ignore[misc]
            targets[name] = teacher(images, patch)
        except Exception as error:  # a user's own encoder may do anything
            raise ValueError(
                f"teacher {name!r} can't be counted without its weights "
                f"({type(error).__name__}: {error}): plan needs encoders that run on torch's meta "
                "device"
            ) from error
    module.student.train()
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            alive.append(tensor)  # so that no other storage takes its address
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output: StudentOutput = module.student(images)
        student_grids = [rung.grid for rung in output.rungs if rung.grid is not None]
        grids = {
            name: module._grid(student_grids, features.grid) for name, features in targets.items()
        }
        predictions = module.ladder(output.rungs, grids, names)
    leaves = [p for p in module.student.parameters() if p.requires_grad]
    leaves += list(module.ladder.parameters())
    outputs = [t for p in predictions.values() for t in (p.summary, p.patches) if t is not None]
    backward = _flop(
        lambda: torch.autograd.grad(
            outputs, leaves, [torch.empty_like(t) for t in outputs], allow_unused=True
        )
    )
    held = sum(kept.values())
    alive.clear()
    heads = {
        name: views * _flop(lambda n=name: module.ladder(output.rungs, grids, [n])) / 2  # type: ignore[misc]
        for name in names
    }
    return StepCounts(
        teachers=teachers,
        heads=heads,
        student=views * _flop(lambda: module.student(images)) / 2,
        backward=views * backward / 2,
        trained=sum(
            p.numel()
            for n, p in module.named_parameters()
            if p.requires_grad and not n.startswith("average.")
        ),
        student_parameters=_parameters(module.student),
        ladder_parameters=_parameters(module.ladder),
        teacher_parameters={n: module.teacher(n).num_parameters for n in names},
        kept=held / 2,  # of one view: the steps of several follow one another
        targets=sum(_bytes([f.summary, f.patches]) for f in targets.values()) / 2,
        averaged=0 if module.average is None else _parameters(module.average),
        views=views,
    )


def combined(parts: Sequence[tuple[StepCounts, float, float]]) -> StepCounts:
    """Views of several sizes as one.

    Args:
        parts: for each view its counts, how often it comes in a step, and which share of the
            batch's images it shows.
    """
    first = parts[0][0]

    def total(values: Callable[[StepCounts], float]) -> float:
        return sum(values(counts) * often * share for counts, often, share in parts)

    return replace(
        first,
        teachers={n: total(lambda c, n=n: c.teachers[n]) for n in first.teachers},  # type: ignore[misc]
        heads={n: total(lambda c, n=n: c.heads[n]) for n in first.heads},  # type: ignore[misc]
        student=total(lambda c: c.student),
        backward=total(lambda c: c.backward),
        kept=max(counts.kept * share for counts, _, share in parts),
        targets=max(counts.targets * share for counts, _, share in parts),
        views=len(parts),
    )


def _flop(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(tensors: Sequence[Tensor | None]) -> float:
    return float(sum(4 * t.numel() for t in tensors if t is not None))
