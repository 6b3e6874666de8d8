import numpy as np
import pytest
import torch

from multikd.evaluation import paired_interval
from multikd.evaluation.linear_task import precision_of_rows
from multikd.retention.matrix import (
    Measured,
    bootstrap,
    matrix_row,
    mean_kept,
    pareto,
)


def answers(rate, seed, count=800, common=None):
    """Right-or-wrong rows; ``common`` makes images that are hard for everybody."""
    draws = np.random.default_rng(seed).random(count)
    if common is not None:
        draws = 0.8 * common + 0.2 * draws
    return (draws < rate).astype(np.float64)


def measured(rows, statistic=None):
    value = rows.mean() if statistic is None else statistic(rows)
    return Measured(float(value), rows, statistic)


@pytest.fixture
def three():
    common = np.random.default_rng(9).random(800)
    return {
        "student": measured(answers(0.72, 1, common=common)),
        "good": measured(answers(0.7, 2, common=common)),
        "poor": measured(answers(0.6, 3, common=common)),
    }


def by_hand(own, best, resamples, seed=11):
    """Ratios of means over images drawn with replacement, one draw at a time."""
    generator = np.random.default_rng(seed)
    ratios, gaps = [], []
    for _ in range(resamples):
        images = generator.integers(0, len(own), len(own))
        ratios.append(own[images].mean() / best[images].mean())
        gaps.append(own[images].mean() - best[images].mean())
    return [np.quantile(x, [0.025, 0.975]) for x in (ratios, gaps)]


def test_share_kept_equals_resampling_by_hand(three):
    row = matrix_row(three, ["poor", "good"], resamples=4000)
    own, best = three["student"].rows, three["good"].rows
    assert row.best_teacher == "good"
    assert row.best_value == best.mean()
    kept = row.kept["student"]
    assert set(row.kept) == {"student"}
    assert kept.share == pytest.approx(own.mean() / best.mean())
    assert kept.difference == pytest.approx(own.mean() - best.mean())
    ratio, gap = by_hand(own, best, 4000)
    assert [kept.low, kept.high] == pytest.approx(ratio, abs=0.004)
    assert [kept.difference_low, kept.difference_high] == pytest.approx(gap, abs=0.003)
    # The repository's interval for right-or-wrong answers says the same of the difference.
    paired = paired_interval(torch.tensor(own > 0), torch.tensor(best > 0))
    assert [kept.difference_low, kept.difference_high] == pytest.approx(
        [paired.low, paired.high], abs=0.003
    )


def test_pairing_makes_it_narrower(three):
    paired = matrix_row(three, ["good"]).kept["student"]
    alone = dict(three)
    alone["good"] = measured(np.random.default_rng(0).permutation(three["good"].rows))
    apart = matrix_row(alone, ["good"]).kept["student"]
    assert paired.high - paired.low < 0.8 * (apart.high - apart.low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        common = np.random.default_rng(1000 + seed).random(300)
        kept = matrix_row(
            {
                "s": measured(answers(0.6, 2 * seed, 300, common)),
                "t": measured(answers(0.6, 2 * seed + 1, 300, common)),
            },
            ["t"],
            resamples=400,
            seed=seed,
        ).kept["s"]
        inside += kept.low <= 1 <= kept.high
    assert 0.90 < inside / 200 < 0.99


def test_lower_is_better_turns_the_share_around():
    errors = np.random.default_rng(0).random(500) + 0.5
    row = matrix_row(
        {
            "student": measured(errors * 1.25),
            "bad": measured(errors * 2),
            "best": measured(errors),
        },
        ["bad", "best"],
        higher_is_better=False,
    )
    assert row.best_teacher == "best"
    kept = row.kept["student"]
    assert (kept.share, kept.low, kept.high) == pytest.approx((0.8, 0.8, 0.8))
    assert kept.difference == pytest.approx(0.25 * errors.mean())


def root_mean_square(rows):
    return float(np.sqrt((rows**2).mean()))


def test_other_statistics_see_the_same_images(three):
    """An RMSE of rows twice as large is twice as large in every draw: the ratio has no spread."""
    rows = np.random.default_rng(0).normal(size=(300, 2))
    row = matrix_row(
        {
            "student": measured(2 * rows, root_mean_square),
            "teacher": measured(rows, root_mean_square),
            "plain": measured(np.abs(rows[:, 0])),
        },
        ["teacher"],
        higher_is_better=False,
        resamples=200,
    )
    kept = row.kept["student"]
    assert (kept.share, kept.low, kept.high) == pytest.approx((0.5, 0.5, 0.5))
    assert kept.difference_low < kept.difference < kept.difference_high
    # A mean and a statistic that is a mean are drawn alike.
    same = bootstrap(
        {"a": measured(rows[:, 0]), "b": measured(rows[:, 0], lambda r: r.mean())}, 100, 3
    )
    np.testing.assert_allclose(same["a"], same["b"])


def each_draw(rows):
    return precision_of_rows(rows)


def test_a_statistic_of_all_draws_at_once_is_the_same():
    rows = np.random.default_rng(0).random((80, 2, 3))
    rows[:, 1] = rows[:, 1] < 0.3
    found = bootstrap(
        {"once": measured(rows, precision_of_rows), "each": measured(rows, each_draw)},
        40,
        5,
    )
    np.testing.assert_allclose(found["once"], found["each"], atol=1e-6)
    assert found["once"].std() > 0.005


def test_what_is_not_defined_is_none(three):
    def row(own, teacher, **settings):
        found = matrix_row({"s": own, "t": teacher}, ["t"], resamples=50, **settings)
        return found.kept["s"]

    some = measured(np.array([1.0, 0.0] * 50))
    assert row(some, Measured(0.0, np.zeros(100))).share is None
    assert row(Measured(-0.2), Measured(0.5)).share is None
    assert row(Measured(0.0), Measured(0.5), higher_is_better=False).share is None
    without = row(Measured(0.4), some)
    assert (without.share, without.low, without.difference_low) == (0.8, None, None)
    # Of other images nothing can be paired, though each has its own interval.
    unpaired = matrix_row({"s": measured(np.ones(60)), "t": some}, ["t"], resamples=50)
    assert unpaired.kept["s"].low is None
    assert set(unpaired.values) == {"s", "t"}
    alone = matrix_row({"s": some}, [], resamples=50)
    assert (alone.best_teacher, alone.kept["s"].share) == (None, None)
    assert "s" in alone.values

    def undefined(rows):
        raise ValueError("no positives")

    assert matrix_row({"s": Measured(0.5, np.ones(9), undefined)}, []).values == {}
    for settings in ({"resamples": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="at least 1 resample"):
            matrix_row(three, [], **settings)


def test_mean_over_tasks_draws_one_data_set_once(three):
    """Two tasks with the same rows: their mean is as uncertain as one, unless data sets differ."""
    one = matrix_row(three, ["good"], data="a")
    other = matrix_row(three, ["good"], data="b")
    share = one.kept["student"]
    same = mean_kept([one, one], "student")
    assert (same.share, same.low, same.high) == pytest.approx((share.share, share.low, share.high))
    apart = mean_kept([one, other], "student")
    assert apart.high - apart.low < 0.85 * (same.high - same.low)
    assert (apart.tasks, apart.drawn) == (2, 2)
    fixed = matrix_row({"student": Measured(0.5), "good": Measured(1.0)}, ["good"])
    with_fixed = mean_kept([one, fixed, matrix_row(three, [])], "student")
    assert with_fixed.share == pytest.approx((share.share + 0.5) / 2)
    assert with_fixed.low == pytest.approx((share.low + 0.5) / 2)
    assert (with_fixed.tasks, with_fixed.drawn) == (2, 1)
    assert mean_kept([], "student").share is None


def test_pareto_front():
    points = pareto(
        {"a": 0.9, "b": 0.8, "c": 0.95, "d": 0.8, "twin": 0.9, "free": 0.1},
        {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0, "twin": 2.0},
    )
    assert [p.encoder for p in points] == ["d", "a", "twin", "b", "c"]
    assert {p.encoder for p in points if p.on_front} == {"d", "a", "twin", "c"}
