"""Which teachers complement one another: pure functions of what each gives for the same images.

METHODS: CKA and mutual neighbours say how alike two teachers see; with labels, the oracle gain is
the share of images that some teacher gets right and the best single one does not; teachers are then
taken greedily by what each adds per unit of its cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.evaluation.agreement import linear_cka, mutual_neighbours, nearest_others


@dataclass(frozen=True)
class Step:
    """One teacher in the greedy order.

    Attributes:
        name: of the teacher.
        gain: what it adds to those before it: share of images newly right, or (without labels)
            how unlike the most similar of them it is (1 − CKA).
        cost: of the teacher.
        covered: share of images that it or one before it gets right; None without labels.
    """

    name: str
    gain: float
    cost: float
    covered: float | None

    @property
    def per_cost(self) -> float:
        """Gain per unit of cost."""
        return self.gain / self.cost


def neighbour_votes(features: Tensor, labels: Tensor, k: int = 20, t: float = 0.07) -> Tensor:
    """Whether the k nearest other images vote for each image's own label; bool ``(M,)``.

    Votes weigh ``exp(cosine / t)``, as in the k-NN protocol.

    Args:
        features: ``(M, D)``.
        labels: int64 ``(M,)`` ≥ 0.
        k: at most M − 1.
        t: temperature.

    Raises:
        ValueError: a shape that does not fit, or k out of range.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not 1 <= k < len(features):
        raise ValueError(
            f"neighbours of (M, D) features and (M,) labels with k below M, received "
            f"{tuple(features.shape)}, {tuple(labels.shape)} and k={k}"
        )
    near = nearest_others(features, k)
    weights = ((near.similarities.double() - 1.0) / t).exp()
    votes = torch.zeros(len(features), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[near.indices.cpu()], weights.cpu())
    return votes.argmax(dim=1) == labels


def alike(features: Mapping[str, Tensor], k: int = 10) -> tuple[list[list[float]], ...]:
    """CKA and mutual-neighbour share of every pair ``(T, T)``; 1 on the diagonal."""
    names = list(features)
    cka = [[1.0] * len(names) for _ in names]
    near = [[1.0] * len(names) for _ in names]
    for i, a in enumerate(names):
        for j in range(i):
            cka[i][j] = cka[j][i] = linear_cka(features[a], features[names[j]])
            share = float(mutual_neighbours(features[a], features[names[j]], k).mean())
            near[i][j] = near[j][i] = share
    return cka, near


def oracle_gain(right: Mapping[str, Tensor]) -> tuple[float, str, float]:
    """Share right of some teacher, the best single teacher, and its share; bool ``(M,)`` each."""
    shares = {name: float(r.double().mean()) for name, r in right.items()}
    best = max(shares, key=shares.__getitem__)
    some = float(torch.stack(list(right.values())).any(dim=0).double().mean())
    return some, best, shares[best]


def greedy_by_labels(right: Mapping[str, Tensor], costs: Mapping[str, float]) -> list[Step]:
    """Teachers by images newly right per unit of cost."""
    left, steps = list(right), []
    covered = torch.zeros_like(next(iter(right.values())))
    while left:
        gains = {n: float((right[n] & ~covered).double().mean()) for n in left}
        name = max(left, key=lambda n: gains[n] / costs[n])
        covered = covered | right[name]
        steps.append(Step(name, gains[name], costs[name], float(covered.double().mean())))
        left.remove(name)
    return steps


def greedy_by_unlikeness(
    names: Sequence[str], cka: Sequence[Sequence[float]], costs: Mapping[str, float]
) -> list[Step]:
    """Teachers by 1 − largest CKA to one before, per unit of cost; the first has a gain of 1."""
    place = {name: i for i, name in enumerate(names)}
    left = list(names)
    steps: list[Step] = []
    while left:
        taken = [place[s.name] for s in steps]
        gains = {n: 1.0 - max((cka[place[n]][t] for t in taken), default=0.0) for n in left}
        name = max(left, key=lambda n: gains[n] / costs[n])
        steps.append(Step(name, gains[name], costs[name], None))
        left.remove(name)
    return steps


def recommend(steps: Sequence[Step], least: float) -> tuple[list[str], str]:
    """The steps that add at least ``least``, with the reason as a sentence."""
    labelled = steps[0].covered is not None
    unit = "of the images newly right" if labelled else "unlikeness (1 − CKA)"
    taken = [step for number, step in enumerate(steps) if number == 0 or step.gain >= least]
    left = [step for step in steps if step not in taken]
    words = [
        f"{s.name} adds {100 * s.gain:.1f} % {unit} for {1000 * s.cost:.1f} ms an image"
        for s in taken
    ]
    reason = "; ".join(words)
    if left:
        reason += "; left out: " + ", ".join(
            f"{s.name} (adds {100 * s.gain:.1f} %, below {100 * least:.1f} %)" for s in left
        )
    return [s.name for s in taken], reason
