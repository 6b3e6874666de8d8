import numpy as np
import pytest
import torch

from multikd.evaluation import knn_predict, knn_scores, nearest_neighbours
from multikd.evaluation.knn import knn_sweep


def brute_force(bank, labels, queries, k, temperature, classes):
    """One query at a time, in plain numpy, as the definition reads."""
    predictions, scores = [], []
    for query in queries:
        similarity = [
            float(np.dot(row, query) / (np.linalg.norm(row) * np.linalg.norm(query)))
            for row in bank
        ]
        nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        scores.append(np.array(votes) / sum(votes))
        predictions.append(max(range(classes), key=lambda c: (votes[c], -c)))
    return np.array(predictions), np.array(scores)


@pytest.fixture
def clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.randint(0, 5, (300,), generator=generator)
    bank = centres[labels] + 2.0 * torch.randn(300, 16, generator=generator)
    truth = torch.randint(0, 5, (100,), generator=generator)
    queries = centres[truth] + 2.0 * torch.randn(100, 16, generator=generator)
    return bank, labels, queries, truth


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (20, 1.0), (300, 0.3)])
@pytest.mark.parametrize("memory", [1, 512])
def test_equals_brute_force_to_the_last_prediction(clusters, k, temperature, memory):
    bank, labels, queries, truth = clusters
    expected, scores = brute_force(
        bank.double().numpy(), labels.tolist(), queries.double().numpy(), k, temperature, 5
    )
    got = knn_predict(bank, labels, queries, k, temperature, memory_mb=memory)
    assert got.tolist() == expected.tolist()
    torch.testing.assert_close(
        knn_scores(bank, labels, queries, k, temperature, memory_mb=memory),
        torch.from_numpy(scores),
    )
    # The problem is neither trivial nor hopeless, so that equality says something.
    assert 0.3 < float((got == truth).double().mean()) < 0.99


def test_equals_scikit_learn(clusters):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels, queries, _ = clusters
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.double().numpy(), labels.numpy())
    assert (
        knn_predict(bank, labels, queries).tolist()
        == reference.predict(queries.double().numpy()).tolist()
    )
    distances, indices = reference.kneighbors(queries.double().numpy())
    found = nearest_neighbours(bank, queries, 20)
    assert found.indices.tolist() == indices.tolist()
    torch.testing.assert_close(found.similarities, torch.from_numpy(1 - distances))


def test_one_search_serves_every_k_and_temperature(clusters):
    bank, labels, queries, _ = clusters
    ks, temperatures = (1, 5, 20, 200), (0.01, 0.07, 1.0)
    found = knn_sweep(bank, labels, queries, ks, temperatures)
    assert set(found) == {(k, t) for k in ks for t in temperatures}
    for (k, temperature), answers in found.items():
        alone = brute_force(
            bank.double().numpy(), labels.tolist(), queries.double().numpy(), k, temperature, 5
        )[0]
        assert answers.tolist() == alone.tolist()
    assert len({tuple(answers.tolist()) for answers in found.values()}) > 4


def test_equally_near_rows_are_taken_by_index():
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    found = nearest_neighbours(bank, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2)
    assert found.indices.tolist() == [[1, 2], [0, 1]]


def test_collapsed_features_answer_alike_and_by_index():
    labels = torch.tensor([2] * 20 + [0] * 480)
    got = knn_predict(torch.ones(500, 8), labels, torch.ones(30, 8), num_classes=3)
    assert got.tolist() == [2] * 30


def test_equal_votes_go_to_the_lowest_class():
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert knn_predict(bank, torch.tensor([3, 1]), torch.tensor([[1.0, 0.0]]), k=2).item() == 1


def test_a_tiny_temperature_does_not_overflow():
    bank = torch.eye(4)
    scores = knn_scores(bank, torch.arange(4), bank, k=4, temperature=1e-4)
    torch.testing.assert_close(scores, torch.eye(4, dtype=torch.float64))


def test_half_precision_features_and_no_queries():
    bank = torch.eye(3).bfloat16()
    assert knn_predict(bank, torch.arange(3), bank, k=1).tolist() == [0, 1, 2]
    assert knn_predict(bank, torch.arange(3), bank[:0], k=1).shape == (0,)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": 11}, "k must be from 1 to the 10 rows of the bank, received 11"),
        ({"k": 0}, "received 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"labels": torch.zeros(9, dtype=torch.long)}, r"labels must be \(10,\)"),
        ({"labels": torch.full((10,), -1)}, "received -1 to -1"),
        ({"num_classes": 1}, "from 0 to 0, received 0 to 9"),
        ({"queries": torch.zeros(2, 5)}, "of one width"),
        ({"queries": torch.full((2, 4), float("nan"))}, "queries must be finite"),
        ({"bank": torch.full((10, 4), float("inf"))}, "bank must be finite"),
        ({"memory_mb": 0.5}, "memory_mb must be at least 1"),
        ({"memory_mb": float("nan")}, "memory_mb must be at least 1"),
    ],
)
def test_bad_input_says_what_was_expected(change, words):
    arguments = {
        "bank": torch.ones(10, 4),
        "labels": torch.arange(10),
        "queries": torch.ones(2, 4),
        "k": 3,
    } | change
    with pytest.raises(ValueError, match=words):
        knn_predict(**arguments)
