import json

import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject, fixed

from multikd.evaluation.calibration import expected_calibration_error
from multikd.evaluation.confidence import Calibration, ece_of_rows
from multikd.evaluation.linear import logistic_regression

NAMES = ["a", "b", "c"]


def made(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    centres = 1.8 * torch.eye(3, 5)
    return centres[labels] + torch.randn(n, 5, generator=generator), labels


def subject(val=True):
    splits, rows = {}, {}
    for seed, (name, n) in enumerate([("train", 150), ("val", 400), ("test", 300)]):
        if name == "val" and not val:
            continue
        rows[name], labels = made(n, seed)
        sites = {"site": ["x", "y", "z"] * (n // 3) + ["x"] * (n % 3)}
        images = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
        splits[name] = MemorySplit(images, labels, name, classes=NAMES, metadata=sites)
    return MemorySubject(splits, features=fixed(**rows))


def test_ece_of_rows_equals_the_calibration_error():
    probabilities = torch.randn(500, 4, dtype=torch.float64).mul(2).softmax(1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0])
    probabilities[1] = torch.tensor([0.8, 0.2, 0, 0], dtype=torch.float64)
    labels = torch.randint(0, 4, (500,))
    confidence, answers = probabilities.max(1)
    rows = torch.stack([confidence, (answers == labels).double()], 1).numpy()
    for bins in (5, 10, 15):
        expected = expected_calibration_error(probabilities, labels, bins)
        assert ece_of_rows(rows, bins) == pytest.approx(expected, abs=1e-12)


def test_the_task_on_a_val_split():
    made_subject = subject()
    costs = [[0, 1, 5, 0.4], [2, 0, 1, 0.4], [1, 3, 0, 0.4]]
    task = Calibration("data", error_rate=0.25, costs=costs, groups=("site",))
    task.check(made_subject.splits, {})
    result = task.score(made_subject)
    train, val, test = (made_subject.fixed[s].summary for s in ("train", "val", "test"))
    labels = {s: made_subject.splits[s].labels for s in made_subject.splits}
    fit = logistic_regression(train, labels["train"], test, c=1.0)
    assert result.value == pytest.approx(
        expected_calibration_error(fit.probabilities, labels["test"]), abs=1e-12
    )
    assert result.statistic(result.per_sample) == result.value
    right = fit.predictions == labels["test"]
    assert result.metrics["accuracy"] == pytest.approx(float(right.double().mean()))
    # The threshold is the val split's, and what is said of the test split is measured there.
    chosen = result.details["abstention"]["chosen"]
    of_val = logistic_regression(train, labels["train"], val, c=1.0)
    confidence = of_val.probabilities.max(1).values
    given = confidence >= chosen["threshold"]
    assert int(given.sum()) == chosen["answered"]
    wrong = (of_val.predictions != labels["val"])[given].double().mean()
    assert chosen["error"] == pytest.approx(float(wrong))
    assert chosen["error"] < chosen["error_bound"] <= 0.25
    answered = fit.probabilities.max(1).values >= chosen["threshold"]
    assert result.metrics["coverage"] == pytest.approx(float(answered.double().mean()))
    assert 0.1 < result.metrics["coverage"] < 1
    assert result.metrics["error of answers"] == pytest.approx(
        float((~right)[answered].double().mean())
    )
    # Costs, one image at a time.
    total = naive = 0.0
    for p, k in zip(fit.probabilities.tolist(), labels["test"].tolist(), strict=True):
        expected = [sum(p[t] * costs[t][j] for t in range(3)) for j in range(4)]
        total += costs[k][int(np.argmin(expected))]
        naive += costs[k][int(np.argmax(p))]
    assert result.metrics["cost"] == pytest.approx(total / 300)
    assert result.metrics["cost of the most probable"] == pytest.approx(naive / 300)
    assert total < naive
    assert 0 < result.metrics["abstained by cost"] < 1
    groups = result.details["groups"]["site"]["groups"]
    assert groups["y"]["value"] == pytest.approx(
        expected_calibration_error(fit.probabilities[1::3], labels["test"][1::3])
    )
    assert json.dumps(result.details)


def test_without_a_val_split_a_part_of_train_is_held_out():
    result = Calibration("data", error_rate=0.4).score(subject(val=False))
    assert result.details["abstention"]["chosen"]["answered"] <= 32
    assert 0 < result.value < 0.3
    strict = Calibration("data", error_rate=0.001).score(subject(val=False))
    assert strict.metrics["coverage"] == 0
    assert "error of answers" not in strict.metrics
    assert strict.details["abstention"]["on_test"]["error"] is None


def test_bad_input_says_what_was_expected():
    splits = subject().splits
    with pytest.raises(ValueError, match=r"costs must be a \(3, 3\) matrix"):
        Calibration("data", costs=[[0, 1], [1, 0]]).check(splits, {})
    with pytest.raises(ValueError, match="rows of one length"):
        Calibration("data", costs=[[0, 1], [1]])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Calibration("data", error_rate=1.0)
    with pytest.raises(ValueError, match="metadata column"):
        Calibration("data", groups=("camera",)).check(splits, {})
    splits["test"].labels[0] = 7
    with pytest.raises(ValueError, match="outside its list"):
        Calibration("data").check(splits, {})
