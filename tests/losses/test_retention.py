"""The retention term against formulas in float64; what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multikd.losses import RetentionTerm
from multikd.losses.retention import Measure, retention
from multikd.types import Batch, StudentOutput, TokenFeatures, Widths


def features(seed: int, double: bool = True, width: int = 6, patches: int = 4) -> TokenFeatures:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    summary = torch.randn(3, width, generator=generator, dtype=dtype)
    rows = torch.randn(3, patches, width, generator=generator, dtype=dtype)
    return TokenFeatures(summary.requires_grad_(), rows.requires_grad_())


def batch() -> Batch:
    none = torch.full((3,), -1)
    return Batch([torch.zeros(3, 3, 8, 8)], none, ["a", "b", "c"], none, none, none)


class Student:
    feature_widths = Widths(6, 6)


class Previous:
    def __init__(self, patches: int = 6) -> None:
        self.widths = Widths(6, patches)


def by_hand(own: Tensor, before: Tensor, measure: str) -> np.ndarray:  # type: ignore[type-arg]
    a, b = own.detach().numpy(), before.detach().numpy()
    if measure == "mse":
        rows = ((a - b) ** 2).mean(-1)
    else:
        rows = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return rows if rows.ndim == 1 else rows.mean(1)


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_the_loss_is_its_formula_and_zero_for_what_it_was(measure: Measure) -> None:
    own, before = features(0), features(1)
    term = RetentionTerm(2.0, "previous", measure, summary=0.5, patches=3.0)
    term.bind("retention", Student(), {"previous": Previous()})  # type: ignore[arg-type, dict-item]
    loss = term(StudentOutput((), own), batch(), {"previous": before, "other": features(2)})
    assert own.summary is not None
    assert own.patches is not None
    expected = 0.5 * by_hand(own.summary, before.summary, measure)  # type: ignore[arg-type]
    expected += 3.0 * by_hand(own.patches, before.patches, measure)  # type: ignore[arg-type]
    assert np.abs(loss.detach().numpy() - expected).max() < 1e-12
    # Nothing goes back to the previous student, and everything to this one.
    loss.sum().backward()
    assert before.summary is not None
    assert before.summary.grad is None
    assert own.summary.grad is not None
    assert own.patches.grad is not None
    same = term(StudentOutput((), own), batch(), {"previous": own})
    assert same.abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda x: retention(x, before.patches, measure),
        (own.patches,),  # type: ignore[arg-type]
    )


def test_a_step_without_the_previous_student_has_loss_0_and_gradients_of_0() -> None:
    own = features(0, double=False)
    loss = RetentionTerm(summary=0.0)(StudentOutput((), own), batch(), {})
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))
    assert own.patches is not None
    assert own.patches.grad is not None
    assert own.patches.grad.abs().max() == 0
    assert own.summary is not None
    assert own.summary.grad is None  # not read


def test_what_it_refuses() -> None:
    for settings, said in (
        ({"measure": "l1"}, "'cosine' or 'mse'"),
        ({"summary": -1.0}, "not both 0"),
        ({"summary": 0.0, "patches": 0.0}, "not both 0"),
        ({"summary": float("nan")}, "must be finite"),
        ({"weight": -1.0}, "weight"),
    ):
        with pytest.raises(ValueError, match=said):
            RetentionTerm(**settings)  # type: ignore[arg-type]
    term = RetentionTerm(teacher="prevous")
    teachers = {"previous": Previous(), "lite0": Previous(7)}
    with pytest.raises(ValueError, match=r"'prevous'.*did you mean 'previous'"):
        term.bind("retention", Student(), teachers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'lite0', whose patches is 7 wide and the student's 6"):
        RetentionTerm(teacher="lite0").bind("retention", Student(), teachers)  # type: ignore[arg-type]
    RetentionTerm(teacher="lite0", patches=0).bind("retention", Student(), teachers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"patches of teacher 'previous' must have .*\(3, 4, 6\)"):
        RetentionTerm()(
            StudentOutput((), features(0)), batch(), {"previous": features(1, patches=9)}
        )
