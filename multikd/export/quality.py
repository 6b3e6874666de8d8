"""What quantisation cost: features and neighbours of a quantised model against its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multikd.evaluation import knn_predict
from multikd.evaluation.knn import nearest_neighbours
from multikd.export.calibration import CalibrationSet
from multikd.export.report import FormatReport

NEIGHBOURS = 20


@dataclass(frozen=True)
class QualityLimits:
    """How much may be lost before the file is refused.

    Attributes:
        cosine_loss: 1 − mean cosine between the features.
        agreement_loss: share of images whose k-NN answer differs (of unlabelled data: share of
            nearest neighbours that differ).
    """

    cosine_loss: float = 0.02
    agreement_loss: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("cosine", self.cosine_loss), ("agreement", self.agreement_loss)):
            if not 0 <= value <= 2:
                raise ValueError(f"{name}_loss must be a share from 0 on, received {value}")

    def broken_by(self, quality: dict[str, Any]) -> str | None:
        """Which limit ``quality`` breaks, as part of a sentence; None where it keeps both."""
        cosine = 1 - float(quality["cosine_mean"])
        # Written so that NaN breaks it.
        if not cosine <= self.cosine_loss:
            return f"lose {cosine:.4f} in cosine (allowed {self.cosine_loss:g})"
        answers = quality["knn_agreement"]
        what = "k-NN answers" if answers is not None else "nearest neighbours"
        differing = 1 - float(quality["neighbour_overlap"] if answers is None else answers)
        if not differing <= self.agreement_loss:
            return f"change {100 * differing:.1f} % of the {what} " + (
                f"(allowed {100 * self.agreement_loss:g} %)"
            )
        return None


class QualityError(ValueError):
    """A quantised file loses more than allowed; ``report`` has the figures, no file was left."""

    def __init__(self, message: str, report: FormatReport) -> None:
        super().__init__(message)
        self.report = report


def halves(data: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """The part that calibrates (and votes) and the part that is asked: never the same images."""
    middle = len(data) // 2
    return (
        CalibrationSet(data.images[:middle], data.labels[:middle]),
        CalibrationSet(data.images[middle:], data.labels[middle:]),
    )


@torch.inference_mode()
def features_of(
    run: Callable[[Tensor], Tensor], images: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    """Features ``(N, D)`` of uint8 images, in batches; pooled where the output is tokens."""
    parts = []
    for start in range(0, len(images), 32):
        out = run(prepare(images[start : start + 32]).contiguous()).float()
        parts.append(out if out.ndim == 2 else out.flatten(1))
    return torch.cat(parts)


def compare_features(
    original: tuple[Tensor, Tensor],
    quantised: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Cosine, shared neighbours and k-NN answers of two encoders over the same images.

    Each encoder votes and is asked with its own features: a quantised student is deployed with a
    quantised bank.

    Args:
        original: float features of bank ``(M, D)`` and queries ``(B, D)``.
        quantised: the same images.
        labels: of bank and queries; the k-NN figures are None where one is below 0 or only one
            class is there.

    Returns:
        ``cosine_mean``, ``cosine_min`` (over all images), ``neighbour_overlap`` (share of the k
        nearest that both have), ``knn_agreement``, ``knn_float``, ``knn_quantized`` (accuracies),
        ``bank``, ``queries``, ``k``.
    """
    cosines = torch.cosine_similarity(
        torch.cat(original).double(), torch.cat(quantised).double(), dim=1
    )
    k = min(NEIGHBOURS, len(original[0]))
    quality: dict[str, Any] = {
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "neighbour_overlap": _overlap(original, quantised, k),
        "knn_agreement": None,
        "knn_float": None,
        "knn_quantized": None,
        "bank": len(original[0]),
        "queries": len(original[1]),
        "k": k,
    }
    bank_labels, query_labels = labels
    if int(torch.cat(labels).min()) >= 0 and int(bank_labels.min()) < int(bank_labels.max()):
        first = knn_predict(original[0], bank_labels, original[1], k=k)
        second = knn_predict(quantised[0], bank_labels, quantised[1], k=k)
        quality["knn_agreement"] = _share(first == second)
        quality["knn_float"] = _share(first == query_labels)
        quality["knn_quantized"] = _share(second == query_labels)
    return quality


def _overlap(original: tuple[Tensor, Tensor], quantised: tuple[Tensor, Tensor], k: int) -> float:
    first = nearest_neighbours(*original, k=k).indices
    second = nearest_neighbours(*quantised, k=k).indices
    return float((first[:, :, None] == second[:, None, :]).any(dim=2).double().mean())


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def judge(report: FormatReport, limits: QualityLimits, name: str) -> FormatReport:
    """The report, if its quality keeps the limits.

    Raises:
        QualityError: it does not.
    """
    broken = None if report.quality is None else limits.broken_by(report.quality)
    if broken is not None:
        raise QualityError(
            f"the {report.format} features of {name} {broken}: nothing was written; fine-tune "
            "with multikd.callbacks.QuantizationAware first, calibrate on more images, or allow "
            "more on purpose",
            report,
        )
    return report
