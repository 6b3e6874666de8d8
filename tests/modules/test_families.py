"""Six student families, each distilled from six teacher families at once, on every grid policy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import training as small

from multikd.grids import GridPolicy
from multikd.modules import DistillationModule
from multikd.normalizers import BatchStandardizers, EMAStandardizers, FixedStandardizers
from multikd.projectors import MLPProjectors, TransformerProjectors
from multikd.teachers import Teacher
from multikd.types import Grid

# name → (timm name, image size as a student, image size as a teacher, grid as a teacher)
FAMILIES: dict[str, tuple[str, int, int, Grid]] = {
    "vit_registers": ("vit_small_patch14_reg4_dinov2", 56, 42, (3, 3)),
    "vit_classless": ("test_vit4", 48, 80, (5, 5)),
    "swin": ("swin_tiny_patch4_window7_224", 64, 96, (3, 3)),
    "convnext": ("test_convnext", 64, 128, (4, 4)),
    "efficientnet": ("test_efficientnet", 64, 96, (3, 3)),
    "resnet": ("test_resnet", 96, 64, (2, 2)),
}
# A seventh teacher, whose summary is wider than its patches.
UNEQUAL = ("mobilenetv3_small_050", 64, (2, 2))
STUDENT_GRIDS = {
    "vit_registers": (4, 4),
    "vit_classless": (3, 3),
    "swin": (2, 2),
    "convnext": (2, 2),
    "efficientnet": (2, 2),
    "resnet": (3, 3),
}
POLICIES: list[GridPolicy] = ["teacher", "student", "smaller"]


@cache
def six_teachers() -> dict[str, Teacher]:
    made = {
        family: small.teacher(name, None if "net" in name else size, image_size=size)
        for family, (name, _, size, _) in FAMILIES.items()
    }
    made["unequal"] = small.teacher(UNEQUAL[0], image_size=UNEQUAL[1])
    return made


def weights_of(teachers: dict[str, Teacher]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, teacher in teachers.items()
        for key, value in teacher.encoder.state_dict().items()
    }


class Look(pl.Callback):
    """Gradients as the optimiser finds them, and the grids on which the ladder was asked."""

    def __init__(self) -> None:
        self.gradients: dict[str, bool] = {}
        self.finite = True
        self.grids: dict[str, Grid | None] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def note(ladder: Any, args: tuple[Any, ...]) -> None:
            self.grids = dict(args[1])

        pl_module.ladder.register_forward_pre_hook(note)  # type: ignore[operator, union-attr]

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for name, parameter in module.named_parameters():
            self.gradients[name] = parameter.grad is not None
            if parameter.grad is not None:
                self.finite &= bool(torch.isfinite(parameter.grad).all())


def expected_grid(policy: GridPolicy, student: Grid, teacher: Grid) -> Grid:
    if policy == "teacher":
        return teacher
    return student if policy == "student" else min(student, teacher)


CASES = [(family, POLICIES[i % 3]) for i, family in enumerate(FAMILIES)]


@pytest.mark.parametrize(("family", "policy"), CASES)
def test_a_step_with_six_teacher_families(family: str, policy: GridPolicy, tmp_path: Path) -> None:
    teachers = six_teachers()
    before = weights_of(teachers)
    name, size, _, _ = FAMILIES[family]
    # Between them the cases also use every kind of projector and normaliser.
    projectors = {"swin": MLPProjectors(8, 16), "resnet": MLPProjectors(8, 16)}
    settings: dict[str, Any] = {}
    if family in projectors:
        settings["projectors"] = projectors[family]
    if family == "convnext":
        settings["projectors"] = TransformerProjectors(heads=4)
    kinds = [EMAStandardizers(), BatchStandardizers(), FixedStandardizers(images=8)]
    module = small.module(
        {"name": name, "size": size, "rungs": [0, -1] if "vit" in family else "all"},
        teachers=teachers,
        target_grid=policy,
        normalizers=kinds[list(FAMILIES).index(family) % 3],
        ema_decay=0.9,
        **settings,
    )
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    look, notes = Look(), small.Notes()
    runner = small.trainer(tmp_path, look, notes)
    runner.fit(module, datamodule=small.Data([small.batch(size, count=3)]))

    assert set(notes.losses[0]) == set(teachers)
    assert all(0 < loss < 10 for loss in notes.losses[0].values())
    student_grid = STUDENT_GRIDS[family]
    grids = {t: grid for t, (_, _, _, grid) in FAMILIES.items()} | {"unequal": UNEQUAL[2]}
    assert look.grids == {t: expected_grid(policy, student_grid, g) for t, g in grids.items()}

    with_gradient = {n for n, has in look.gradients.items() if has}
    assert with_gradient == set(start) - frozen
    assert look.finite
    # Frozen are the average, and of the student at most a norm that no rung reaches.
    own = {n for n in frozen if not n.startswith("average.student.")}
    assert all(n.startswith("student.model.") and "norm" in n for n in own)
    assert own if "vit" in family else not own
    now = dict(module.named_parameters())
    moved = {n for n in start if not torch.equal(start[n], now[n])}
    assert moved >= {n for n in with_gradient if n.endswith("weight") and start[n].ndim > 1}
    assert not moved & own

    nothing_of_teachers(module, teachers)
    assert not runner.lightning_module._ddp_params_and_buffers_to_ignore
    after = weights_of(teachers)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(not teacher.encoder.training for teacher in teachers.values())


def nothing_of_teachers(module: DistillationModule, teachers: dict[str, Teacher]) -> None:
    """Not in parameters, state dict, optimiser or average."""
    theirs = {id(p) for t in teachers.values() for p in t.encoder.parameters()}
    assert len(theirs) > 100
    assert not any(p.requires_grad for t in teachers.values() for p in t.encoder.parameters())
    assert not theirs & {id(p) for p in module.parameters()}
    assert not [key for key in module.state_dict() if key.startswith("teachers.")]
    optimised = {
        id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]
    }
    assert optimised == {id(p) for p in module.parameters() if p.requires_grad}
    assert not theirs & optimised
    assert module.average is not None
    assert {k.split(".")[0] for k in module.average.state_dict()} == {"student", "updates"}


def test_widths_and_grids_are_as_unequal_as_announced() -> None:
    teachers = six_teachers()
    assert len({teacher.widths for teacher in teachers.values()}) == 6
    assert teachers["unequal"].widths.summary != teachers["unequal"].widths.patches
    for family, (_, _, size, grid) in FAMILIES.items():
        assert teachers[family].grid_for((64, 64)) == grid, family
        assert teachers[family].spec.image_size == (size, size)
    policies = {policy for _, policy in CASES}
    assert policies == set(POLICIES)
