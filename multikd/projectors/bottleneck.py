"""The bottleneck projector of ATSC and SimKD: a student's map into a teacher's classifier."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from multikd.types import Grid, TokenFeatures

Norm = Literal["batch", "group"]


class BottleneckProjector(nn.Sequential):
    """1×1 conv (→ D_t/f), 3×3 conv, 1×1 conv (→ D_t), each with a norm and a ReLU.

    Source: ATSC (arXiv 2406.08528), after SimKD (arXiv 2203.14001). Departure: the last ReLU is
    left out for teachers whose features may be negative, which it could not reach.

    Args:
        width: D of the student's map.
        target: D_t of the teacher's.
        factor: f, the bottleneck; D_t/f is rounded, and at least 1.
        norm: ``batch`` as published; ``group`` (one group: over an image's whole map) where
            batches on a process are small.
        rectified: end on a ReLU.

    ``forward``: ``(B, D, h, w)`` → ``(B, D_t, h, w)``.
    """

    def __init__(
        self, width: int, target: int, factor: float, norm: Norm = "batch", rectified: bool = True
    ) -> None:
        if norm not in ("batch", "group"):
            raise ValueError(f"norm must be 'batch' or 'group', received {norm!r}")
        if not 0 < factor < float("inf"):
            raise ValueError(f"the bottleneck factor must be above 0, received {factor}")
        hidden = max(1, round(target / factor))

        def normed(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)

        layers: list[nn.Module] = [
            *(nn.Conv2d(width, hidden, 1, bias=False), normed(hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), normed(hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, target, 1, bias=False), normed(target)),
        ]
        super().__init__(*layers, *([nn.ReLU()] if rectified else []))
        self.hidden = hidden
        self.norm = norm
        self.rectified = rectified


def to_map(features: TokenFeatures, grid: Grid | None = None) -> Tensor:
    """Patches as a map ``(B, D, h, w)``, average-pooled to at most ``grid``.

    Raises:
        ValueError: there are no patches.
    """
    if features.patches is None or features.grid is None:
        raise ValueError("a map needs patch features with a grid, received none")
    h, w = features.grid
    found = features.patches.transpose(1, 2)
    found = found.reshape(*found.shape[:2], h, w)
    if grid is None or (h <= grid[0] and w <= grid[1]):
        return found
    pooled: Tensor = functional.adaptive_avg_pool2d(found, (min(h, grid[0]), min(w, grid[1])))
    return pooled
