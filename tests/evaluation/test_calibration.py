import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torchmetrics.functional.classification import multiclass_calibration_error

from multikd.evaluation.calibration import (
    error_upper_bound,
    expected_calibration_error,
    reliability,
    risk_coverage,
    threshold_for_error,
)
from multikd.evaluation.decisions import bayes_decisions, decision_costs


def answers(seed=0, n=2000, classes=5, sharpness=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((2.0 * logits).softmax(1), 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(1), labels


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics_and_a_plain_loop(bins):
    probabilities, labels = answers()
    got = expected_calibration_error(probabilities, labels, bins)
    reference = multiclass_calibration_error(probabilities, labels, 5, n_bins=bins, norm="l1")
    assert got == pytest.approx(float(reference), abs=1e-6)
    total = 0.0
    rows, truth = probabilities.numpy(), labels.numpy()
    for i in range(bins):
        inside = [j for j in range(len(rows)) if i / bins < rows[j].max() <= (i + 1) / bins]
        if inside:
            accuracy = np.mean([rows[j].argmax() == truth[j] for j in inside])
            total += len(inside) * abs(accuracy - np.mean([rows[j].max() for j in inside]))
    assert got == pytest.approx(total / len(rows), abs=1e-9)
    assert got > 0.05  # these answers are overconfident
    assert sum(row.images for row in reliability(probabilities, labels, bins)) == len(rows)


def test_an_edge_belongs_to_the_bin_below():
    table = reliability(
        torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]), torch.zeros(3).long(), 4
    )
    assert [row.images for row in table] == [0, 1, 1, 1]


def test_risk_coverage_equals_the_definition():
    probabilities, labels = answers(n=300)
    confidence, answer = probabilities.max(1)
    correct = answer == labels
    curve = risk_coverage(confidence, correct)
    order = np.argsort(-confidence.numpy())
    wrong = ~correct.numpy()[order]
    risks = [wrong[: i + 1].mean() for i in range(300)]
    np.testing.assert_allclose(curve.risk.numpy(), risks, atol=1e-12)
    np.testing.assert_allclose(curve.coverage.numpy(), np.arange(1, 301) / 300, atol=1e-12)
    assert curve.area == pytest.approx(np.mean(risks), abs=1e-12)
    assert float(curve.risk[-1]) == pytest.approx(1 - correct.double().mean().item())
    assert curve.area < float(curve.risk[-1])  # confidence says something here


def test_equally_confident_images_are_answered_together():
    one = risk_coverage(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([True, True, False]))
    other = risk_coverage(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([True, False, True]))
    assert one.risk.tolist() == other.risk.tolist() == [0.0, pytest.approx(1 / 3)]
    assert one.area == other.area == pytest.approx(2 / 9)


@pytest.mark.parametrize("wrong, count", [(0, 10), (3, 50), (49, 50), (50, 50)])
def test_upper_bound_equals_scipy(wrong, count):
    # A one-sided 95 % bound is the upper end of a two-sided 90 % interval.
    reference = binomtest(wrong, count).proportion_ci(0.9, method="exact").high
    assert error_upper_bound(wrong, count) == pytest.approx(reference, abs=1e-9)
    assert error_upper_bound(0, 0) == 1.0


def test_the_threshold_keeps_its_promise_on_new_images():
    broken = 0
    for seed in range(60):
        probabilities, labels = answers(seed, n=1500)
        confidence, answer = probabilities.max(1)
        chosen = threshold_for_error(confidence[:750], (answer == labels)[:750], 0.3, 0.9)
        assert chosen.threshold is not None
        given = confidence[:750] >= chosen.threshold
        assert int(given.sum()) == chosen.answered > 50
        assert chosen.error <= chosen.error_bound <= 0.3
        # The true rate, from the probabilities that the labels were drawn with.
        truth = (probabilities.log() * 2.0 / 4.0).softmax(1).gather(1, answer[:, None])[:, 0]
        broken += float(1 - truth[confidence >= chosen.threshold].mean()) > 0.3
    assert broken <= 12  # promised: at most one in ten; 12 of 60 has probability 1 %


def test_no_threshold_is_said_so():
    chosen = threshold_for_error(torch.rand(200), torch.rand(200) < 0.5, 0.01)
    assert chosen.threshold is None
    assert chosen.coverage == 0
    perfect = threshold_for_error(torch.rand(200), torch.ones(200).bool(), 0.1)
    assert perfect.coverage == 1


def test_bayes_decisions_cost_least():
    probabilities, labels = answers(n=400)
    costs = 10 * torch.rand(5, 6, dtype=torch.float64)
    got = bayes_decisions(probabilities, costs)
    expected = [
        min(range(6), key=lambda j: sum(p[k] * float(costs[k, j]) for k in range(5)))
        for p in probabilities.tolist()
    ]
    assert got.tolist() == expected
    assert {5} < set(expected)  # abstaining is used, and not always
    paid = decision_costs(got, labels, costs)
    assert paid.tolist() == [float(costs[k, j]) for k, j in zip(labels, got, strict=True)]
    even = 1 - torch.eye(5)
    assert bayes_decisions(probabilities, even).tolist() == probabilities.argmax(1).tolist()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: expected_calibration_error(torch.ones(2, 2), torch.zeros(2).long()), "softmax"),
        (lambda: expected_calibration_error(torch.eye(2), torch.tensor([0, 2])), "received 0 to 2"),
        (lambda: expected_calibration_error(torch.eye(2), torch.tensor([0])), "received"),
        (lambda: reliability(torch.eye(2), torch.tensor([0, 1]), 0), "bins must be"),
        (lambda: risk_coverage(torch.rand(3), torch.ones(2).bool()), "both be"),
        (lambda: risk_coverage(torch.tensor([float("nan")]), torch.ones(1).bool()), "finite"),
        (lambda: threshold_for_error(torch.rand(3), torch.ones(3).bool(), 0.0), "error_rate"),
        (lambda: bayes_decisions(torch.eye(2), torch.eye(3)), r"\(2, 2\) matrix"),
        (lambda: bayes_decisions(torch.eye(2), -torch.eye(2)), "at least 0"),
        (lambda: decision_costs(torch.tensor([3]), torch.tensor([0]), torch.eye(2)), "decisions"),
    ],
)
def test_bad_input_says_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()
