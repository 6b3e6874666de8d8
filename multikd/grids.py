"""Patch grids: where student and teacher meet, and how patches get there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.errors import unknown_name
from multikd.types import Grid

GridPolicy = Literal["teacher", "student", "smaller"]


def resample_patches(patches: Tensor, source: Grid, target: Grid, antialias: bool = True) -> Tensor:
    """Bilinear resampling of patch tokens from one grid to another.

    Linear in the patches and with weights that sum to 1, so it commutes with any affine map of the
    features: normalising before or after gives the same.

    Args:
        patches: ``(B, N, D)``, row-major over ``source``.
        source: ``(h, w)`` with ``h · w == N``.
        target: ``(h', w')``.
        antialias: when shrinking, average over all source patches that a target patch covers.

    Returns:
        ``(B, h'·w', D)`` in the dtype of ``patches``; the very same tensor when the grids agree.

    Raises:
        ValueError: if ``patches`` is not of ``source``, or a side of ``target`` is below 1.
    """
    h, w = source
    if patches.ndim != 3 or patches.shape[1] != h * w:
        raise ValueError(
            f"patches must be (B, {h * w}, D) for a grid of {h}×{w}, "
            f"received {tuple(patches.shape)}"
        )
    if min(target) < 1:
        raise ValueError(f"a patch grid needs sides of 1 or more, received {target}")
    if source == target:
        return patches
    # A view in channels_last format: no copy on the way in, none on the way out.
    maps = patches.reshape(len(patches), h, w, patches.shape[2]).permute(0, 3, 1, 2)
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()  # half precisions have no antialiased kernel on every device
    shrinks = target[0] < h or target[1] < w
    resampled = F.interpolate(
        maps, size=target, mode="bilinear", align_corners=False, antialias=antialias and shrinks
    )
    return resampled.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)


def target_grid(student_grids: Sequence[Grid], teacher: Grid, policy: GridPolicy) -> Grid:
    """The grid on which prediction and target of one teacher are compared.

    Args:
        student_grids: of the student's rungs; the last one is the student's grid.
        teacher: the teacher's own grid.
        policy: ``teacher`` or ``student`` for theirs, ``smaller`` for the one with fewer patches
            (the teacher's when they have as many).

    Raises:
        ValueError: for an unknown policy or no student grid.
    """
    if not student_grids:
        raise ValueError("target_grid needs the grid of at least one student rung, received none")
    student = student_grids[-1]
    if policy == "teacher":
        return teacher
    if policy == "student":
        return student
    if policy == "smaller":
        return student if student[0] * student[1] < teacher[0] * teacher[1] else teacher
    raise unknown_name("grid policy", policy, get_args(GridPolicy))
