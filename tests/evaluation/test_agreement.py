import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject, fixed

from multikd.evaluation.agreement import linear_cka, mutual_neighbours, prediction_cosine
from multikd.evaluation.agreement_tasks import CKA, HeadCosine, MutualNeighbours
from multikd.evaluation.task import EncodedSplit, NotApplicable


def hsic_cka(a, b):
    """CKA with explicit centring matrices: tr(K H L H)."""
    n = len(a)
    h = np.eye(n) - np.ones((n, n)) / n
    gram_a, gram_b = a @ a.T, b @ b.T

    def hsic(x, y):
        return np.trace(x @ h @ y @ h) / (n - 1) ** 2

    return hsic(gram_a, gram_b) / np.sqrt(hsic(gram_a, gram_a) * hsic(gram_b, gram_b))


@pytest.mark.parametrize("n, widths", [(40, (7, 12)), (10, (30, 20)), (20, (5, 64))])
def test_cka_equals_the_definition(n, widths):
    a = torch.randn(n, widths[0]).double() + 3
    b = a @ torch.randn(widths[0], widths[1]).double() + torch.randn(n, widths[1]).double() - 1
    got = linear_cka(a, b)
    assert got == pytest.approx(hsic_cka(a.numpy(), b.numpy()), abs=1e-9)
    assert 0.05 < got < 0.999
    assert got == pytest.approx(linear_cka(b, a))
    rotation = torch.linalg.qr(torch.randn(widths[0], widths[0]).double())[0]
    assert linear_cka(a, 5 * a @ rotation + 2) == pytest.approx(1, abs=1e-9)


def test_mutual_neighbours_equal_a_plain_loop():
    a = torch.randn(60, 8)
    b = torch.cat([a[:, :5], torch.randn(60, 4)], dim=1)
    got = mutual_neighbours(a, b, k=7)
    for i in range(60):
        sets = []
        for rows in (a.double().numpy(), b.double().numpy()):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            near = [j for j in np.argsort(-(unit @ unit[i]), kind="stable") if j != i]
            sets.append(set(near[:7]))
        assert got[i] == pytest.approx(len(sets[0] & sets[1]) / 7)
    assert 0.2 < got.mean() < 0.9
    assert mutual_neighbours(a, 3 * a, k=7).min() == 1


def test_copies_of_an_image_do_not_upset_neighbours():
    a = torch.cat([torch.ones(5, 3), torch.randn(10, 3)])
    assert mutual_neighbours(a, a, k=2).min() == 1


def test_prediction_cosine():
    a, b = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    expected = torch.cosine_similarity(a.double(), b.double(), dim=-1)
    torch.testing.assert_close(prediction_cosine(a, b), expected.mean(1))
    torch.testing.assert_close(prediction_cosine(a[:, 0], b[:, 0]), expected[:, 0])


@pytest.fixture
def encoders():
    truth, other = torch.randn(30, 6), torch.randn(30, 9)
    splits = {"test": MemorySplit(torch.zeros(30, 3, 8, 8, dtype=torch.uint8))}
    student = torch.cat([truth + 0.3 * torch.randn(30, 6), other], dim=1)
    teachers = {
        "clip": MemorySubject(splits, features=fixed(test=truth), name="clip"),
        "dino": MemorySubject(splits, features=fixed(test=other), name="dino"),
    }
    own = MemorySubject(splits, features=fixed(test=student), name="student")
    head = MemorySubject(splits, features=fixed(test=student[:, :6]), name="s:clip", head="clip")
    return own, head, teachers


def test_tasks_compare_with_every_teacher(encoders):
    own, head, teachers = encoders
    for task in (CKA("data"), MutualNeighbours("data", k=3), HeadCosine("data")):
        assert task.compares
        task.teachers = teachers
        task.check(own.splits, {"student": own.spec})
    cka, mutual, cosine = CKA("data"), MutualNeighbours("data", k=3), HeadCosine("data")
    for task in (cka, mutual, cosine):
        task.teachers = teachers
    summary = own.features("test").summary
    result = cka.score(own)
    expected = [linear_cka(summary, t.features("test").summary) for t in teachers.values()]
    assert list(result.metrics.values()) == expected
    assert result.value == pytest.approx(np.mean(expected))
    # A teacher is compared with the others only.
    assert list(cka.score(teachers["clip"]).metrics) == ["dino"]
    result = mutual.score(own)
    assert result.per_sample.mean() == pytest.approx(result.value)
    assert result.details["chance"] == pytest.approx(3 / 29)
    assert cosine.applies(head)
    assert not cosine.applies(own)
    assert 0.9 < cosine.score(head).value < 1
    assert cka.applies(own)
    assert not cka.applies(teachers["clip"])
    with pytest.raises(NotApplicable, match="--with-teachers"):
        CKA("data").score(own)


def test_images_that_could_not_be_read_are_left_out(encoders):
    own, _, teachers = encoders
    clean = own.features("test").summary
    broken = clean.clone()
    broken[4] = 1e6
    keys = own.splits["test"].keys
    own.fixed["test"] = EncodedSplit(broken, faults=[keys[4]])
    task = CKA("data")
    task.teachers = {"clip": teachers["clip"]}
    kept = [i for i in range(30) if i != 4]
    truth = teachers["clip"].features("test").summary
    assert task.score(own).value == pytest.approx(linear_cka(clean[kept], truth[kept]))
    few = CKA("data", maximum=10)
    few.teachers = task.teachers
    assert few.score(own).details["images"] == 10


def test_patches_of_a_head(encoders):
    splits = encoders[0].splits
    a, b = torch.randn(30, 4, 6), torch.randn(30, 4, 6)
    teacher = MemorySubject(splits, features={"test": EncodedSplit(None, a.half().numpy())})
    head = MemorySubject(splits, features={"test": EncodedSplit(None, b)}, head="t")
    task = HeadCosine("data", of="patches")
    task.teachers = {"t": teacher}
    expected = torch.cosine_similarity(a.half().double(), b.double(), dim=-1).mean()
    assert task.score(head).value == pytest.approx(float(expected), abs=1e-6)
    head.fixed["test"] = EncodedSplit(None, b[:, :3])
    with pytest.raises(ValueError, match=r"\(3, 6\) where its teacher has \(4, 6\)"):
        task.score(head)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: linear_cka(torch.ones(3, 2), torch.randn(3, 2)), "not defined"),
        (lambda: linear_cka(torch.randn(3, 2), torch.randn(4, 2)), "same images"),
        (
            lambda: mutual_neighbours(torch.randn(3, 2), torch.randn(3, 2), 3),
            "from 1 to 2",
        ),
        (lambda: linear_cka(torch.full((3, 2), torch.nan), torch.randn(3, 2)), "finite"),
        (lambda: prediction_cosine(torch.randn(3, 2), torch.randn(3, 3)), "both be"),
        (lambda: CKA("data", maximum=2), "maximum must be at least 3"),
        (lambda: MutualNeighbours("data", k=0), "k must be at least 1"),
    ],
)
def test_bad_input_says_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()
