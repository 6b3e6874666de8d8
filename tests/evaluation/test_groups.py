import numpy as np
import pytest

from multikd.evaluation.groups import group_scores, metadata_column


def made(seed=0, sizes=(400, 300, 5), rates=(0.9, 0.7, 0.0)):
    generator = np.random.default_rng(seed)
    values = np.repeat(["b", "a", "few"], sizes)
    rows = (generator.random(sum(sizes)) < np.repeat(rates, sizes)).astype(float)
    order = generator.permutation(len(rows))
    return rows[order], values[order].tolist()


def test_scores_worst_and_gap():
    rows, values = made()
    got = group_scores(rows, values)
    for name in ("a", "b", "few"):
        mine = rows[np.array(values) == name]
        assert got.groups[name].value == pytest.approx(mine.mean())
        assert got.groups[name].count == len(mine)
    # Five images say little: shown and flagged, yet never the worst.
    assert got.groups["few"].small
    assert (got.worst, got.best) == ("a", "b")
    assert got.gap == pytest.approx(got.groups["b"].value - got.groups["a"].value)
    # Independent: the normal interval of a difference of two proportions.
    a, b = got.groups["a"], got.groups["b"]
    error = np.sqrt(a.value * (1 - a.value) / 300 + b.value * (1 - b.value) / 400)
    assert got.gap_low == pytest.approx(got.gap - 1.96 * error, abs=0.012)
    assert got.gap_high == pytest.approx(got.gap + 1.96 * error, abs=0.012)
    half = 1.96 * np.sqrt(a.value * (1 - a.value) / 300)
    assert a.low == pytest.approx(a.value - half, abs=0.01)
    assert a.high == pytest.approx(a.value + half, abs=0.01)


def test_counting_draws_equals_drawing_images():
    rows, values = made()
    fast = group_scores(rows, values, resamples=3000)
    slow = group_scores(rows, values, resamples=3000, statistic=lambda r: float(r.mean()))
    for name in ("a", "b"):
        assert fast.groups[name].low == pytest.approx(slow.groups[name].low, abs=0.006)
        assert fast.groups[name].high == pytest.approx(slow.groups[name].high, abs=0.006)


def test_the_gap_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        got = group_scores(*made(seed, (200, 200, 0), (0.9, 0.7, 0)), resamples=400)
        inside += got.gap_low <= 0.2 <= got.gap_high
    assert 0.89 < inside / 200 <= 0.99


def test_a_statistic_of_rows_and_lower_is_better():
    generator = np.random.default_rng(0)
    values = ["x"] * 100 + ["y"] * 100
    rows = np.concatenate([generator.normal(0, 1, 100), generator.normal(0, 3, 100)]) ** 2
    got = group_scores(
        rows, values, statistic=lambda r: float(np.sqrt(r.mean())), higher_is_better=False
    )
    assert (got.worst, got.best) == ("y", "x")
    assert got.groups["y"].value == pytest.approx(np.sqrt(rows[100:].mean()))
    assert got.gap > 1
    assert got.gap_low > 0


def test_undefined_groups_and_missing_values():
    def precision(rows):
        return rows[:, 0].sum() / rows[:, 1].sum() if rows[:, 1].any() else float("nan")

    rows = np.array([[1, 1], [0, 1], [0, 0], [0, 0], [1, 1]], dtype=float)
    got = group_scores(rows, ["a", "a", "b", "b", " "], statistic=precision, small=1)
    assert got.groups["a"].value == 0.5
    assert got.groups["b"].value is None
    assert got.groups["b"].low is None
    assert (got.worst, got.gap, got.missing) == (None, None, 1)
    details = got.details()
    assert details["groups"]["a"]["count"] == 2
    assert details["gap"] is None


def test_the_same_seed_gives_the_same_answer():
    assert group_scores(*made()) == group_scores(*made())


@pytest.mark.parametrize(
    "rows, values, settings, words",
    [
        ([1.0], ["a", "b"], {}, "one value of the column for each image, received 2 values for 1"),
        ([1.0], [""], {}, "no image has a value"),
        ([1.0], ["a"], {"confidence": 1}, "confidence between 0 and 1"),
        ([1.0], ["a"], {"resamples": 0}, "received 0.95, 0 and 10"),
    ],
)
def test_bad_input_says_what_was_expected(rows, values, settings, words):
    with pytest.raises(ValueError, match=words):
        group_scores(rows, values, **settings)


def test_a_column_that_is_not_there():
    assert metadata_column({"site": ["x"]}, "site", "data") == ["x"]
    with pytest.raises(ValueError, match="did you mean 'site'"):
        metadata_column({"site": ["x"]}, "sites", "data")
    with pytest.raises(ValueError, match="has none"):
        metadata_column({}, "site", "data")
