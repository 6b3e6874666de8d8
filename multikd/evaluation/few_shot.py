"""Few labels: episodes of n classes with k images each, and small parts of a train split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.groups import Statistic
from multikd.evaluation.labelled import (
    Features,
    by_groups,
    check_features,
    check_groups,
    check_labels,
    class_names,
    labelled_rows,
    tokens_for,
    unique,
)
from multikd.evaluation.linear import logistic_regression
from multikd.evaluation.sgd_probe import moments
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


class MeanInterval(NamedTuple):
    """Mean of repeated measurements and its two-sided Student-t interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """``mean ± t_{n−1} · s/√n`` of independent repetitions.

    Raises:
        ValueError: fewer than two values, or a confidence out of range.
    """
    if len(values) < 2 or not 0 < confidence < 1:
        raise ValueError(
            "an interval over repetitions needs at least two, and a confidence between 0 and 1, "
            f"received {len(values)} and {confidence}"
        )
    from scipy.stats import t

    rows = np.asarray(values, dtype=np.float64)
    half = float(t.ppf(0.5 + confidence / 2, len(rows) - 1) * rows.std(ddof=1)) / math.sqrt(
        len(rows)
    )
    mean = float(rows.mean())
    return MeanInterval(mean, mean - half, mean + half)


def ratio_of_rows(rows: npt.NDArray[np.float64]) -> float:
    """Right answers per question, of ``(M, 2)``: both counts of every image."""
    return float(rows[:, 0].sum() / rows[:, 1].sum()) if rows[:, 1].sum() > 0 else math.nan


@dataclass
class FewShot(Task):
    """n-way k-shot episodes with class prototypes on frozen features.

    Every episode draws ``ways`` classes, ``shots`` images of each from the train split, and
    ``queries`` of each from the test split; a query is given the class whose prototype (mean of its
    shots) is nearest (Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017,
    eq. 1–2). Features are centred by the train split's mean and scaled to unit length first, the
    CL2N of SimpleShot (Wang et al., arXiv 1911.04623, section 3). Episodes depend on ``seed`` and
    the labels alone: all encoders see the same.

    Args:
        data: data set with a train and a test split.
        ways: classes of an episode.
        shots: labelled images a class.
        queries: asked images a class.
        episodes: how many.
        features: ``summary``, ``patch_mean`` or ``both``.
        centre: subtract the train split's mean (no labels are used).
        seed: of the draws.
        groups: columns of the test split's metadata to score by.
    """

    data: str
    ways: int = 5
    shots: int = 5
    queries: int = 15
    episodes: int = 600
    features: Features = "summary"
    centre: bool = True
    seed: int = 0
    groups: tuple[str, ...] = ()

    metric: ClassVar[str] = "top1"
    source: ClassVar[str] = "Snell et al. 2017, eq. 1-2; features as SimpleShot CL2N, 2019"

    def __post_init__(self) -> None:
        if self.ways < 2 or min(self.shots, self.queries) < 1 or self.episodes < 2:
            raise ValueError(
                "FewShot needs 2 ways and episodes, 1 shot and query or more, received "
                f"{self.ways}, {self.episodes}, {self.shots} and {self.queries}"
            )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Features of both splits."""
        del spec
        return [Request(split, tokens_for(self.features)) for split in self.splits]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be scored, and too few classes or images."""
        super().check(splits, specs)
        check_features(self.features, f"FewShot on {self.data!r}", specs)
        check_labels(splits, "FewShot", images_per_class=self.shots, purpose=f"{self.shots} shots")
        check_groups(self.groups, splits)
        labels = splits["test"].labels
        if labels is None:
            return
        counts = torch.bincount(labels[labels >= 0])
        if int((counts >= self.queries).sum()) < self.ways:
            raise ValueError(
                f"{self.ways} ways with {self.queries} queries need as many classes with so many "
                f"images, and {splits['test'].name} has {int((counts >= self.queries).sum())}: use "
                "fewer ways or queries"
            )

    def score(self, subject: Subject) -> TaskResult:
        """Mean over episodes; its interval over them in ``metrics``.

        ``per_sample`` holds for every test image how often it was answered rightly, and asked.
        """
        train, test = (labelled_rows(subject, split, self.features) for split in self.splits)
        centre = train.x.mean(dim=0) if self.centre else torch.zeros(train.x.shape[1])
        bank, asked = (
            torch.nn.functional.normalize(rows.x.double() - centre.double(), dim=1)
            for rows in (train, test)
        )
        counts = np.zeros((len(asked), 2))
        found = []
        for shots, queries in self.draws(train.y, test.y):
            prototypes = bank[shots].mean(dim=1)
            # Nearest by squared Euclidean distance; the query's own length decides nothing.
            scores = asked[queries.flatten()] @ prototypes.T - prototypes.square().sum(1) / 2
            truth = torch.arange(self.ways).repeat_interleave(self.queries)
            right = (scores.argmax(dim=1) == truth).double().numpy()
            counts[queries.flatten().numpy()] += np.stack([right, np.ones_like(right)], axis=1)
            found.append(float(right.mean()))
        interval = mean_interval(found)
        metrics = {
            "episodes_low": interval.low,
            "episodes_high": interval.high,
            "episodes_std": float(np.std(found, ddof=1)),
        }
        names = class_names(subject.splits, ("train", "test"))
        details: dict[str, object] = {
            "classes": names,
            "per_class": _by_class(counts, test.y, names, ratio_of_rows),
        }
        if self.groups:
            details["groups"] = by_groups(
                self.groups, subject.splits["test"], test.kept, counts, ratio_of_rows
            )
        return TaskResult(ratio_of_rows(counts), counts, ratio_of_rows, metrics, details)

    def draws(self, train_y: Tensor, test_y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows of shots ``(ways, shots)`` and of queries ``(ways, queries)`` of every episode."""
        generator = np.random.default_rng(self.seed)
        shots = {int(c): np.flatnonzero(train_y.numpy() == c) for c in train_y.unique()}  # type: ignore[no-untyped-call]
        queries = {c: np.flatnonzero(test_y.numpy() == c) for c in shots}
        usable = [
            c
            for c in sorted(shots)
            if len(shots[c]) >= self.shots and len(queries[c]) >= self.queries
        ]
        if len(usable) < self.ways:
            raise ValueError(
                f"{self.ways} ways need as many classes with {self.shots} shots and {self.queries} "
                f"queries that can be read, found {len(usable)}: use fewer"
            )
        drawn = []
        for _ in range(self.episodes):
            classes = generator.choice(usable, self.ways, replace=False)
            drawn.append(
                (
                    _stack([generator.choice(shots[c], self.shots, False) for c in classes]),
                    _stack([generator.choice(queries[c], self.queries, False) for c in classes]),
                )
            )
        return drawn


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
        details: dict[str, object] = {"classes": names, "per_class": _by_class(rows, test.y, names)}
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


def _by_class(
    rows: npt.NDArray[np.float64],
    labels: Tensor,
    names: Sequence[str],
    statistic: Statistic | None = None,
) -> dict[str, float | None]:
    """The metric of every class's images; None where it has none, or none was asked."""
    found: dict[str, float | None] = {}
    for i, name in enumerate(unique(names)):
        some = rows[(labels == i).numpy()]
        value = math.nan
        if len(some):
            value = float(some.mean() if statistic is None else statistic(some))
        found[name] = None if math.isnan(value) else value
    return found


def _stack(rows: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
