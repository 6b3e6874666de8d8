"""Patches of two shifted views, compared where the views overlap (C-RADIOv4)."""

from __future__ import annotations

import torch
from torch import Tensor

from multikd.functional import full_precision, without_autocast
from multikd.losses.feature import DistillationLoss, pair_of
from multikd.types import Batch, Grid, TokenFeatures


class ShiftEquivariantMSE(DistillationLoss):
    """MSE of patches between views that are shifted by whole patches (arXiv 2601.17237).

    What a teacher puts at a fixed place of its grid, whatever the image, can't be learnt so: the
    student sees that place of the scene at another one. Views come from ``ShiftedViews``, the
    teacher's is the module's ``teacher_view``. Without a shift (one view, validation) it is the MSE
    of all patches. An image without any overlap has loss 0.
    """

    tokens = ("patches",)
    uses_shift = True

    def forward(
        self,
        prediction: TokenFeatures,
        target: TokenFeatures,
        batch: Batch | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """See ``DistillationLoss``; ``shift (B, 2)`` as its attributes say.

        Raises:
            ValueError: a side has no patches or no grid, or their shapes differ.
        """
        pair = pair_of(prediction, target, "patches")
        grid = prediction.grid
        if pair is None or grid is None:
            raise ValueError(
                "a shift is one of patches, and this teacher or prediction has none: give the "
                "teacher another loss in model.teacher_losses"
            )
        with without_autocast(pair[0].device):
            s, y = full_precision(pair[0]), full_precision(pair[1])
            if shift is None:
                return (s - y).square().mean((1, 2))
            y, overlap = shifted(y, grid, shift)
            errors = torch.where(overlap, (s - y).square().mean(2), 0.0)
            return errors.sum(1) / overlap.sum(1).clamp(min=1)


def shifted(patches: Tensor, grid: Grid, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's patches at the places of the student's.

    Args:
        patches: ``(B, N, D)`` on ``grid``.
        grid: ``(h, w)`` of both views.
        shift: ``(B, 2)``, how far the student's view lies (down, right) of the teacher's, in view
            sides; whole patches of ``grid`` are taken.

    Returns:
        ``(B, N, D)`` and where they are in both views, bool ``(B, N)``.
    """
    h, w = grid
    sides = shift.to(patches.device)
    # Sides are multiplied as numbers: a tensor of them would be a copy from the host each step.
    rows = torch.arange(h, device=patches.device) + (sides[:, :1] * h).round().long()
    columns = torch.arange(w, device=patches.device) + (sides[:, 1:] * w).round().long()
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None]
    places = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None]
    index = places.flatten(1)[:, :, None].expand(-1, -1, patches.shape[2])
    return patches.gather(1, index), inside.flatten(1)


def view_shift(batch: Batch, student: int, teacher: int) -> Tensor:
    """How far view ``student`` lies from view ``teacher``: ``(B, 2)``, (down, right), view sides.

    From the parameters of ``ShiftedViews``, whose first two are its own shift.

    Raises:
        ValueError: the batch has no such views.
    """
    parameters = batch.view_parameters
    count = 0 if parameters is None else parameters.shape[1]
    if parameters is None or parameters.shape[2] < 2 or max(student, teacher) >= count:
        raise ValueError(
            f"shifted views need two recorded views of multikd.data.views.ShiftedViews, received "
            f"{count}: set data.train_views to a list of two"
        )
    return parameters[:, student, :2] - parameters[:, teacher, :2]
