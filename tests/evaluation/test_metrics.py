import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix

from multikd.evaluation import metrics


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (500,), generator=generator)  # class 6 has no images
    scores[torch.arange(500), labels] += 1.5
    return scores, labels


def test_equal_independent_implementations(answers):
    scores, labels = answers
    given = scores.argmax(1)
    order = scores.argsort(dim=1, descending=True)
    for k in (1, 5):
        hits = (order[:, :k] == labels[:, None]).any(1).double().mean()
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(float(hits), abs=1e-6)
    assert metrics.mean_class_accuracy(given, labels, 7) == pytest.approx(
        balanced_accuracy_score(labels.numpy(), np.where(given == 6, 0, given)), abs=0.02
    )
    expected = confusion_matrix(labels.numpy(), given.numpy(), labels=range(7))
    assert metrics.confusion_matrix(given, labels, 7).tolist() == expected.tolist()
    per_class = metrics.per_class_accuracy(given, labels, 7)
    assert per_class[6] is None  # though it was answered
    assert int(expected[:, 6].sum()) > 0
    recalls = [expected[i, i] / expected[i].sum() for i in range(6)]
    assert per_class[:6] == pytest.approx(recalls, abs=1e-12)
    assert metrics.mean_class_accuracy(given, labels, 7) == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e3])
def test_mean_average_precision_equals_scikit_learn(scale):
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(300, 5, generator=generator) < 0.3).float()
    targets[:, 3] = 0
    scores = scale * (torch.randn(300, 5, generator=generator).double() + targets)
    scores[:40] = scores[:40].round(decimals=0)  # ties
    found = metrics.average_precisions(scores, targets)
    assert found[3] is None
    kept = [0, 1, 2, 4]
    expected = [average_precision_score(targets[:, i].numpy(), scores[:, i].numpy()) for i in kept]
    assert [found[i] for i in kept] == pytest.approx(expected, abs=1e-6)
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(
        np.mean(expected), abs=1e-6
    )


def test_resampled_precision_equals_resampling():
    generator = np.random.default_rng(0)
    targets = torch.tensor(generator.random((60, 3)) < 0.1).double()
    scores = torch.tensor(generator.normal(size=(60, 3)).round(1)) + targets
    images = generator.integers(0, 60, (50, 60))
    times = torch.tensor(np.stack([np.bincount(row, minlength=60) for row in images]))
    got = metrics.resampled_average_precision(scores, targets, times)
    expected = [metrics.mean_average_precision(scores[row], targets[row]) for row in images]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert got.std() > 0.01
    nothing = metrics.resampled_average_precision(scores, 0 * targets, times[:1])
    assert bool(nothing.isnan().all())


def test_one_class_and_bad_input(answers):
    scores, labels = answers
    assert metrics.top_k_accuracy(torch.ones(3, 1), torch.zeros(3, dtype=torch.long)) == 1.0
    for call, words in (
        (lambda: metrics.top_k_accuracy(scores, labels, 8), "from 1 to the 7 classes"),
        (lambda: metrics.top_k_accuracy(scores, labels + 2), "received 2 to 7"),
        (lambda: metrics.confusion_matrix(labels[:3], labels, 7), r"\(3,\) and \(500,\)"),
        (lambda: metrics.confusion_matrix(labels, labels, 3), "answers must be from 0 to 2"),
        (lambda: metrics.average_precisions(scores, scores), "must be 0 or 1"),
        (lambda: metrics.average_precisions(scores / 0, scores * 0), "finite"),
        (lambda: metrics.mean_average_precision(scores, scores * 0), "a class with a positive"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
