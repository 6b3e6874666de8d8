"""Depth by a linear layer on frozen patch tokens, scored by root mean square error in metres.

The "lin. 1" protocol of DINOv2 (Oquab et al., arXiv 2304.07193, section 7.4): a linear layer gives
256 values for every patch, upsampled four times; made positive and divided by their sum they weigh
256 uniform bins of depth (the linear normalisation of AdaBins, arXiv 2011.14141); the loss is the
scale-invariant logarithmic one (Eigen et al. 2014). Departures: patch tokens only, without the
class token; one centre crop without augmentation; no gradient loss; no Eigen crop.

Shapes: M images, O bins, (H, W) of depth maps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
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
from multikd.types import Grid

# The spread of logarithms is only minimised once their mean is roughly right.
_MEAN_ONLY_STEPS = 100


def bin_depths(maps: Tensor, low: float, high: float, size: Grid) -> Tensor:
    """Depth ``(B, H, W)`` from bin values ``(B, O, h, w)``, between ``low`` and ``high`` metres."""
    finer = upsample(maps, (4 * maps.shape[2], 4 * maps.shape[3]))
    # Above 0, so that no pixel is without any bin.
    weights = functional.relu(finer.float()) + 0.1
    centres = torch.linspace(low, high, maps.shape[1], device=maps.device)
    depth = torch.einsum("bohw,o->bhw", weights / weights.sum(dim=1, keepdim=True), centres)
    return upsample(depth.unsqueeze(1), size).squeeze(1)


def scale_invariant_loss(depth: Tensor, truth: Tensor, valid: Tensor, mean_only: bool) -> Tensor:
    """``√(Var g + 0.15 · (mean g)²)`` with ``g = log depth − log truth`` over valid pixels.

    This is Eigen's loss with λ = 0.85; ``mean_only`` leaves out the variance. 0 without pixels.
    """
    if int(valid.sum()) < 2:
        return (depth * 0).sum()
    g = depth[valid].float().log() - truth[valid].float().log()
    value = 0.15 * g.mean().square()
    if not mean_only:
        value = value + g.var()
    return (value + 1e-12).sqrt()


def depth_errors(depth: Tensor, truth: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Errors of each image over its valid pixels, float64 ``(B,)``; NaN where it has none.

    ``rmse`` = √mean (d − t)², ``abs_rel`` = mean |d − t| / t, ``delta1`` = share with
    max(d/t, t/d) < 1.25, ``pixels`` = their number.

    Args:
        depth: ``(B, H, W)`` above 0.
        truth: ``(B, H, W)``.
        valid: bool ``(B, H, W)``; the truth is above 0 there.
    """
    d, t = depth.to(torch.float64), torch.where(valid, truth.to(torch.float64), 1.0)
    pixels = valid.sum(dim=(1, 2)).to(torch.float64)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum(dim=(1, 2)) / pixels

    return {
        "rmse": mean((d - t).square()).sqrt(),
        "abs_rel": mean((d - t).abs() / t),
        "delta1": mean((torch.maximum(d / t, t / d) < 1.25).to(torch.float64)),
        "pixels": pixels,
    }


@dataclass
class LinearDepth(DenseProbe):
    """Linear depth on patch tokens: mean over test images of each image's RMSE, in metres.

    The data set has depth maps in metres; 0 or less is unknown.

    Args:
        min_depth: of the first bin; nearer pixels are not scored.
        max_depth: of the last bin; farther pixels are not scored (10 for NYUd).
        bins: O.
    """

    min_depth: float = 1e-3
    max_depth: float = 10.0
    bins: int = 256

    metric = "RMSE"
    source = "linear depth: Oquab et al. 2023, arXiv 2304.07193, section 7.4"
    unit = "m"
    higher_is_better = False
    target = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_depth < self.max_depth or self.bins < 2:
            raise ValueError(
                "depth needs 0 < min_depth < max_depth and at least 2 bins, received "
                f"{self.min_depth}, {self.max_depth} and {self.bins}"
            )

    def score(self, subject: Subject) -> TaskResult:
        """Mean RMSE; ``metrics`` has the RMSE over all pixels at once, too."""
        size, training = self.view_size(), self.training()
        train, test = (subject.features(s, ("patches",), size) for s in ("train", "test"))
        small, scored = self.target_sizes(subject.spec)
        begun = time.perf_counter()
        rows = readable_rows(train, subject.splits["train"])
        targets = torch.stack([_depth(subject.splits["train"], i, small) for i in rows])
        if not bool(self._valid(targets).any()):
            raise ValueError(
                f"{subject.splits['train'].name}: no pixel has a depth from {self.min_depth} to "
                f"{self.max_depth} m: give max_depth in metres"
            )

        steps = training.epochs * -(-len(rows) // training.batch_size)
        mean_only = min(_MEAN_ONLY_STEPS, steps // 10)

        def loss(maps: Tensor, target: Tensor, step: int) -> Tensor:
            depth = bin_depths(maps, self.min_depth, self.max_depth, small)
            return scale_invariant_loss(depth, target, self._valid(target), step < mean_only)

        probe = train_patch_probe(train, rows, targets, self.bins, loss, training)
        split = subject.splits["test"]
        parts: dict[str, list[Tensor]] = {}
        kept = readable_rows(test, split)
        for chosen, maps in probe_maps(probe, test, kept, training.batch_size):
            depth = bin_depths(maps, self.min_depth, self.max_depth, scored).cpu()
            truth = torch.stack([_depth(split, i, scored) for i in chosen])
            for name, values in depth_errors(depth, truth, self._valid(truth)).items():
                parts.setdefault(name, []).append(values)
        errors = {name: torch.cat(values) for name, values in parts.items()}
        seen = errors["pixels"] > 0
        if not bool(seen.any()):
            raise ValueError(f"{split.name}: no pixel has a depth within the range that is scored")
        pooled = (errors["rmse"].square() * errors["pixels"])[seen].sum() / errors["pixels"].sum()
        return TaskResult(
            float(errors["rmse"][seen].mean()),
            # An image without any valid pixel has NaN and says nothing.
            per_sample=np.asarray(errors["rmse"].numpy()),
            statistic=lambda rows: float(np.nanmean(rows)),
            metrics={
                "RMSE over pixels": float(pooled.sqrt()),
                "abs rel": float(errors["abs_rel"][seen].mean()),
                "delta1": float(errors["delta1"][seen].mean()),
            },
            details={"images": int(seen.sum())},
            seconds=time.perf_counter() - begun,
        )

    def _valid(self, truth: Tensor) -> Tensor:
        # NaN compares false, so an unknown depth written as NaN is unknown too.
        return (truth >= self.min_depth) & (truth <= self.max_depth)


def _depth(split: EvalSplit, index: int, size: Grid) -> Tensor:
    target = np.asarray(split.target(index, size), dtype=np.float32)
    if target.shape != size:
        raise ValueError(
            f"the depth map of {split.keys[index]} must be {size[0]}×{size[1]}, received "
            f"{target.shape}"
        )
    return torch.from_numpy(target)
