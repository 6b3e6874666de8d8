"""Few labels: a linear classifier on a small part of a train split's labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from multikd.evaluation.intervals import mean_interval
from multikd.evaluation.labelled import (
    Features,
    by_class,
    by_groups,
    check_features,
    check_groups,
    check_labels,
    class_names,
    labelled_rows,
    tokens_for,
)
from multikd.evaluation.linear import logistic_regression
from multikd.evaluation.sgd_probe import moments
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


@dataclass
class FewLabels(Task):
    """Logistic regression on a small part of the train labels, over several draws of it.

    The 1 % and 10 % of labels of SimCLR (Chen et al., arXiv 2002.05709, section 6.2) with frozen
    features, as in MSN (Assran et al., arXiv 2204.07141, section 5). Every draw takes the same
    share of each class, at least one image; features are standardised by the whole train split,
    whose images (not labels) are at hand. All encoders see the same draws.

    Args:
        data: data set with a train and a test split.
        fraction: of the train labels, above 0 and up to 1.
        draws: how many parts are drawn; at least 2, for the interval.
        c: inverse strength of the penalty (too few labels to choose it).
        features: ``summary``, ``patch_mean`` or ``both``.
        seed: of the draws.
        groups: columns of the test split's metadata to score by.
        max_iterations: of L-BFGS.
        tolerance: of L-BFGS.
    """

    data: str
    fraction: float = 0.01
    draws: int = 5
    c: float = 0.1
    features: Features = "summary"
    seed: int = 0
    groups: tuple[str, ...] = ()
    max_iterations: int = 1000
    tolerance: float = 1e-4

    metric: ClassVar[str] = "top1"
    source: ClassVar[str] = "parts as Chen et al. 2020, section 6.2; frozen, Assran et al. 2022"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or self.draws < 2 or not self.c > 0:
            raise ValueError(
                "FewLabels needs a fraction above 0 and up to 1, 2 draws or more and C above 0, "
                f"received {self.fraction}, {self.draws} and {self.c}"
            )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Features of both splits."""
        del spec
        return [Request(split, tokens_for(self.features)) for split in self.splits]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be fitted."""
        super().check(splits, specs)
        check_features(self.features, f"FewLabels on {self.data!r}", specs)
        check_labels(splits, "FewLabels")
        check_groups(self.groups, splits)

    def score(self, subject: Subject) -> TaskResult:
        """Mean over draws; its interval over them in ``metrics``."""
        train, test = (labelled_rows(subject, split, self.features) for split in self.splits)
        mean, std = moments(train.x)
        bank, asked = (train.x - mean) / std, (test.x - mean) / std
        parts = self.parts(train.y)
        right = []
        for part in parts:
            fit = logistic_regression(
                bank[part],
                train.y[part],
                asked,
                c=self.c,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
                standardise=False,
            )
            right.append((fit.predictions == test.y).double().numpy())
        interval = mean_interval([float(r.mean()) for r in right])
        rows = np.mean(right, axis=0)
        names = class_names(subject.splits, ("train", "test"))
        metrics = {
            "draws_low": interval.low,
            "draws_high": interval.high,
            "labels": float(len(parts[0])),
        }
        details: dict[str, object] = {"classes": names, "per_class": by_class(rows, test.y, names)}
        if self.groups:
            details["groups"] = by_groups(self.groups, subject.splits["test"], test.kept, rows)
        return TaskResult(float(rows.mean()), rows, metrics=metrics, details=details)

    def parts(self, labels: Tensor) -> list[Tensor]:
        """Train rows of every draw: the same share of each class, at least one."""
        generator = np.random.default_rng(self.seed)
        members = [np.flatnonzero(labels.numpy() == c) for c in np.unique(labels.numpy())]
        return [
            torch.from_numpy(
                np.sort(
                    np.concatenate(
                        [
                            generator.choice(m, max(1, round(self.fraction * len(m))), False)
                            for m in members
                        ]
                    )
                )
            )
            for _ in range(self.draws)
        ]
