"""Linear probes as tasks: one label an image, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.calibration import expected_calibration_error, reliability
from multikd.evaluation.labelled import (
    Features,
    LabelledRows,
    answer_details,
    by_groups,
    check_features,
    check_groups,
    check_labels,
    check_multi_labels,
    class_names,
    labelled_rows,
    tokens_for,
    unique,
)
from multikd.evaluation.linear import C_CANDIDATES
from multikd.evaluation.metrics import (
    average_precisions,
    mean_average_precision,
    resampled_average_precision,
    top_k_accuracy,
)
from multikd.evaluation.probes import ProbeFit, ProbeSettings, Solver, fit_probe
from multikd.evaluation.sgd_probe import LEARNING_RATES
from multikd.evaluation.task import EvalSplit, Request, Subject, Task, TaskResult
from multikd.types import EncoderSpec


@dataclass
class _Probe(Task):
    """Settings that both probes share; see :class:`LinearProbe`."""

    data: str
    features: Features = "summary"
    solver: Solver = "auto"
    c: float | None = None
    candidates: tuple[float, ...] = C_CANDIDATES
    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: int = 10
    batch_size: int = 1024
    validation_fraction: float = 0.1
    max_iterations: int = 1000
    tolerance: float = 1e-4
    seed: int = 0
    groups: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> ProbeSettings:
        """Of the fit.

        Raises:
            ValueError: one out of range.
        """
        return ProbeSettings(
            self.solver,
            self.c,
            self.candidates,
            self.learning_rates,
            self.epochs,
            self.batch_size,
            self.validation_fraction,
            self.max_iterations,
            self.tolerance,
            self.seed,
        )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Features of train, val (where there is one) and test."""
        del spec
        return [Request(name, tokens_for(self.features)) for name in ("train", "val", "test")]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses encoders without the features, and columns that are not there."""
        super().check(splits, specs)
        check_features(self.features, f"{type(self).__name__} on {self.data!r}", specs)
        check_groups(self.groups, splits)
        if "val" in splits and len(splits["val"]) == 0:
            raise ValueError(f"the split {splits['val'].name} has no images")

    @property
    def chooses(self) -> bool:
        """Whether images must be held out for a choice."""
        return self.c is None if self.solver != "sgd" else len(self.learning_rates) > 1

    def fit(self, subject: Subject, classes: int) -> tuple[ProbeFit, LabelledRows]:
        """Fit on train (and val), answer test."""
        train, test = (labelled_rows(subject, name, self.features) for name in ("train", "test"))
        x, y, held = train.x, train.y, None
        if "val" in subject.splits and self.chooses:
            val = labelled_rows(subject, "val", self.features)
            x, y = torch.cat([x, val.x]), torch.cat([y, val.y])
            held = torch.arange(len(x)) >= len(train.x)
        return fit_probe(x, y, test.x, classes, self.settings(), held, self._device()), test

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _validation(self, fit: ProbeFit) -> dict[str, Any]:
        name = "learning rate" if "learning_rate" in fit.facts else "C"
        if not fit.validation:
            return {}
        curve = {
            "name": f"validation score by {name}",
            "x": [f"{value:g}" for value, _ in fit.validation],
            "y": [None if score < 0 else score for _, score in fit.validation],
            "x_label": name,
            "y_label": "score on held-out train images",
        }
        return {"curves": [curve]}


@dataclass
class LinearProbe(_Probe):
    """Linear classifier on frozen features, multinomial logistic regression.

    Small sets: L-BFGS (scikit-learn) on standardised features, C searched on held-out images
    (Kornblith et al., "Do Better ImageNet Models Transfer Better?", CVPR 2019, appendix A.3). Large
    ones: SGD over a grid of learning rates at once (DINOv2, arXiv 2304.07193, appendix B.3).

    Args:
        data: data set with a train and a test split; what is chosen is chosen on its ``val`` split,
            or on a part of the train split, never on the test split.
        features: ``summary``, ``patch_mean`` or ``both`` side by side.
        solver: ``lbfgs``, ``sgd``, or ``auto`` by rows × width × classes.
        c: fixed inverse strength of the penalty, in place of the search.
        candidates: values of C.
        learning_rates: of SGD, for a batch of 256.
        epochs: of SGD.
        batch_size: of SGD.
        validation_fraction: of every class of the train split, where there is no ``val``.
        max_iterations: of L-BFGS.
        tolerance: of L-BFGS.
        seed: of the held-out part and of SGD's order.
        groups: columns of the test split's metadata to score by.
        device: of SGD; ``auto`` takes a GPU where there is one.
    """

    metric: ClassVar[str] = "top1"
    source: ClassVar[str] = "Kornblith et al. 2019 (L-BFGS); Oquab et al. 2023 (SGD)"

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be fitted, and classes too small to hold one out."""
        super().check(splits, specs)
        splitting = self.chooses and "val" not in splits
        check_labels(
            splits,
            "LinearProbe",
            images_per_class=2 if splitting else 1,
            purpose="a choice on held-out images (give c, or a val split)",
        )

    def score(self, subject: Subject) -> TaskResult:
        """Top-1; top-5, mean per-class accuracy and calibration error in ``metrics``."""
        names = class_names(subject.splits, ("train", "test", "val"))
        fit, test = self.fit(subject, len(names))
        return self.result(fit, test, names, subject.splits["test"])

    def score_rows(
        self, train: LabelledRows, test: LabelledRows, names: Sequence[str]
    ) -> TaskResult:
        """The same of rows at hand, without a ``val`` split."""
        fit = fit_probe(train.x, train.y, test.x, len(names), self.settings(), None, self._device())
        return self.result(fit, test, names)

    def result(
        self,
        fit: ProbeFit,
        test: LabelledRows,
        names: Sequence[str],
        split: EvalSplit | None = None,
    ) -> TaskResult:
        """What is said of a fit's answers; ``split`` of the test images has the metadata."""
        right = (fit.answers == test.y).double().numpy()
        metrics, details = answer_details(fit.answers, test, names)
        if len(names) > 5:
            metrics["top5"] = top_k_accuracy(fit.probabilities, test.y, 5)
        metrics["ece"] = expected_calibration_error(fit.probabilities, test.y)
        details |= self._validation(fit)
        details.setdefault("curves", []).append(_reliability_curve(fit.probabilities, test.y))
        if split is not None and self.groups:
            details["groups"] = by_groups(self.groups, split, test.kept, right)
        return TaskResult(float(right.mean()), right, metrics=metrics | fit.facts, details=details)


@dataclass
class MultiLabelProbe(_Probe):
    """Linear classifiers for several labels an image, scored by mean average precision.

    One logistic regression for every class against the rest, with one C for all (small sets), or
    all of them by SGD on the sum of binary cross-entropies. The value is the macro mean over
    classes of the average precision (``Σ (R_n − R_{n−1}) P_n``, every threshold, no interpolation).

    Args:
        data: see :class:`LinearProbe`, as for everything else; labels are 0 or 1 for every class.
    """

    metric: ClassVar[str] = "mAP"
    source: ClassVar[str] = "macro mAP of one-against-rest logistic regressions on frozen features"

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels of another kind, and classes without positives or negatives."""
        super().check(splits, specs)
        splitting = self.chooses and "val" not in splits
        check_multi_labels(splits, "MultiLabelProbe", 2 if splitting else 1)

    def score(self, subject: Subject) -> TaskResult:
        """Mean average precision; by class in ``details``."""
        names = class_names(subject.splits, ("train", "test", "val"))
        fit, test = self.fit(subject, len(names))
        value = mean_average_precision(fit.probabilities, test.y)
        rows = torch.stack([fit.probabilities, test.y.to(torch.float64)], dim=1).numpy()
        by_class = average_precisions(fit.probabilities, test.y)
        details: dict[str, Any] = {
            "classes": list(names),
            "per_class": dict(zip(unique(names), by_class, strict=True)),
            **self._validation(fit),
        }
        if self.groups:
            details["groups"] = by_groups(
                self.groups, subject.splits["test"], test.kept, rows, precision_of_rows
            )
        return TaskResult(value, rows, precision_of_rows, dict(fit.facts), details)


class PrecisionOfRows:
    """Macro mAP of ``(M, 2, K)``: scores and targets of every image."""

    def __call__(self, rows: npt.NDArray[np.float64]) -> float:
        """Of the rows as they are.

        Raises:
            ValueError: no class has a positive.
        """
        return mean_average_precision(torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1]))

    def weighted(
        self, rows: npt.NDArray[np.float64], times: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Of every resample ``(R,)``, ``times (R, M)`` being how often it has each row."""
        scores, targets = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
        return resampled_average_precision(scores, targets, torch.from_numpy(times)).numpy()


precision_of_rows = PrecisionOfRows()


def _reliability_curve(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    bins = [b for b in reliability(probabilities, labels) if b[2] > 0]
    return {
        "name": "reliability",
        "x": [b.confidence for b in bins],
        "y": [b.accuracy for b in bins],
        "x_label": "mean confidence of a bin",
        "y_label": "share of right answers",
    }
