import numpy as np
import pytest
import torch

from multikd.evaluation import accuracy_interval, paired_interval


def answers(seed=0, n=1000, both=0.8, only_a=0.08, only_b=0.04):
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    a = draws < both + only_a
    b = (draws < both) | ((draws >= both + only_a) & (draws < both + only_a + only_b))
    return a, b


def test_paired_interval_equals_resampling_the_images():
    a, b = answers()
    got = paired_interval(a, b)
    difference = a.double().numpy() - b.double().numpy()
    generator = np.random.default_rng(1)
    resampled = [difference[generator.integers(0, 1000, 1000)].mean() for _ in range(20_000)]
    assert got.difference == pytest.approx(difference.mean())
    assert got.standard_error == pytest.approx(difference.std() / np.sqrt(1000))
    assert got.standard_error == pytest.approx(np.std(resampled), rel=0.03)
    assert got.low == pytest.approx(np.quantile(resampled, 0.025), abs=0.0015)
    assert got.high == pytest.approx(np.quantile(resampled, 0.975), abs=0.0015)
    assert got.low == pytest.approx(got.difference - 1.96 * got.standard_error, abs=0.002)
    assert (got.accuracy_a, got.accuracy_b) == (
        pytest.approx(a.double().mean().item()),
        pytest.approx(b.double().mean().item()),
    )
    assert got.resolved
    assert got == paired_interval(a, b)
    few = [paired_interval(a, b, resamples=9, seed=seed).low for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_paired_is_narrower_than_two_separate_intervals():
    a, b = answers()
    paired = paired_interval(a, b)
    apart = np.hypot(accuracy_interval(a).standard_error, accuracy_interval(b).standard_error)
    assert paired.standard_error < 0.8 * apart


def test_the_interval_covers_the_truth_as_often_as_it_says():
    inside = sum(
        (interval := paired_interval(*answers(seed), resamples=1000)).low <= 0.04 <= interval.high
        for seed in range(300)
    )
    assert 0.91 < inside / 300 < 0.985


def test_equal_answers_have_no_difference():
    a, _ = answers()
    got = paired_interval(a, a)
    assert (got.difference, got.standard_error, got.low, got.high) == (0, 0, 0, 0)
    assert not got.resolved


def test_swapping_changes_the_sign():
    a, b = answers()
    forth, back = paired_interval(a, b), paired_interval(b, a)
    assert forth.difference == -back.difference
    assert forth.low == pytest.approx(-back.high, abs=0.001)


def test_wilson_interval():
    got = accuracy_interval(torch.tensor([True] * 80 + [False] * 20))
    # scipy.stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert got.low == pytest.approx(0.7111708, abs=1e-6)
    assert got.high == pytest.approx(0.8666331, abs=1e-6)
    assert got.standard_error == pytest.approx(0.04)
    certain = accuracy_interval(torch.tensor([True] * 10))
    assert certain.high == 1.0
    assert certain.low < 0.75


@pytest.mark.parametrize(
    "a, b, settings, words",
    [
        ([], [], {}, "B > 0"),
        ([True, False], [True], {}, "same images"),
        ([True], [True], {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ([True], [True], {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_bad_input_says_what_was_expected(a, b, settings, words):
    tensors = (torch.tensor(a, dtype=torch.bool), torch.tensor(b, dtype=torch.bool))
    with pytest.raises(ValueError, match=words):
        paired_interval(*tensors, **settings)
