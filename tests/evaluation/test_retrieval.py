import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject, fixed
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import retrieval_average_precision

from multikd.evaluation.retrieval import Retrieval, rank_gallery


def made(n, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 1.5 * torch.randn(n, 6, generator=generator), labels


def cosine(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


@pytest.mark.parametrize("chunk", [7, 256])
def test_average_precision_equals_torchmetrics_scikit_learn_and_a_loop(chunk):
    (gallery, names), (queries, asked) = made(80, 0), made(30, 1)
    got = rank_gallery(gallery, names, queries, asked, chunk=chunk)
    similarity = cosine(queries, gallery)
    for i in range(30):
        relevant = (names == asked[i]).numpy()
        reference = average_precision_score(relevant, similarity[i])
        assert got.average_precision[i] == pytest.approx(reference, abs=1e-9)
        metric = retrieval_average_precision(
            # It takes scores of 0 and below for not retrieved.
            torch.from_numpy(similarity[i] + 2),
            torch.from_numpy(relevant),
        )
        assert got.average_precision[i] == pytest.approx(float(metric), abs=1e-6)
        order = np.argsort(-similarity[i], kind="stable")
        hits, total = 0, 0.0
        for rank, j in enumerate(order, 1):
            if relevant[j]:
                hits += 1
                total += hits / rank
        assert got.average_precision[i] == pytest.approx(total / hits, abs=1e-12)
        assert got.first_relevant[i] == 1 + int(np.flatnonzero(relevant[order])[0])


def test_a_query_among_its_gallery_leaves_itself_out():
    rows, labels = made(50, 2)
    labels[7] = 99  # alone in its class
    got = rank_gallery(rows, labels, rows, labels, same=True, chunk=8)
    for i in range(50):
        others = [j for j in range(50) if j != i]
        one = rank_gallery(rows[others], labels[others], rows[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(
            got.average_precision[i : i + 1], one.average_precision, equal_nan=True
        )
        torch.testing.assert_close(
            got.first_relevant[i : i + 1], one.first_relevant, equal_nan=True
        )
    assert torch.isnan(got.average_precision[7])


def test_equally_near_images_rank_by_index():
    ones = torch.ones(4, 3)
    got = rank_gallery(ones, torch.tensor([0, 1, 0, 1]), ones[:2], torch.tensor([0, 1]))
    assert got.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])
    assert got.first_relevant.tolist() == [1, 2]


def subject(same=False):
    (gallery, names), (queries, asked) = made(80, 0), made(40, 1)
    asked[3], names[5] = -1, -1
    images = torch.zeros(80, 3, 4, 4, dtype=torch.uint8)
    sites = {"site": ["north", "south"] * 20}
    splits = {
        "train": MemorySplit(images, names),
        "test": MemorySplit(images[:40], asked, metadata=sites),
    }
    return MemorySubject(splits, features=fixed(train=gallery, test=queries))


def test_the_task():
    made_subject = subject()
    task = Retrieval("data", groups=("site",))
    task.check(made_subject.splits, {})
    result = task.score(made_subject)
    encoded, splits = made_subject.fixed, made_subject.splits
    rows = [i for i in range(40) if i != 3]
    # The unlabelled gallery image ranks among the others and is relevant to none.
    expected = rank_gallery(
        encoded["train"].summary,
        torch.where(splits["train"].labels < 0, -7, splits["train"].labels),
        encoded["test"].summary[rows],
        splits["test"].labels[rows],
    )
    assert result.value == pytest.approx(float(expected.average_precision.mean()), abs=1e-12)
    assert np.isnan(result.per_sample[3])
    assert np.isnan(result.per_sample).sum() == 1
    assert result.statistic(result.per_sample) == result.value
    assert 0 < result.metrics["recall@1"] <= result.metrics["recall@5"] <= 1
    assert set(result.details["groups"]["site"]["groups"]) == {"north", "south"}

    own = Retrieval("data", gallery="test")
    own.check({"test": splits["test"]}, {})
    expected = rank_gallery(
        encoded["test"].summary,
        splits["test"].labels,
        encoded["test"].summary,
        splits["test"].labels,
        same=True,
    )
    rows = torch.arange(40) != 3
    assert own.score(made_subject).value == pytest.approx(
        float(expected.average_precision[rows].mean())
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rank_gallery(*made(5, 0), torch.ones(2, 3), torch.zeros(2)), "of one width"),
        (lambda: rank_gallery(*made(5, 0), torch.ones(2, 6), torch.zeros(3)), "received 5 \\+ 3"),
        (lambda: rank_gallery(*made(0, 0), *made(5, 0)), "at least 1, received 0 images"),
        (lambda: Retrieval("data", k=()), "k and chunk"),
    ],
)
def test_bad_input_says_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_nothing_to_find_is_refused_before_extraction():
    splits = subject().splits
    with pytest.raises(ValueError, match="did you mean 'site'"):
        Retrieval("data", groups=("sites",)).check(splits, {})
    splits["train"].labels[:] = 17
    with pytest.raises(ValueError, match="nothing to find"):
        Retrieval("data").check(splits, {})
    splits["test"].labels = torch.arange(40)
    with pytest.raises(ValueError, match="nothing to find"):
        Retrieval("data", gallery="test").check(splits, {})
    splits["test"].labels = None
    with pytest.raises(ValueError, match="needs one label"):
        Retrieval("data").check(splits, {})
