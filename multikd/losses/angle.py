"""Summaries compared by angle, in units of each teacher's own spread (C-RADIOv4)."""

from __future__ import annotations

import torch
from torch import Tensor

from multikd.distributed import all_reduce_sum
from multikd.functional import full_precision, squared_angle, unit, without_autocast
from multikd.losses.feature import DistillationLoss, pair_of
from multikd.normalizers import KeepsDtype
from multikd.types import Batch, TokenFeatures, Widths


class AngleLoss(KeepsDtype, DistillationLoss):
    """``Θ(s, y)² / Disp`` on raw summaries, ``Disp = E[Θ(y, μ)²]`` (arXiv 2601.17237).

    Θ is the angle, so no scale of prediction or target matters; μ is the mean direction of the
    teacher's summaries. Teachers whose summaries fill a narrow or a wide cone count alike. It reads
    the summary as the teacher gives it: after a standardiser all teachers have one dispersion.

    μ and Disp are averages over the training batches of all ranks (a plain mean at first, later an
    exponential one), updated before they are used; in evaluation they stay.

    Args:
        momentum: weight of a new batch in the long run.
        floor: least dispersion in rad², for a teacher that says the same of every image.

    Raises:
        ValueError: for settings out of range.
    """

    tokens = ("summary",)
    raw = ("summary",)
    mean: Tensor
    dispersion: Tensor
    updates: Tensor

    def __init__(self, momentum: float = 0.01, floor: float = 1e-4) -> None:
        super().__init__()
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be in (0, 1], received {momentum}")
        if not 0.0 < floor < float("inf"):
            raise ValueError(f"floor must be above 0 and finite, received {floor}")
        self.momentum = momentum
        self.floor = floor
        # Of the right length once the teacher is known.
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float32))
        self.register_buffer("dispersion", torch.ones((), dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def bind(self, widths: Widths) -> None:
        """See ``DistillationLoss``."""
        if widths.summary is not None:
            self.mean = torch.zeros(widths.summary, dtype=torch.float32)

    def forward(
        self, prediction: TokenFeatures, target: TokenFeatures, batch: Batch | None = None
    ) -> Tensor:
        """See ``DistillationLoss``.

        Raises:
            ValueError: a side has no summary, or their widths differ.
        """
        pair = pair_of(prediction, target, "summary")
        if pair is None:
            raise ValueError(
                "the angle is one between summaries, and this teacher or prediction has none: give "
                "the teacher another loss in model.teacher_losses"
            )
        with without_autocast(pair[0].device):
            s, y = full_precision(pair[0]), full_precision(pair[1])
            if self.training:
                self._update(y.detach())
            return squared_angle(s, y) / self.dispersion.clamp(min=self.floor).to(s.dtype)

    @torch.no_grad()
    def _update(self, y: Tensor) -> None:
        directions = unit(y)
        finite = torch.isfinite(directions).all(dim=1, keepdim=True)
        own = torch.cat([torch.where(finite, directions, 0.0).sum(0), finite.sum(0).to(y.dtype)])
        sums = all_reduce_sum(own)
        count = sums[-1].clamp(min=1.0)
        weight = (1.0 / (self.updates + 1.0)).clamp(min=self.momentum).to(y.dtype)
        weight = torch.where(sums[-1] > 0, weight, 0.0)
        if len(self.mean) != y.shape[1]:  # used without a module that binds it
            self.mean = torch.zeros(y.shape[1], dtype=torch.float32, device=y.device)
        mean = torch.lerp(self.mean.to(y.dtype), sums[:-1] / count, weight)
        spread = torch.where(finite[:, 0], squared_angle(y, mean.expand_as(y)), 0.0).sum()
        now = all_reduce_sum(spread) / count
        # A first image alone is its own mean, at the angle 0: it tells no dispersion.
        now = torch.where((self.updates > 0) | (sums[-1] > 1), now, self.dispersion.to(y.dtype))
        self.mean.copy_(mean)
        self.dispersion.copy_(torch.lerp(self.dispersion.to(y.dtype), now, weight))
        self.updates += (sums[-1] > 0).long()  # a batch may hold no image of this teacher
