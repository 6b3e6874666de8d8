"""Whether a classifier's confidence can be trusted, and what its mistakes cost.

Calibration error after Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, eq. 3);
selective prediction (risk, coverage, AURC) after Geifman & El-Yaniv, "Selective Classification for
Deep Neural Networks" (NeurIPS 2017) and "Bias-Reduced Uncertainty Estimation" (ICLR 2019).

Shapes: M images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Coverages that threshold_for_error tries: 5 %, 10 %, …, 100 %.
_COVERAGE_STEPS = 20


class ReliabilityBin(NamedTuple):
    """Images whose confidence lies in ``(low, high]``; the first bin holds 0 too."""

    low: float
    high: float
    images: int
    confidence: float  # mean, 0 where the bin is empty
    accuracy: float  # mean, 0 where the bin is empty


class RiskCoverage(NamedTuple):
    """Risk when only the most confident images are answered.

    ``coverage`` and ``risk`` are float64 ``(P,)``, one point for every distinct confidence, from
    few images answered to all; ``thresholds`` are those confidences. ``area`` is AURC.
    """

    coverage: Tensor
    risk: Tensor
    thresholds: Tensor
    area: float


@dataclass(frozen=True)
class Abstention:
    """The confidence from which a classifier answers so that few answers are wrong.

    Attributes:
        threshold: answer where confidence ≥ threshold; None where no threshold keeps the rate.
        error: share of wrong answers among those given, on the images it was chosen on.
        error_bound: upper bound of the true error rate, at ``confidence``.
        coverage: share of images answered.
        answered: their number.
        confidence: of the bound.
    """

    threshold: float | None
    error: float
    error_bound: float
    coverage: float
    answered: int
    confidence: float


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> list[ReliabilityBin]:
    """Confidence and accuracy in ``bins`` equally wide bins of confidence, empty ones included.

    Args:
        probabilities: ``(M, K)`` rows that sum to 1; the answer is the largest (the first of equal
            ones), its probability the confidence.
        labels: int64 ``(M,)`` in [0, K).
        bins: at least 1.

    Raises:
        ValueError: shapes that do not fit, no images, labels or probabilities out of range.
    """
    confidence, correct = confidence_and_correct(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, received {bins}")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # (low, high]: an edge belongs to the bin below it, as in Guo et al.
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.float64).scatter_add_(
        0, index, torch.ones_like(confidence)
    )
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].scatter_add_(0, index, confidence)
    sums[1].scatter_add_(0, index, correct)
    means = sums / counts.clamp(min=1)
    return [
        ReliabilityBin(
            float(edges[i]),
            float(edges[i + 1]),
            int(counts[i]),
            float(means[0, i]),
            float(means[1, i]),
        )
        for i in range(bins)
    ]


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """``Σ_b |B_b|/M · |accuracy(B_b) − confidence(B_b)|``, in 0–1 (Guo et al. 2017, eq. 3).

    Arguments and errors are those of :func:`reliability`.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2]])
        >>> round(expected_calibration_error(p, torch.tensor([0, 0, 1, 1])), 6)  # 75 % right
        0.05
    """
    table = reliability(probabilities, labels, bins)
    total = sum(row.images for row in table)
    return sum(row.images / total * abs(row.accuracy - row.confidence) for row in table)


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """Error rate among the most confident images, for every share of images answered.

    Images of equal confidence are answered together, since no threshold tells them apart. AURC is
    the mean over the M images of the risk when every image at least as confident is answered (with
    distinct confidences the published mean over M coverages).

    Args:
        confidence: ``(M,)``, larger is surer.
        correct: bool ``(M,)`` (or a loss: 1 − correct may be any value in 0–1).

    Raises:
        ValueError: shapes that do not fit, no images, or confidences that are not finite.
    """
    _check_rows(confidence, correct)
    confidence = confidence.detach().cpu().to(torch.float64)
    losses = 1 - correct.detach().cpu().to(torch.float64)
    order = confidence.argsort(descending=True, stable=True)
    ranked = confidence[order]
    answered = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    risks = losses[order].cumsum(0) / answered
    last = torch.ones(len(ranked), dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    ends = last.nonzero().flatten()
    sizes = torch.diff(ends, prepend=torch.tensor([-1])).to(torch.float64)
    area = float((risks[ends] * sizes).sum() / len(ranked))
    return RiskCoverage(answered[ends] / len(ranked), risks[ends], ranked[ends], area)


def error_upper_bound(wrong: int, count: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of an error rate after Clopper & Pearson (1934).

    Args:
        wrong: errors seen, 0 to ``count``.
        count: answers seen; 0 gives 1.
        confidence: between 0 and 1, at least so often the true rate is below.

    Raises:
        ValueError: counts or confidence out of range.
    """
    if not 0 <= wrong <= count or not 0 < confidence < 1:
        raise ValueError(
            "an error bound needs 0 ≤ wrong ≤ count and a confidence between 0 and 1, received "
            f"{wrong} of {count} at {confidence}"
        )
    if wrong == count:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, wrong + 1, count - wrong))


def threshold_for_error(
    confidence: Tensor,
    correct: Tensor,
    error_rate: float,
    bound_confidence: float = 0.95,
) -> Abstention:
    """The lowest threshold whose answers are wrong at most ``error_rate`` of the time.

    The guarantee of Geifman & El-Yaniv 2017 (SGR): the share of wrong answers among those with
    confidence ≥ threshold, bounded from above by Clopper & Pearson, stays below the wanted rate.
    They look for the threshold by bisection, which misses it where few confident images make the
    bound wide; here 20 equal steps of coverage are tried and the widest that holds is taken, the
    bound's 1 − confidence divided among the 20 (Bonferroni), so that the promise holds for the
    threshold that was chosen. Choose it on validation images, never on those that are reported.

    Args:
        confidence: ``(M,)``.
        correct: bool ``(M,)``.
        error_rate: wanted, between 0 and 1.
        bound_confidence: how often the promise holds over draws of the validation images.

    Raises:
        ValueError: see :func:`risk_coverage`; also a rate out of range.
    """
    if not 0 < error_rate < 1:
        raise ValueError(f"error_rate must lie between 0 and 1, received {error_rate}")
    if not 0 < bound_confidence < 1:
        raise ValueError(f"bound_confidence must lie between 0 and 1, received {bound_confidence}")
    curve = risk_coverage(confidence, correct)
    total = len(confidence)
    answered = (curve.coverage * total).round().to(torch.int64)
    wrong = (curve.risk * answered).round().to(torch.int64)
    share = 1 - (1 - bound_confidence) / _COVERAGE_STEPS

    def bound(index: int) -> float:
        return error_upper_bound(int(wrong[index]), int(answered[index]), share)

    best: int | None = None
    for step in range(_COVERAGE_STEPS, 0, -1):
        # The widest coverage within the step that a threshold can give.
        index = int((answered <= step * total / _COVERAGE_STEPS).sum()) - 1
        if index >= 0 and bound(index) <= error_rate:
            best = index
            break
    if best is None:
        return Abstention(None, 0.0, 1.0, 0.0, 0, bound_confidence)
    return Abstention(
        threshold=float(curve.thresholds[best]),
        error=float(curve.risk[best]),
        error_bound=bound(best),
        coverage=float(curve.coverage[best]),
        answered=int(answered[best]),
        confidence=bound_confidence,
    )


def confidence_and_correct(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability, and whether it is the label's; both float64 ``(M,)``.

    Raises:
        ValueError: see :func:`reliability`.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "probabilities and labels must be (M, K) and (M,) with M > 0, received "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    rows = probabilities.detach().cpu().to(torch.float64)
    labels = labels.cpu()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= rows.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {rows.shape[1] - 1}, received {low} to {high}: leave "
            "unlabelled images out"
        )
    sums = rows.sum(dim=1)
    # Written so that NaN fails it; half-precision softmax rows are off by up to 1e-2.
    if not bool(((rows >= 0).all(dim=1) & ((sums - 1).abs() < 1e-2)).all()):
        raise ValueError(
            "probabilities must be at least 0 in rows that sum to 1: apply softmax to logits"
        )
    confidence, answers = rows.max(dim=1)
    return confidence.clamp(max=1.0), (answers == labels).to(torch.float64)


def _check_rows(confidence: Tensor, correct: Tensor) -> None:
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            "confidence and correct must both be (M,) with M > 0, received "
            f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    if not bool(torch.isfinite(confidence).all()):
        raise ValueError("confidences must be finite, received NaN or infinity")
