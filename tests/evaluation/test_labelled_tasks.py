"""k-NN, linear probes and few labels as tasks: what they score, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject

from multikd.evaluation import knn_predict, logistic_regression
from multikd.evaluation.calibration import expected_calibration_error
from multikd.evaluation.few_labels import FewLabels
from multikd.evaluation.few_shot import FewShot, ratio_of_rows
from multikd.evaluation.intervals import mean_interval
from multikd.evaluation.knn_task import KNN
from multikd.evaluation.labelled import labelled_rows
from multikd.evaluation.linear_task import LinearProbe, MultiLabelProbe, precision_of_rows
from multikd.evaluation.task import EncodedSplit
from multikd.types import EncoderSpec, Widths

CLASSES = ["cat", "dog", "owl", "fox", "hen", "elk"]
WIDTH = 10


def features(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(7))
    labels = labels.clamp(min=0)
    summary = centres[labels] + 1.2 * torch.randn(len(labels), WIDTH, generator=generator)
    patches = summary[:, None, :4] + torch.randn(len(labels), 9, 4, generator=generator)
    return summary, patches


def split(name, labels, **changes):
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return MemorySplit(images, labels, f"zoo/{name}", **({"classes": CLASSES} | changes))


@pytest.fixture
def zoo():
    """300 + 120 images; one of each split can't be read, one has no label."""
    splits, encoded = {}, {}
    for seed, (name, count) in enumerate((("train", 300), ("test", 120))):
        labels = torch.arange(count) % 6
        labels[3] = -1
        metadata = {"site": ["a" if i % 3 else "b" for i in range(count)]}
        splits[name] = split(name, labels, metadata=metadata)
        summary, patches = features(labels, seed)
        encoded[name] = EncodedSplit(
            summary, patches.half().numpy(), (3, 3), faults=[splits[name].keys[5]]
        )
    return MemorySubject(splits, features=encoded, name="student")


def kept(subject, name):
    """Rows that count, independently of the code under test."""
    labels = subject.splits[name].labels
    mask = labels >= 0
    mask[5] = False
    return subject.fixed[name], labels[mask], mask


def specs(subject):
    return {subject.name: subject.spec}


def test_knn_scores_readable_labelled_images_and_sweeps(zoo):
    task = KNN("zoo", ks=(20, 1, 5), temperatures=(0.07, 1.0), groups=("site",))
    task.check(zoo.splits, specs(zoo))
    result = task.score(zoo)
    (train, train_y, a), (test, test_y, b) = kept(zoo, "train"), kept(zoo, "test")
    right = knn_predict(train.summary[a], train_y, test.summary[b]) == test_y
    assert result.per_sample.tolist() == right.double().tolist()
    assert result.value == pytest.approx(float(right.double().mean()))
    assert len(result.per_sample) == 118
    assert set(result.metrics) >= {f"top1 (k {k}, τ {t})" for k in (20, 1, 5) for t in ("0.07", 1)}
    alone = knn_predict(train.summary[a], train_y, test.summary[b], k=5, temperature=1.0)
    assert result.metrics["top1 (k 5, τ 1)"] == float((alone == test_y).double().mean())
    details = result.details
    assert np.sum(details["confusion"]) == 118
    assert np.trace(details["confusion"]) == right.sum()
    assert list(details["per_class"]) == CLASSES
    groups = details["groups"]["site"]["groups"]
    sites = np.array(zoo.splits["test"].metadata["site"])[b.numpy()]
    assert groups["b"]["value"] == pytest.approx(result.per_sample[sites == "b"].mean())
    json.dumps(details, allow_nan=False)


def test_what_features_are_read(zoo):
    summary = labelled_rows(zoo, "test", "summary").x
    mean = labelled_rows(zoo, "test", "patch_mean").x
    both = labelled_rows(zoo, "test", "both").x
    mask = kept(zoo, "test")[2].numpy()
    expected = zoo.fixed["test"].patches[mask].astype(np.float32).mean(1)
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    assert both.shape[1] == summary.shape[1] + mean.shape[1]
    torch.testing.assert_close(both[:, :WIDTH].norm(dim=1).mean(), torch.tensor(1.0))
    torch.testing.assert_close(both[:, WIDTH:].norm(dim=1).mean(), torch.tensor(1.0))
    assert [r.tokens for r in KNN("zoo", features="both").requests(zoo.spec)] == [
        ("summary", "patches")
    ] * 2
    no_patches = EncoderSpec("cnn", Widths(8, None), (32, 32), 8, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="'cnn' does not have: use features=summary"):
        KNN("zoo", features="both").check(zoo.splits, {"cnn": no_patches})


def test_linear_probe_equals_the_regression_and_is_calibrated_by_its_probabilities(zoo):
    task = LinearProbe("zoo", groups=("site",))
    task.check(zoo.splits, specs(zoo))
    result = task.score(zoo)
    (train, train_y, a), (test, test_y, b) = kept(zoo, "train"), kept(zoo, "test")
    fit = logistic_regression(train.summary[a], train_y, test.summary[b], validation_fraction=0.1)
    right = (fit.predictions == test_y).double()
    assert result.per_sample.tolist() == right.tolist()
    assert result.metrics["C"] == fit.c
    assert result.metrics["ece"] == pytest.approx(
        expected_calibration_error(fit.probabilities, test_y)
    )
    top5 = (fit.probabilities.argsort(dim=1)[:, -5:] == test_y[:, None]).any(1).double().mean()
    assert result.metrics["top5"] == pytest.approx(float(top5), abs=1e-6)
    assert [c["name"] for c in result.details["curves"]] == ["validation score by C", "reliability"]
    json.dumps(result.details, allow_nan=False)


def test_equals_scikit_learn_to_the_last_prediction_and_probability(zoo):
    from sklearn.linear_model import LogisticRegression

    (train, train_y, a), (test, _, b) = kept(zoo, "train"), kept(zoo, "test")
    x, t = (e.summary[m].double() for e, m in ((train, a), (test, b)))
    mean, std = x.mean(0), x.std(0, correction=0)
    peer = LogisticRegression(C=0.1, max_iter=1000, tol=1e-8)
    peer.fit(((x - mean) / std).numpy(), train_y.numpy())
    fit = logistic_regression(x, train_y, t, c=0.1, tolerance=1e-8)
    rows = ((t - mean) / std).numpy()
    assert fit.predictions.tolist() == peer.predict(rows).tolist()
    np.testing.assert_allclose(fit.probabilities, peer.predict_proba(rows), atol=1e-9)
    two = train_y < 2
    peer.fit(((x - mean) / std)[two].numpy(), train_y[two].numpy())
    binary = logistic_regression(
        ((x - mean) / std)[two], train_y[two], torch.from_numpy(rows), c=0.1, tolerance=1e-8,
        standardise=False,
    )  # fmt: skip
    np.testing.assert_allclose(binary.probabilities, peer.predict_proba(rows), atol=1e-9)


def test_a_val_split_chooses_and_then_trains_too(zoo):
    labels = torch.arange(60) % 6
    summary, _ = features(labels, 5)
    zoo.splits["val"] = split("val", labels)
    zoo.fixed["val"] = EncodedSplit(summary)
    result = LinearProbe("zoo").score(zoo)
    (train, train_y, a), (test, test_y, b) = kept(zoo, "train"), kept(zoo, "test")
    x, y = torch.cat([train.summary[a], summary]), torch.cat([train_y, labels])
    held = torch.arange(len(x)) >= len(train_y)
    fit = logistic_regression(x, y, test.summary[b], held=held)
    assert result.per_sample.tolist() == (fit.predictions == test_y).double().tolist()
    # Fixed C needs no choice, and leaves the val split alone.
    fixed = LinearProbe("zoo", c=0.1).score(zoo)
    plain = logistic_regression(train.summary[a], train_y, test.summary[b], c=0.1)
    assert fixed.per_sample.tolist() == (plain.predictions == test_y).double().tolist()


@pytest.fixture
def tagged():
    splits, encoded = {}, {}
    for seed, (name, count) in enumerate((("train", 300), ("test", 150))):
        generator = torch.Generator().manual_seed(seed)
        tags = (torch.rand(count, 4, generator=generator) < 0.3).float()
        directions = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
        noise = torch.randn(count, WIDTH, generator=generator)
        splits[name] = split(name, tags, classes=CLASSES[:4])
        encoded[name] = EncodedSplit(tags @ directions + noise)
    return MemorySubject(splits, features=encoded)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_several_labels_by_mean_average_precision(tagged, solver):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.preprocessing import StandardScaler

    task = MultiLabelProbe("zoo", solver=solver, epochs=30, batch_size=32, tolerance=1e-8)
    task.check(tagged.splits, {})
    result = task.score(tagged)
    truth = tagged.splits["test"].labels.numpy()
    scores = result.per_sample[:, 0]
    assert result.value == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
    assert precision_of_rows(result.per_sample) == result.value
    assert 0.5 < result.value < 0.999
    if solver == "lbfgs":
        scaler = StandardScaler().fit(tagged.fixed["train"].summary.double().numpy())
        rows = scaler.transform(tagged.fixed["test"].summary.double().numpy())
        train = scaler.transform(tagged.fixed["train"].summary.double().numpy())
        for column in range(4):
            peer = LogisticRegression(C=result.metrics["C"], tol=1e-8, max_iter=1000)
            peer.fit(train, tagged.splits["train"].labels[:, column].numpy())
            np.testing.assert_allclose(scores[:, column], peer.predict_proba(rows)[:, 1], atol=2e-4)


def test_few_shot_equals_prototypes_by_hand(zoo):
    task = FewShot("zoo", ways=3, shots=4, queries=5, episodes=40, groups=("site",))
    task.check(zoo.splits, specs(zoo))
    result = task.score(zoo)
    (train, train_y, a), (test, test_y, b) = kept(zoo, "train"), kept(zoo, "test")
    bank, asked = train.summary[a].double().numpy(), test.summary[b].double().numpy()
    mean = bank.mean(0)
    bank, asked = ((x - mean) / np.linalg.norm(x - mean, axis=1)[:, None] for x in (bank, asked))
    rights = []
    for shots, queries in task.draws(train_y, test_y):
        assert len({int(c) for c in train_y[shots[:, 0]]}) == 3
        assert (train_y[shots] == train_y[shots[:, :1]]).all()
        assert (test_y[queries] == train_y[shots[:, :1]]).all()
        assert len(set(queries.flatten().tolist())) == 15
        prototypes = [bank[row].mean(0) for row in shots.numpy()]
        for place, row in enumerate(queries.numpy()):
            for query in row:
                distances = [np.sum((asked[query] - p) ** 2) for p in prototypes]
                rights.append(float(np.argmin(distances) == place))
    assert result.value == pytest.approx(np.mean(rights), abs=1e-12)
    episodes = np.reshape(rights, (40, -1)).mean(1)
    interval = mean_interval(episodes.tolist())
    assert result.metrics["episodes_low"] == pytest.approx(interval.low)
    assert interval.low < result.value < interval.high
    assert result.statistic(result.per_sample) == result.value
    assert result.per_sample[:, 1].sum() == 600
    assert 1 / 3 < result.value < 1


def test_few_labels_draws_parts_and_says_how_much_they_differ(zoo):
    task = FewLabels("zoo", fraction=0.1, draws=4)
    task.check(zoo.splits, specs(zoo))
    result = task.score(zoo)
    train_y = kept(zoo, "train")[1]
    parts = task.parts(train_y)
    for part in parts:
        assert torch.bincount(train_y[part]).tolist() == [5] * 6
    assert len({tuple(p.tolist()) for p in parts}) == 4
    assert task.parts(train_y)[0].tolist() == parts[0].tolist()
    assert result.metrics["labels"] == 30
    assert result.metrics["draws_low"] < result.value < result.metrics["draws_high"]
    assert set(np.unique(result.per_sample * 4)) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    whole = LinearProbe("zoo", c=0.1).score(zoo)
    assert result.value <= whole.value
    everything = FewLabels("zoo", fraction=1.0, draws=2).score(zoo)
    assert everything.value == pytest.approx(whole.value)


def test_mean_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = [
        (i := mean_interval(generator.normal(0.5, 0.1, 5).tolist())).low <= 0.5 <= i.high
        for _ in range(600)
    ]
    assert 0.92 < np.mean(inside) < 0.98
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([0.5])
    assert np.isnan(ratio_of_rows(np.zeros((3, 2))))


def changed(zoo, **changes):
    """The zoo with other labels, metadata or classes."""
    for key, value in changes.items():
        name, what = key.split("_")
        setattr(zoo.splits[name], what, value)
    return zoo.splits


def relabelled(zoo, name, index, label):
    labels = zoo.splits[name].labels.clone()
    labels[index] = label
    return labels


@pytest.mark.parametrize("make", [KNN, LinearProbe, FewShot, FewLabels])
def test_bad_labels_are_one_sentence_before_anything_is_extracted(zoo, make):
    task = make("zoo")
    task.check(zoo.splits, specs(zoo))
    good = {name: s.labels for name, s in zoo.splits.items()}
    outside = relabelled(zoo, "test", 7, 6)
    lost = torch.where(good["train"] == 2, -1, good["train"])
    for changes, words in (
        ({"test_labels": outside}, "go from -1 to 6, outside its list of 6 classes"),
        ({"train_labels": lost}, "class 'owl' of zoo/test has no image in zoo/train"),
        ({"test_labels": torch.full((120,), -1)}, "no image of zoo/test has a label"),
        ({"train_labels": None}, "zoo/train has no labels"),
        ({"train_labels": torch.zeros(300, 6)}, "several labels an image"),
        ({"train_labels": torch.zeros(300, dtype=torch.long)}, "images of 1 class"),
        ({"test_classes": ["x"] * 6}, "name different classes"),
    ):
        before = zoo.splits["train"].labels, zoo.splits["test"].labels, zoo.splits["test"].classes
        with pytest.raises(ValueError, match=words) as caught:
            task.check(changed(zoo, **changes), specs(zoo))
        assert "\n" not in str(caught.value)
        changed(zoo, train_labels=before[0], test_labels=before[1], test_classes=before[2])
    zoo.splits["test"] = split("test", torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="zoo/test has no images"):
        task.check(zoo.splits, specs(zoo))
    del zoo.splits["test"]
    with pytest.raises(ValueError, match="needs a test split"):
        task.check(zoo.splits, specs(zoo))


def test_what_a_task_alone_refuses(zoo):
    labels = zoo.splits["train"].labels
    single = torch.where(labels == 4, -1, labels)
    single[4] = 4
    zoo.splits["train"].labels = single
    KNN("zoo").check(zoo.splits, {})
    LinearProbe("zoo", c=0.1).check(zoo.splits, {})
    for task, words in (
        (LinearProbe("zoo"), r"class 'hen' has 1 image in zoo/train.*give c, or a val split"),
        (FewShot("zoo"), "class 'hen' has 1 image in zoo/train, and 5 shots needs 5"),
        (KNN("zoo", ks=(20, 400)), "asks 400 neighbours and zoo/train has 250"),
        (KNN("zoo", groups=("sight",)), "unknown metadata column of zoo/test 'sight'.*'site'"),
        (MultiLabelProbe("zoo"), "zoo/train has one: use LinearProbe"),
    ):
        with pytest.raises(ValueError, match=words):
            task.check(zoo.splits, {})
    zoo.splits["train"].labels = labels
    with pytest.raises(ValueError, match="7 ways with 15 queries need as many classes"):
        FewShot("zoo", ways=7).check(zoo.splits, {})


def test_a_class_without_positives_can_not_be_probed(tagged):
    tagged.splits["train"].labels[:, 1] = 0
    with pytest.raises(ValueError, match="class 'dog' has 0 images with it and 300 without"):
        MultiLabelProbe("zoo").check(tagged.splits, {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: KNN("zoo", ks=()),
        lambda: KNN("zoo", temperatures=(0.0,)),
        lambda: FewShot("zoo", ways=1),
        lambda: FewShot("zoo", episodes=1),
        lambda: FewLabels("zoo", fraction=0.0),
        lambda: FewLabels("zoo", draws=1),
        lambda: LinearProbe("zoo", solver="adam"),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="received"):
        make()
