"""A linear probe's confidence, costs and right to abstain, as one task.

The maths is in ``calibration.py`` and ``decisions.py``; the probe is that of ``linear.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.calibration import (
    RiskCoverage,
    reliability,
    risk_coverage,
    threshold_for_error,
)
from multikd.evaluation.decisions import bayes_decisions, check_costs, decision_costs
from multikd.evaluation.labelled import (
    by_groups,
    check_groups,
    check_labels,
    class_names,
    labelled_rows,
)
from multikd.evaluation.linear import logistic_regression, stratified
from multikd.evaluation.task import EvalSplit, Subject, Task, TaskResult
from multikd.types import EncoderSpec

_CURVE_POINTS = 100


@dataclass
class Calibration(Task):
    """Expected calibration error of a logistic regression on frozen features (lower is better).

    Further figures: AURC of the risk-coverage curve; the threshold above which answers are wrong
    at most ``error_rate`` of the time, chosen on the val split (or on a fifth of the train split,
    which the probe then does not learn from), and what it gives on the test split; and, where
    costs are given, what decisions cost by Bayes' rule and by the most probable class.

    Args:
        data: a data set with a train and a test split, and perhaps val.
        bins: of confidence.
        c: inverse strength of the probe's penalty; None chooses it on a part of the train split.
        error_rate: wanted of the answers that are given.
        bound_confidence: how often the promise of ``error_rate`` holds.
        costs: a row for each true class, a column for each answer, and perhaps one more for
            abstaining.
        groups: columns of the test split's metadata to score by.
        seed: of the held-out part.
    """

    data: str
    bins: int = 15
    c: float | None = 1.0
    error_rate: float = 0.05
    bound_confidence: float = 0.95
    costs: list[list[float]] | None = None
    groups: tuple[str, ...] = ()
    seed: int = 0

    metric = "ECE"
    higher_is_better = False
    in_mean = False
    source = "Guo et al. 2017, arXiv 1706.04599, equation 3"

    def __post_init__(self) -> None:
        if self.bins < 1 or not 0 < self.error_rate < 1 or not 0 < self.bound_confidence < 1:
            raise ValueError(
                "Calibration needs at least 1 bin, and error_rate and bound_confidence between 0 "
                f"and 1, received {self.bins}, {self.error_rate} and {self.bound_confidence}"
            )
        if self.costs is not None and len({len(row) for row in self.costs}) != 1:
            raise ValueError("costs must be a matrix: rows of one length, a row for each class")

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be scored, and costs that don't fit the classes."""
        super().check(splits, specs)
        spare = 1 if "val" in splits else 2
        check_labels(splits, "Calibration", images_per_class=spare, purpose="choosing a threshold")
        check_groups(self.groups, splits)
        if self.costs is not None:
            check_costs(torch.tensor(self.costs), len(class_names(splits, ("train", "test"))))

    def score(self, subject: Subject) -> TaskResult:
        """ECE; ``per_sample`` is (confidence, right or wrong) of each image, ``(M, 2)``."""
        train, test = (labelled_rows(subject, split) for split in ("train", "test"))
        names = class_names(subject.splits, ("train", "test"))
        if "val" in subject.splits:
            held = labelled_rows(subject, "val")
            fit_x, fit_y, held_x, held_y = train.x, train.y, held.x, held.y
        else:
            mask = torch.from_numpy(stratified(train.y.numpy(), 0.2, self.seed))
            fit_x, fit_y = train.x[~mask], train.y[~mask]
            held_x, held_y = train.x[mask], train.y[mask]
        begun = time.perf_counter()
        fit = logistic_regression(
            fit_x, fit_y, torch.cat([held_x, test.x]), c=self.c, seed=self.seed
        )
        shares = torch.zeros(len(fit.probabilities), len(names), dtype=torch.float64)
        shares[:, fit.classes] = fit.probabilities
        held_p, test_p = shares[: len(held_x)], shares[len(held_x) :]
        confidence, answers = test_p.max(dim=1)
        right = answers == test.y
        held_confidence, held_answers = held_p.max(dim=1)
        rows = torch.stack([confidence, right.double()], dim=1).numpy()
        curve = risk_coverage(confidence, right)
        chosen = threshold_for_error(
            held_confidence, held_answers == held_y, self.error_rate, self.bound_confidence
        )
        metrics, details = self._abstention(chosen.threshold, confidence, right)
        metrics = {"accuracy": float(right.double().mean()), "AURC": curve.area} | metrics
        details = {
            "reliability": [row._asdict() for row in reliability(test_p, test.y, self.bins)],
            "curve": _points(curve),
            "abstention": {"chosen": vars(chosen), "wanted": self.error_rate, "on_test": details},
        }
        if self.costs is not None:
            metrics |= self._costs(test_p, test.y)

        def statistic(values: npt.NDArray[np.float64]) -> float:
            return ece_of_rows(values, self.bins)

        if self.groups:
            split = subject.splits["test"]
            details["groups"] = by_groups(self.groups, split, test.kept, rows, statistic)
        return TaskResult(
            statistic(rows),
            rows,
            statistic,
            metrics=metrics,
            details=details,
            seconds=time.perf_counter() - begun,
        )

    def _abstention(
        self, threshold: float | None, confidence: Tensor, right: Tensor
    ) -> tuple[dict[str, float], dict[str, Any]]:
        given = confidence >= (float("inf") if threshold is None else threshold)
        coverage = float(given.double().mean())
        wrong = float((~right[given]).double().mean()) if bool(given.any()) else None
        metrics = {"coverage": coverage}
        if wrong is not None:
            metrics["error of answers"] = wrong
        return metrics, {"coverage": coverage, "error": wrong, "answered": int(given.sum())}

    def _costs(self, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        costs = torch.tensor(self.costs, dtype=torch.float64)
        by_rule = bayes_decisions(probabilities, costs)
        found = {
            "cost": float(decision_costs(by_rule, labels, costs).mean()),
            "cost of the most probable": float(
                decision_costs(probabilities.argmax(dim=1), labels, costs).mean()
            ),
        }
        if costs.shape[1] > costs.shape[0]:
            found["abstained by cost"] = float((by_rule == costs.shape[0]).double().mean())
        return found


def ece_of_rows(rows: npt.NDArray[np.float64], bins: int = 15) -> float:
    """ECE of (confidence, right or wrong) rows ``(M, 2)``, for resampling."""
    confidence, right = rows[:, 0], rows[:, 1]
    # The edges of `reliability`, to the last bit.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).numpy()
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(rows))


def _points(curve: RiskCoverage) -> dict[str, Sequence[float]]:
    places = np.unique(np.linspace(0, len(curve.risk) - 1, _CURVE_POINTS).round().astype(int))
    return {
        "coverage": curve.coverage[places].tolist(),
        "risk": curve.risk[places].tolist(),
        "threshold": curve.thresholds[places].tolist(),
    }
