"""Few-shot classification: episodes of n classes with k labelled images each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
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
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


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
            "per_class": by_class(counts, test.y, names, ratio_of_rows),
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


def _stack(rows: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
