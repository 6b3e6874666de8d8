"""Scores of the demo's encoders on the held-out images, with the same probes as everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.demo.report import Role, Score
from multikd.evaluation import extract_features, paired_interval
from multikd.evaluation.extract import EncoderOutput
from multikd.evaluation.knn_task import KNN
from multikd.evaluation.labelled import LabelledRows
from multikd.evaluation.linear_task import LinearProbe
from multikd.types import Batch

NEIGHBOURS = 20
TEMPERATURE = 0.07
# One C for every encoder: chosen on none of them, the strength that suits 4,000 standardised rows.
INVERSE_REGULARISATION = 0.01


@dataclass
class Features:
    """What one encoder sees of the train and of the held-out images; rows float32."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor


@dataclass
class Scored:
    """One encoder's answers and accuracies."""

    name: str
    role: Role
    parameters: int | None
    knn: Tensor  # bool (B,), whether each held-out image was answered rightly
    logistic: Tensor
    confusion: Tensor  # int64 (K, K), truth × answer of the logistic regression


def both_sets(
    encoder: Callable[[Tensor], EncoderOutput], bank: Iterable[Batch], queries: Iterable[Batch]
) -> Features:
    """Features of the train images (which vote and fit) and of the held-out ones."""
    first = extract_features(encoder, bank)
    second = extract_features(encoder, queries)
    return Features(first.features, first.labels, second.features, second.labels)


def concatenate(parts: list[Features]) -> Features:
    """All encoders' features side by side, each of them scaled to unit mean norm first."""

    def join(tensors: list[Tensor], scales: list[Tensor]) -> Tensor:
        return torch.cat([t / s for t, s in zip(tensors, scales, strict=True)], dim=1)

    scales = [part.bank.norm(dim=1).mean() for part in parts]
    return Features(
        join([part.bank for part in parts], scales),
        parts[0].bank_labels,
        join([part.queries for part in parts], scales),
        parts[0].query_labels,
    )


def score(
    name: str, role: Role, features: Features, parameters: int | None, classes: Sequence[str]
) -> Scored:
    """k-NN (k = 20, cosine, 0.07) and logistic regression, by what ``multikd evaluate`` runs."""
    rows = (
        LabelledRows.of(features.bank, features.bank_labels),
        LabelledRows.of(features.queries, features.query_labels),
    )
    near = KNN("demo", ks=(NEIGHBOURS,), temperatures=(TEMPERATURE,)).score_rows(*rows, classes)
    probe = LinearProbe("demo", solver="lbfgs", c=INVERSE_REGULARISATION)
    linear = probe.score_rows(*rows, classes)
    return Scored(
        name,
        role,
        parameters,
        torch.as_tensor(near.per_sample) > 0,
        torch.as_tensor(linear.per_sample) > 0,
        torch.tensor(linear.details["confusion"]),
    )


def table(scored: list[Scored]) -> list[Score]:
    """Rows of the report: accuracies, and the student's paired gap to every other encoder."""
    student = next(s for s in scored if s.role == "student")
    rows = []
    for other in scored:
        own = other is student
        rows.append(
            Score(
                other.name,
                other.role,
                knn=float(other.knn.double().mean()),
                logistic=float(other.logistic.double().mean()),
                parameters=other.parameters,
                knn_gap=None if own else paired_interval(student.knn, other.knn),
                logistic_gap=None if own else paired_interval(student.logistic, other.logistic),
            )
        )
    return rows
