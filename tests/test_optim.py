"""Parameter groups, learning-rate scaling and the schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from multikd.optim import WarmupCosine, parameter_groups, scale_learning_rate, warmup_cosine


def test_biases_and_vectors_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 2, 3))
    groups = parameter_groups(model.named_parameters())
    assert [p.ndim for p in groups[0]["params"]] == [2, 4]
    assert "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0.0
    assert len(groups[1]["params"]) == 4


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_said() -> None:
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters())
    assert sum(len(g["params"]) for g in groups) == 1
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.named_parameters())


def test_schedule_warms_up_and_ends_at_its_minimum() -> None:
    factor = warmup_cosine(10, 100, 0.01)
    values = [factor(k) for k in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert values[10] == pytest.approx(1.0)
    assert values[99] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    expected = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (54 - 10) / 89))
    assert values[54] == pytest.approx(expected)


def test_min_lr_is_absolute_after_scaling() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters()), lr=3e-4)
    scale_learning_rate(optimizer, 1024, 256)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.2e-3)
    scheduler = WarmupCosine(warmup_epochs=1, min_lr=1e-6).build(optimizer, 50, 10)
    for _ in range(49):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6, rel=1e-6)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"warmup_epochs": -1.0}, {"warmup_share": 1.0}, {"min_lr": -1e-3}, {"min_lr": math.nan}],
)
def test_wrong_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        WarmupCosine(**settings)


def test_a_warm_up_in_epochs_needs_to_know_their_length() -> None:
    assert WarmupCosine().warmup_steps(100, math.inf) == 0
    assert WarmupCosine(warmup_share=0.2).warmup_steps(100, math.inf) == 20
    with pytest.raises(ValueError, match="set warmup_share"):
        WarmupCosine(warmup_epochs=1).warmup_steps(100, math.inf)
