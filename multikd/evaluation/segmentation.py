"""Semantic segmentation by a linear layer on frozen patch tokens, scored by mean IoU.

The "lin." protocol of DINOv2 (Oquab et al., arXiv 2304.07193, section 7.4): normalised patch
tokens, one linear layer, logits upsampled bilinearly, cross-entropy. Departures, for features that
are extracted once: one centre crop of each image without augmentation or sliding windows, and
train masks of ``train_resolution`` pixels.

Shapes: M images, K classes, (H, W) of masks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from multikd.evaluation.patch_probe import (
    DenseProbe,
    probe_maps,
    readable_rows,
    train_patch_probe,
    upsample,
)
from multikd.evaluation.task import EvalSplit, Subject, TaskResult
from multikd.types import EncoderSpec

IGNORED = 255
# A confusion matrix of more classes is neither drawn nor kept.
_CONFUSION_CLASSES = 64


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Pixels by (true class, predicted class), int64 ``(B, K, K)``; ignored ones (255) left out.

    Args:
        predicted: int64 ``(B, H, W)`` in [0, K).
        truth: int64 ``(B, H, W)`` in [0, K), or 255.
        classes: K.

    Raises:
        ValueError: shapes that differ, or a class out of range.
    """
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise ValueError(
            "predicted and true masks must both be (B, H, W), received "
            f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
        )
    kept = truth != IGNORED
    check_classes(truth, classes, "masks")
    image = torch.arange(len(truth), device=truth.device)[:, None, None].expand_as(truth)
    flat = (image[kept] * classes + truth[kept]) * classes + predicted[kept]
    counts = torch.bincount(flat, minlength=len(truth) * classes * classes)
    return counts.view(len(truth), classes, classes)


def mean_iou(confusion: Tensor) -> tuple[float, Tensor]:
    """Mean over classes of TP / (TP + FP + FN), and each class's; float64 ``(K,)``.

    A class that is neither in the masks nor predicted has NaN and does not count.

    Args:
        confusion: ``(K, K)``, rows true.

    Raises:
        ValueError: no pixel at all.
    """
    matrix = confusion.to(torch.float64)
    intersection = matrix.diagonal()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - intersection
    if not bool((union > 0).any()):
        raise ValueError("there is no pixel to score: every mask is ignored")
    iou = torch.where(union > 0, intersection / union.clamp(min=1), torch.nan)
    return float(iou.nanmean()), iou


def iou_of_rows(rows: npt.NDArray[np.float64]) -> float:
    """Mean IoU of ``(M, 2, K)``: intersection and union of every image and class."""
    intersection, union = rows.sum(axis=0)
    present = union > 0
    return float((intersection[present] / union[present]).mean())


@dataclass
class LinearSegmentation(DenseProbe):
    """Linear segmentation on patch tokens, mean IoU over the test split.

    The data set has masks (class indices, 255 ignored) and a list of class names.
    """

    metric = "mIoU"
    source = "linear segmentation: Oquab et al. 2023, arXiv 2304.07193, section 7.4"
    target = "mask"

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses data without class names."""
        super().check(splits, specs)
        classes = splits["train"].classes
        if not classes or len(classes) > IGNORED:
            raise ValueError(
                f"LinearSegmentation on {self.data!r} needs 1 to {IGNORED} class names, found "
                f"{len(classes or ())}: list them in the task file"
            )

    def score(self, subject: Subject) -> TaskResult:
        """Mean IoU; ``per_sample`` holds each image's intersections and unions ``(M, 2, K)``."""
        size, training = self.view_size(), self.training()
        train, test = (subject.features(s, ("patches",), size) for s in ("train", "test"))
        small, scored = self.target_sizes(subject.spec)
        begun = time.perf_counter()
        names = list(subject.splits["train"].classes or ())
        rows = readable_rows(train, subject.splits["train"])
        masks = torch.stack(
            [_mask(subject.splits["train"], i, small, len(names)).to(torch.uint8) for i in rows]
        )
        if not bool((masks != IGNORED).any()):
            raise ValueError(
                f"{subject.splits['train'].name}: every pixel of every mask is ignored"
            )

        def loss(maps: Tensor, target: Tensor, step: int) -> Tensor:
            del step
            logits = upsample(maps, small).float()
            # Summed and divided here: a batch without any pixel has loss 0, not NaN.
            total = functional.cross_entropy(
                logits, target.long(), ignore_index=IGNORED, reduction="sum"
            )
            return total / (target != IGNORED).sum().clamp(min=1)

        probe = train_patch_probe(train, rows, masks, len(names), loss, training)
        split = subject.splits["test"]
        kept = readable_rows(test, split)
        parts, total = [], torch.zeros(len(names), len(names), dtype=torch.int64)
        for chosen, maps in probe_maps(probe, test, kept, training.batch_size):
            predicted = upsample(maps, scored).argmax(dim=1).cpu()
            truth = torch.stack([_mask(split, i, scored, len(names)) for i in chosen])
            confusion = confusion_matrix(predicted, truth, len(names))
            total += confusion.sum(dim=0)
            hits = confusion.diagonal(dim1=1, dim2=2)
            parts.append(torch.stack([hits, confusion.sum(1) + confusion.sum(2) - hits], dim=1))
        value, iou = mean_iou(total)
        return TaskResult(
            value,
            per_sample=np.asarray(torch.cat(parts).to(torch.float64).numpy()),
            statistic=iou_of_rows,
            metrics={
                "pixel accuracy": float(total.diagonal().sum() / total.sum()),
                "mean class accuracy": _class_accuracy(total),
            },
            details={
                "per_class": {
                    name: None if bool(v.isnan()) else float(v)
                    for name, v in zip(names, iou, strict=True)
                },
                "images": len(kept),
                **({"confusion": total.tolist()} if len(names) <= _CONFUSION_CLASSES else {}),
            },
            seconds=time.perf_counter() - begun,
        )


def check_classes(masks: Tensor, classes: int, name: str) -> None:
    """Refuse masks with a class outside [0, K) other than 255.

    Raises:
        ValueError: there is one.
    """
    bad = (masks != IGNORED) & ((masks < 0) | (masks >= classes))
    if bool(bad.any()):
        raise ValueError(
            f"{name}: classes must be from 0 to {classes - 1}, or {IGNORED} for ignored, received "
            f"{int(masks[bad][0])}: give all class names, or mark other pixels {IGNORED}"
        )


def _mask(split: EvalSplit, index: int, size: tuple[int, int], classes: int) -> Tensor:
    target = np.asarray(split.target(index, size))
    if target.shape != size:
        raise ValueError(
            f"the mask of {split.keys[index]} must be {size[0]}×{size[1]}, received {target.shape}"
        )
    mask = torch.from_numpy(target.astype(np.int64))
    check_classes(mask, classes, f"the mask of {split.keys[index]}")
    return mask


def _class_accuracy(confusion: Tensor) -> float:
    truth = confusion.sum(dim=1)
    share = confusion.diagonal()[truth > 0].to(torch.float64) / truth[truth > 0]
    return float(share.mean())
