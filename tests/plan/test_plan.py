"""Counts against sums by hand and against a real step; the fit of the cost model; the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import training as small
from torch.utils.flop_counter import FlopCounterMode

from multikd.backbones import skeleton
from multikd.cli import main
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.modules import DistillationModule
from multikd.plan.commands import count_views
from multikd.plan.counts import count_step
from multikd.plan.model import (
    HARDWARE,
    Coefficients,
    fit_coefficients,
    gradient_seconds,
    memory_bytes,
    step_seconds,
    terms,
)
from multikd.projectors import MLPProjectors


def make(device: str) -> DistillationModule:
    with skeleton(), torch.device(device):
        return DistillationModule(
            {"a": small.teacher("test_vit", 32), "b": small.teacher("test_resnet", 64)},
            small.student(),
            projectors=MLPProjectors(8, 16),
        )


def test_counts_are_those_of_a_real_step() -> None:
    counts = count_step(make("meta"), (32, 32))
    module = make("cpu").train()
    for name in module.teacher_names:
        module.normalizer(name).set_total_steps(10)
    data = small.batch(count=4)
    with FlopCounterMode(display=False) as counter:
        total, _ = module.step(data, 0, 0, training=True)
        total.backward()
    # The loss has no products; the student's final norm and head are not reached.
    assert 4 * counts.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counts.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert set(counts.teachers) == set(counts.heads) == {"a", "b"}
    assert counts.kept > 0
    held = memory_bytes(counts, 8)
    assert held["weights, gradients, AdamW"] == 16 * counts.trained
    assert memory_bytes(counts, 16)["activations"] == 2 * held["activations"]


def test_the_fit_finds_the_coefficients_that_made_the_times() -> None:
    counts = count_step(make("meta"), (32, 32))
    truth = Coefficients(1.5, 2.0, 3.0, 0.01)
    rng = np.random.default_rng(0)
    rows, seconds = [], []
    for batch in (2, 4, 8, 16, 32, 64):
        row = [x * rng.uniform(0.5, 2) for x in terms(counts, batch, 1e9, 1e9)[:3]] + [1.0]
        rows.append(row)
        seconds.append(float(np.dot(row, (1.5, 2.0, 3.0, 0.01))))
    found = fit_coefficients(rows, seconds)
    assert found.teachers == pytest.approx(truth.teachers, rel=1e-6)
    assert found.training == pytest.approx(truth.training, rel=1e-6)
    assert found.optimizer == pytest.approx(truth.optimizer, rel=1e-6)
    assert found.fixed == pytest.approx(truth.fixed, rel=1e-6)
    # A part that would need a negative coefficient gets none.
    worse = fit_coefficients(rows, [s - 0.0102 for s in seconds])
    assert worse.fixed == 0.0
    assert min(worse.teachers, worse.training, worse.optimizer) >= 0
    with pytest.raises(ValueError, match="four or more"):
        fit_coefficients(rows[:3], seconds[:3])
    parts = step_seconds(counts, 8, 1e9, 1e9, truth)
    assert sum(parts.values()) == pytest.approx(
        float(np.dot(terms(counts, 8, 1e9, 1e9), (1.5, 2.0, 3.0, 0.01)))
    )


def test_gradients_are_sent_within_a_machine_or_between() -> None:
    counts, gpu = count_step(make("meta"), (32, 32)), HARDWARE["h100"]
    assert gradient_seconds(counts, gpu, 1) == 0
    assert gradient_seconds(counts, gpu, 8) == pytest.approx(1.75 * 4 * counts.trained / 450e9)
    assert gradient_seconds(counts, gpu, 64) > 5 * gradient_seconds(counts, gpu, 8)


def test_the_command_plans_a_published_recipe_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plan.json"
    assert main(["plan", "unic_vitb16_imagenet", "--gpus", "h100", "--json", str(target)]) == 0
    text = capsys.readouterr().out
    assert "PREDICTION, not measured" in text
    assert "64 × H100" in text
    figures = json.loads(target.read_text())
    # ViT-B/16 at 224 px: 17.6 GMAC a pass as published, twice that in FLOP.
    assert figures["counts"]["teachers"]["dino"] == pytest.approx(2 * 17.5e9, rel=0.03)
    assert figures["counts"]["student_parameters"] == pytest.approx(85.8e6, rel=0.01)
    # Hidden 768 on eleven rungs and 3072 on the last, for two token types and four teachers.
    hidden = 11 * 768 + 3072
    ladder = 8 * (2 * 768 * hidden + hidden + 12 * 768)
    assert figures["counts"]["ladder_parameters"] == ladder
    head = 197 * 2 * 2 * 768 * hidden
    assert figures["counts"]["heads"]["dino"] == pytest.approx(head, rel=1e-6)
    assert sum(figures["share"].values()) == pytest.approx(1.0, abs=0.02)
    eight, many = figures["predictions"]
    assert eight["images_per_second"] < many["images_per_second"] <= 8 * eight["images_per_second"]
    assert main(["plan", "unic_vitb16_imagenet", "--gpus", "v900"]) == 2
    assert "unknown GPU 'v900'" in capsys.readouterr().err


def test_groups_of_a_partition_and_views_of_several_sizes() -> None:
    module = make("meta")
    whole = count_step(module, (32, 32))
    parts = {name: count_step(module, (32, 32), 1, [name]) for name in ("a", "b")}
    for name, part in parts.items():
        assert part.teachers == {name: whole.teachers[name]}
        assert part.heads == {name: whole.heads[name]}
        assert part.trained == whole.trained  # the ladder is whole on every rank
        assert part.total < whole.total
        held = memory_bytes(part, 8)
        assert held["teachers"] == 2 * whole.teacher_parameters[name]
        assert held["activations"] < memory_bytes(whole, 8)["activations"]
    high = count_step(module, (64, 64))
    views = [LightViews(32), LightViews(64)]
    together = ShardDataModule("x", train_views=views, batch_size=8, view_images=[None, 2])
    found = count_views(module, together, None)
    assert found.student == pytest.approx(whole.student + high.student / 4)
    assert found.teachers["a"] == pytest.approx(1.25 * whole.teachers["a"])  # at its own size
    assert found.kept == pytest.approx(max(whole.kept, high.kept / 4))
    turns = ShardDataModule(
        "x", train_views=views, batch_size=8, view_mode="alternate", view_shares=[3, 1]
    )
    found = count_views(module, turns, None)
    assert found.backward == pytest.approx(0.75 * whole.backward + 0.25 * high.backward)
    assert found.kept == high.kept
