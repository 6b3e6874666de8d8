"""Which images a curriculum admits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import training as small
from torch import Tensor

from multikd.losses import Curriculum, LabelLoss, NoFeatureLoss, RandomTeachers
from multikd.losses.curriculum import difficulty
from multikd.types import TokenFeatures


def logits(*rows: float) -> Tensor:
    """Two classes, surer where the number is larger."""
    return torch.tensor([[row, 0.0] for row in rows])


def admitted(curriculum: Curriculum, progress: float, real: Tensor | None = None) -> Any:
    curriculum.names = ("a",)
    targets = {"a": TokenFeatures(logits=logits(0.1, 4.0, 2.0, 3.0, 1.0))}
    real = torch.ones(5, dtype=torch.bool) if real is None else real
    chosen, scale = curriculum(targets, real, progress)
    return chosen.tolist(), float(scale)


def test_the_easiest_share_counts_and_the_loss_is_their_mean() -> None:
    start = Curriculum(start=0.4, end=0.5, pacing="step")
    assert admitted(start, 0.0) == ([False, True, False, True, False], 2.5)
    assert admitted(start, 0.5) == ([True] * 5, 1.0)
    fillers = torch.tensor([True, False, True, True, True])  # the surest image is a filler
    assert admitted(start, 0.0, fillers) == ([False, False, True, True, False], 2.0)
    nobody = Curriculum(start=0.4)
    nobody.names = ("b",)
    chosen, scale = nobody({"a": TokenFeatures(logits=logits(1.0, 2.0))}, fillers[:2], 0.0)
    assert (chosen.tolist(), float(scale)) == ([True, False], 1.0)  # none of its teachers ran


def test_pacing() -> None:
    shares = {
        kind: [Curriculum(pacing=kind, start=0.2, end=0.5).share(p) for p in (0.0, 0.25, 0.5, 1.0)]
        for kind in ("linear", "root", "step")
    }
    assert shares["linear"] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert shares["root"] == pytest.approx([0.2, math.sqrt(0.04 + 0.96 / 2), 1.0, 1.0])
    assert shares["step"] == pytest.approx([0.2, 0.2, 1.0, 1.0])


def test_difficulty_is_entropy_or_variance_of_the_teachers() -> None:
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    p = np.stack([np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True) for x in z])
    mean = p.mean(0)
    entropy, variance = -(mean * np.log(mean)).sum(1), p.var(axis=0).sum(1)
    np.testing.assert_allclose(difficulty(z, "entropy").numpy(), entropy, atol=1e-12)
    np.testing.assert_allclose(difficulty(z, "disagreement").numpy(), variance, atol=1e-12)


def test_what_is_not_admitted_has_no_gradient() -> None:
    """The step's loss is that of a batch of the admitted images alone."""
    curriculum = Curriculum(start=0.5, end=1.0, pacing="step")
    terms = {"l": LabelLoss()}
    module = small.module({"num_classes": 10}, terms=terms, loss=NoFeatureLoss())
    module.curriculum, curriculum.names = curriculum, ("cnn",)
    batch = small.batch(count=4)
    batch.cached = {n: TokenFeatures(logits=logits(0.0, 5.0, 4.0, 1.0)) for n in small.teachers()}
    module._progress = lambda: 0.0  # type: ignore[method-assign]
    total, record = module.step(batch, 0, 0, training=True)
    own = record.terms["l"]
    assert total.item() == pytest.approx(own[[1, 2]].mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start": 0.0}, "must be above 0 and at most 1, received 0.0"),
        ({"end": 1.5}, "received 0.3 and 1.5"),
        ({"temperature": 0.0}, "temperature of a curriculum must be above 0"),
        ({"pacing": "liner"}, "did you mean 'linear'"),
        ({"measure": "variance"}, "unknown measure of difficulty"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Curriculum(**settings)


def test_teachers_without_classes_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="only 0 have a classifier: fit one"):
        small.module(curriculum=Curriculum())
    with pytest.raises(ValueError, match="unknown teacher in term 'curriculum' 'cn'"):
        small.module(curriculum=Curriculum(teachers=["cn"]), dropper=RandomTeachers())
