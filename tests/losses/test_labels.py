from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multikd.losses import LabelLoss, Term
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
