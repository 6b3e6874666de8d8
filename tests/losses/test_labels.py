from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import training as small
from torch import Tensor

from multikd.losses import LabelLoss, NoFeatureLoss, Term
from multikd.types import Batch, StudentOutput, TokenFeatures


def output(logits: Tensor | None) -> StudentOutput:
    return StudentOutput(rungs=(), features=TokenFeatures(torch.zeros(4, 2), logits=logits))


def batch(labels: list[int], soft: Tensor | None = None) -> Batch:
    index = torch.arange(len(labels))
    keys = [str(i) for i in range(len(labels))]
    return Batch([], torch.tensor(labels), keys, index, index, index, soft_labels=soft)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_the_labelled_images(smoothing: float) -> None:
    logits = torch.randn(4, 5)
    labels = [3, -1, 0, 4]
    loss = LabelLoss(label_smoothing=smoothing)(output(logits), batch(labels))
    log_p = logits.double().numpy()
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    for i, label in enumerate(labels):
        expected = 0.0
        if label >= 0:
            expected = -(1 - smoothing) * log_p[i, label] - smoothing * log_p[i].mean()
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_soft_labels_take_the_place_of_hard_ones() -> None:
    logits = torch.randn(3, 4)
    soft = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    loss = LabelLoss()(output(logits), batch([-1, 2, -1], soft))
    expected = -(soft * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss, expected)
    assert loss[1] == 0
    hard = LabelLoss()(output(logits), batch([-1, -1, 2]))
    torch.testing.assert_close(loss[2], hard[2])


def test_an_unlabelled_nan_leaks_nothing() -> None:
    logits = torch.randn(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    loss = LabelLoss()(output(logits), batch([0, -1, 3]))
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isnan(LabelLoss()(output(logits), batch([0, 1, 3]))[1])


def test_float32_under_autocast() -> None:
    logits = torch.randn(3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LabelLoss()(output(logits), batch([0, 1, 2]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LabelLoss()(output(logits.float()), batch([0, 1, 2])))


def test_what_a_term_says_of_itself() -> None:
    term = LabelLoss(weight=0.3)
    assert isinstance(term, Term)
    assert (term.weight, term.uses_logits, term.uses_features) == (0.3, True, True)
    assert (Term().weight, Term().uses_logits) == (1.0, False)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="no classifier: set student"):
        LabelLoss()(output(None), batch([0]))
    with pytest.raises(ValueError, match=r"logits \(3, 4\), received \(3, 5\)"):
        LabelLoss()(output(torch.randn(3, 4)), batch([0, 1, 2], torch.rand(3, 5)))
    with pytest.raises(ValueError, match="0 or more, received -1"):
        LabelLoss(weight=-1)
    with pytest.raises(ValueError, match=r"\[0, 1\), received 1"):
        LabelLoss(label_smoothing=1.0)


# --- noisy labels, and several columns ----------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["generalised", "symmetric"])
def test_robust_losses_are_the_papers(kind: str, soft: bool) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    drawn = torch.softmax(torch.randn(4, 3, dtype=torch.float64), 1)
    y = drawn if soft else torch.eye(3)[[0, 2, 1, 1]]
    y = y.double()
    y[3] = 0.0
    labels = torch.tensor([0, 2, 1, -1])
    made = small.batch(count=4)
    made.labels, made.soft_labels = labels, y if soft else None
    term = LabelLoss(kind=kind, q=0.6, reverse=0.5)
    got = term(StudentOutput((), TokenFeatures(logits=logits)), made)
    assert got[3] == 0
    p = torch.softmax(logits.detach(), 1).numpy()
    for i in range(3):
        if kind == "generalised":
            expected = sum(float(y[i, k]) * (1 - p[i, k] ** 0.6) / 0.6 for k in range(3))
        else:
            logs = [max(math.log(max(float(y[i, k]), 1e-300)), -4.0) for k in range(3)]
            expected = -sum(float(y[i, k]) * math.log(p[i, k]) for k in range(3))
            expected -= 0.5 * sum(p[i, k] * logs[k] for k in range(3))
        assert got[i].item() == pytest.approx(expected, abs=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: term(StudentOutput((), TokenFeatures(logits=x)), made), logits
    )


def test_generalised_is_between_cross_entropy_and_the_absolute_error() -> None:
    logits, made = torch.randn(6, 10), small.batch()
    output = StudentOutput((), TokenFeatures(logits=logits))
    nearly = LabelLoss(kind="generalised", q=1e-4)(output, made)
    assert torch.allclose(nearly, LabelLoss()(output, made), atol=2e-3)
    p = torch.softmax(logits, 1).gather(1, made.labels.unsqueeze(1)).squeeze(1)
    assert torch.allclose(LabelLoss(kind="generalised", q=1.0)(output, made), 1 - p, atol=1e-6)


def test_each_column_has_its_own_classifier_and_weight() -> None:
    terms = {
        "labels": LabelLoss(),
        "colour": LabelLoss(0.5, column="colour", num_classes=3),
        "shape": LabelLoss(2.0, column="shape", num_classes=2),
    }
    module = small.module({"num_classes": 10}, terms=terms, loss=NoFeatureLoss(), teachers={})
    made = small.batch(count=4)
    made.columns = {
        "colour": torch.tensor([0, 2, -1, 1]),
        "shape": torch.tensor([-1, -1, 1, 0]),
    }
    total, record = module.step(made, 0, 0, training=True)
    assert record.terms["colour"][2] == 0
    assert not record.terms["shape"][:2].any()
    weighted = {"labels": 1.0, "colour": 0.5, "shape": 2.0}
    expected = sum(w * record.terms[name].mean() for name, w in weighted.items())
    assert total.item() == pytest.approx(float(expected), rel=1e-6)
    total.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    summary = module.student(made.views[0].float() / 255).features.summary
    # Under bf16-true its layer is bfloat16, and the loss float32.
    half = copy.deepcopy(module.terms["colour"]).to(torch.bfloat16)
    found = half(StudentOutput((), TokenFeatures(summary.bfloat16())), made)
    assert found.dtype == torch.float32
    assert torch.allclose(found, record.terms["colour"], atol=0.05)
    logits = module.terms["colour"].head(summary)
    assert torch.allclose(
        record.terms["colour"][[0, 1, 3]],
        torch.nn.functional.cross_entropy(
            logits[[0, 1, 3]], torch.tensor([0, 2, 1]), reduction="none"
        ),
        atol=1e-5,
    )
    made.columns = None
    with pytest.raises(ValueError, match="no label column 'colour': add it to data.label_columns"):
        module.step(made, 0, 0, training=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "symetric"}, "did you mean 'symmetric'"),
        ({"kind": "symmetric", "label_smoothing": 0.1}, "goes with cross_entropy"),
        ({"q": 0.0}, "q must be above 0"),
        ({"column": "c"}, "a label column needs num_classes"),
        ({"num_classes": 4}, "a label column needs num_classes"),
    ],
)
def test_settings_that_exclude_one_another(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LabelLoss(**settings)
