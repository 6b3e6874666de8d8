"""Teachers that complement one another, on made features whose answer is known."""

from __future__ import annotations

import pytest
import torch

from multikd.ablation.compare import as_text, compare
from multikd.ablation.complement import (
    alike,
    greedy_by_labels,
    greedy_by_unlikeness,
    neighbour_votes,
    oracle_gain,
    recommend,
)
from multikd.evaluation.agreement import linear_cka


def test_votes_are_those_of_the_nearest_others() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    found = neighbour_votes(features, labels, k=7)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    similarities = unit @ unit.T
    for i in range(60):
        row = similarities[i].clone()
        row[i] = -2
        near = row.topk(7)
        votes = torch.zeros(3, dtype=torch.float64)
        for similarity, j in zip(near.values, near.indices, strict=True):
            votes[labels[j]] += torch.exp(similarity / 0.07)
        assert bool(found[i]) == bool(votes.argmax() == labels[i])
    with pytest.raises(ValueError, match="k below M"):
        neighbour_votes(features, labels, k=60)


def test_oracle_and_greedy_order() -> None:
    right = {
        "good": torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool),
        "same": torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool),
        "other": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool),
    }
    assert oracle_gain(right) == (pytest.approx(0.9), "good", pytest.approx(0.6))
    steps = greedy_by_labels(right, {"good": 1.0, "same": 1.0, "other": 1.0})
    assert [s.name for s in steps] == ["good", "other", "same"]
    assert [s.gain for s in steps] == [pytest.approx(0.6), pytest.approx(0.3), 0.0]
    assert steps[-1].covered == pytest.approx(0.9)
    chosen, reason = recommend(steps, 0.01)
    assert chosen == ["good", "other"]
    assert "left out: same (adds 0.0 %, below 1.0 %)" in reason
    # A cost that its gain does not repay comes later.
    steps = greedy_by_labels(right, {"good": 1.0, "same": 0.1, "other": 1.0})
    assert [s.name for s in steps] == ["same", "other", "good"]


def test_alike_and_unlike_without_labels() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 8, generator=generator)
    turned = a @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    new = torch.randn(300, 8, generator=generator)
    cka, near = alike({"a": a, "turned": turned, "new": new})
    assert cka[0][1] == pytest.approx(1.0, abs=1e-5)
    assert near[0][1] == pytest.approx(1.0, abs=1e-3)
    assert cka[0][2] == pytest.approx(linear_cka(a, new))
    assert cka[0][2] < 0.2
    steps = greedy_by_unlikeness(
        ["a", "turned", "new"], cka, dict.fromkeys(("a", "turned", "new"), 1.0)
    )
    assert [s.name for s in steps] == ["a", "new", "turned"]
    figures = compare({"a": a, "turned": turned, "new": new}, torch.full((300,), -1),
                      {"a": 0.001, "turned": 0.001, "new": 0.002}, 0.01)  # fmt: skip
    assert figures["recommended"] == ["a", "new"]
    text = as_text({**figures, "images": 300, "data": "train"})
    assert "no labels" in text
    assert "recommended: a, new" in text
