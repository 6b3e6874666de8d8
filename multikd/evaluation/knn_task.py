"""k-NN as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from multikd.evaluation.knn import vote
from multikd.evaluation.labelled import (
    Features,
    LabelledRows,
    answer_details,
    by_groups,
    check_features,
    check_groups,
    check_labels,
    class_names,
    labelled_rows,
    tokens_for,
)
from multikd.evaluation.neighbours import nearest_neighbours
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


@dataclass
class KNN(Task):
    """Weighted k-nearest neighbours over cosine similarity (Wu et al. 2018, section 3.4).

    The train split votes on the test split with weights ``exp(cosine/τ)``. The value is top-1 of
    the **first** k and temperature; every other pair, which costs one more count of votes and no
    search, is a further figure. (The best pair on the test images would be chosen by them.)

    Args:
        data: data set with a train and a test split.
        ks: neighbours that vote; the first is reported.
        temperatures: τ; the first is reported.
        features: ``summary`` (class token or pooled), ``patch_mean`` or ``both`` side by side.
        groups: columns of the test split's metadata to score by.
        memory_mb: working memory of the search.
    """

    data: str
    ks: tuple[int, ...] = (20,)
    temperatures: tuple[float, ...] = (0.07,)
    features: Features = "summary"
    groups: tuple[str, ...] = ()
    memory_mb: float = 512.0

    metric: ClassVar[str] = "top1"
    source: ClassVar[str] = "Wu et al. 2018, arXiv 1805.01978, section 3.4"

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(
                "KNN needs ks of 1 or more and temperatures above 0, at least one of each, "
                f"received {list(self.ks)} and {list(self.temperatures)}"
            )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Features of both splits."""
        del spec
        return [Request(split, tokens_for(self.features)) for split in self.splits]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be scored, and more neighbours than images."""
        super().check(splits, specs)
        check_features(self.features, f"KNN on {self.data!r}", specs)
        check_labels(splits, "KNN")
        check_groups(self.groups, splits)
        labels = splits["train"].labels
        voters = 0 if labels is None else int((labels >= 0).sum())
        if max(self.ks) > voters:
            raise ValueError(
                f"KNN asks {max(self.ks)} neighbours and {splits['train'].name} has {voters} "
                "labelled images: use a smaller k"
            )

    def score(self, subject: Subject) -> TaskResult:
        """Top-1 of the first k and temperature; the others in ``metrics``."""
        names = class_names(subject.splits, ("train", "test"))
        train, test = (labelled_rows(subject, split, self.features) for split in self.splits)
        return self.score_rows(train, test, names, subject.splits["test"])

    def score_rows(
        self,
        train: LabelledRows,
        test: LabelledRows,
        names: Sequence[str],
        split: EvalSplit | None = None,
    ) -> TaskResult:
        """The same of rows at hand.

        Args:
            train: rows that vote.
            test: rows that are asked.
            names: of the classes.
            split: of the test images, where there is metadata to group by.
        """
        found = nearest_neighbours(train.x, test.x, min(max(self.ks), len(train.x)), self.memory_mb)
        answers = {
            (k, t): vote(found, train.y, min(k, len(train.x)), t, len(names)).cpu()
            for k in dict.fromkeys(self.ks)
            for t in dict.fromkeys(self.temperatures)
        }
        reported = answers[self.ks[0], self.temperatures[0]]
        right = (reported == test.y).double().numpy()
        metrics, details = answer_details(reported, test, names)
        if len(answers) > 1:
            metrics |= {
                f"top1 (k {k}, τ {t:g})": float((given == test.y).double().mean())
                for (k, t), given in answers.items()
            }
        if split is not None and self.groups:
            details["groups"] = by_groups(self.groups, split, test.kept, right)
        return TaskResult(float(right.mean()), right, metrics=metrics, details=details)
