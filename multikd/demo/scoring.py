"""Scores of the demo's encoders on the held-out images, with the same probes as everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.demo.report import Role, Score
from multikd.evaluation import extract_features, knn_predict, logistic_regression, paired_interval
from multikd.evaluation.extract import EncoderOutput
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
    logistic_answers: Tensor  # int64 (B,)


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


def score(name: str, role: Role, features: Features, parameters: int | None) -> Scored:
    """k-NN (k = 20, cosine, 0.07) and logistic regression (L-BFGS) of one encoder."""
    classes = int(features.bank_labels.max()) + 1
    near = knn_predict(
        features.bank,
        features.bank_labels,
        features.queries,
        k=NEIGHBOURS,
        temperature=TEMPERATURE,
        num_classes=classes,
    )
    fit = logistic_regression(
        features.bank, features.bank_labels, features.queries, c=INVERSE_REGULARISATION
    )
    return Scored(
        name,
        role,
        parameters,
        near.cpu() == features.query_labels,
        fit.predictions == features.query_labels,
        fit.predictions,
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


def confusion(answers: Tensor, truth: Tensor, classes: int) -> Tensor:
    """int64 ``(K, K)``: truth × answer."""
    return torch.bincount(truth * classes + answers, minlength=classes**2).view(classes, classes)
