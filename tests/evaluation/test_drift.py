import json

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics import roc_auc_score

from multikd.evaluation.drift import agreement_loss, frechet_distance, mmd, neighbour_shift
from multikd.evaluation.drift_report import (
    DISTIL,
    FINE,
    WATCH,
    DriftThresholds,
    drift_report,
    drift_text,
)


def rows(n, seed=0, width=6, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(77))
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return scale * noise @ mix.double() + 2 + shift


def test_frechet_distance_equals_scipy():
    a, b = rows(200), rows(150, 1, shift=0.5, scale=1.3)
    x, y = a.numpy(), b.numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert expected > 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # Fewer images than features: covariances without full rank.
    few, other = rows(5, 2), rows(5, 3)
    assert frechet_distance(few, other) == pytest.approx(frechet_distance(other, few), rel=1e-6)


def test_mmd_equals_the_definition_with_its_permutation_test():
    a, b = rows(25), rows(30, 1, shift=0.4)
    got = mmd(a, b, permutations=99)
    pooled = np.concatenate([a.numpy(), b.numpy()])
    distances = np.linalg.norm(pooled[:, None] - pooled[None], axis=-1)
    width = np.sort(distances[np.triu_indices(55, 1)])[(55 * 54 // 2 - 1) // 2]
    assert got.width == pytest.approx(width, rel=1e-12)
    kernel = np.exp(-(distances**2) / (2 * width**2))

    def statistic(first, second):
        def within(members):
            pairs = [kernel[i, j] for i in members for j in members if i != j]
            return sum(pairs) / (len(members) * (len(members) - 1))

        across = np.mean([kernel[i, j] for i in first for j in second])
        return within(first) + within(second) - 2 * across

    observed = statistic(range(25), range(25, 55))
    assert got.squared == pytest.approx(observed, abs=1e-12)
    generator = np.random.default_rng(0)
    drawn = [
        statistic(order[:25], order[25:])
        for order in (generator.permutation(55) for _ in range(99))
    ]
    assert got.p_value == pytest.approx((1 + sum(d >= observed for d in drawn)) / 100)


def test_the_permutation_test_keeps_its_level_and_sees_a_shift():
    same = [mmd(rows(40, s), rows(40, 1000 + s), 99).p_value for s in range(100)]
    assert 1 <= sum(p <= 0.1 for p in same) <= 20
    shifted = [mmd(rows(40, s), rows(40, 1000 + s, shift=3.0), 99).p_value for s in range(10)]
    assert max(shifted) <= 0.02


def test_neighbour_shift_equals_a_plain_loop():
    new, reference = rows(30, 1, shift=0.8), rows(50)
    got = neighbour_shift(new, reference, k=3)
    x, y = (r.numpy() / np.linalg.norm(r.numpy(), axis=1, keepdims=True) for r in (new, reference))
    far = [np.sort(np.linalg.norm(y - row, axis=1))[2] for row in x]
    own = [np.sort(np.linalg.norm(np.delete(y, i, 0) - y[i], axis=1))[2] for i in range(50)]
    assert got.new_median == pytest.approx(np.sort(far)[14], abs=1e-9)
    assert got.reference_median == pytest.approx(np.sort(own)[24], abs=1e-9)
    assert got.far == pytest.approx(np.mean(np.array(far) > np.quantile(own, 0.95)))
    assert got.auroc == pytest.approx(roc_auc_score([0] * 50 + [1] * 30, own + far))


def test_agreement_loss_has_an_honest_interval():
    generator = torch.Generator().manual_seed(0)
    old = 0.9 + 0.05 * torch.randn(400, generator=generator)
    new = 0.8 + 0.10 * torch.randn(300, generator=generator)
    got = agreement_loss(old, new)
    assert got["loss"] == pytest.approx(float(old.double().mean() - new.double().mean()))
    error = np.sqrt(old.var().item() / 400 + new.var().item() / 300)
    assert got["loss_low"] == pytest.approx(got["loss"] - 1.96 * error, abs=0.002)
    assert got["loss_high"] == pytest.approx(got["loss"] + 1.96 * error, abs=0.002)


def test_the_report_recommends_by_its_thresholds():
    reference = rows(300)
    fine = drift_report(rows(200, 1), reference, permutations=199)
    assert fine["verdict"] == FINE
    assert fine["reasons"] == []
    assert fine["images"] == {"new": 200, "reference": 300, "compared": 200}
    assert fine["neighbours"]["far"] < 0.15
    drifted = drift_report(rows(200, 1, shift=-6.0), reference, permutations=199)
    assert drifted["verdict"] == DISTIL
    assert drifted["neighbours"]["far"] > 0.3
    halves = drifted["frechet_halves"]
    assert halves["new_reference"] > 3 * halves["reference_reference"]
    assert json.loads(json.dumps(drifted)) == drifted
    for words in ("DISTIL AGAIN", "farther from the reference", "distil again", "AUROC"):
        assert words in drift_text(drifted)
    lenient = DriftThresholds(watch_far=1.0, distil_far=1.0)
    watched = drift_report(
        rows(200, 1, shift=-3.0), reference, permutations=199, thresholds=lenient
    )
    assert watched["neighbours"]["far"] < 1
    assert watched["verdict"] == WATCH


def test_a_teacher_lost_is_a_reason_of_its_own():
    generator = torch.Generator().manual_seed(0)
    old, same, less = (m + 0.05 * torch.randn(200, generator=generator) for m in (0.9, 0.9, 0.8))
    report = drift_report(
        rows(200, 1),
        rows(200),
        permutations=99,
        agreement={"clip": (old, less), "dino": (old, same)},
    )
    assert report["verdict"] == DISTIL
    assert len(report["reasons"]) == 1
    assert report["reasons"][0].startswith("agreement with clip fell by 0.09")
    assert "dino: cosine 0.8989" in drift_text(report)


def test_both_sets_are_cut_to_a_maximum():
    report = drift_report(rows(500, 1), rows(400), maximum=50, permutations=9)
    assert report["images"] == {"new": 500, "reference": 400, "compared": 50}
    assert report == drift_report(rows(500, 1), rows(400), maximum=50, permutations=9)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: drift_report(rows(5), rows(50)), "at least 12 images in both sets, received 5"),
        (lambda: frechet_distance(rows(5), rows(5, width=4)), "of one encoder"),
        (lambda: mmd(torch.full((3, 2), torch.nan), rows(3, width=2)), "finite"),
        (lambda: mmd(torch.ones(5, 2), torch.ones(5, 2)), "copies of one image"),
        (lambda: neighbour_shift(rows(5), rows(5), k=5), "k must be from 1 to 4"),
        (lambda: agreement_loss(torch.zeros(0), torch.zeros(3)), "cosine of each image"),
        (lambda: DriftThresholds(watch_far=0.5), "watch_far ≤ distil_far"),
    ],
)
def test_bad_input_says_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()
