"""How the patches of an image relate to one another, rather than what each of them is."""

from __future__ import annotations

from torch import Tensor

from multikd.functional import full_precision, unit, without_autocast
from multikd.losses.feature import DistillationLoss, pair_of
from multikd.types import Batch, TokenFeatures


class GramLoss(DistillationLoss):
    """MSE between the Gram matrices of unit patches, one an image (DINOv3's Gram anchoring).

    ``mean over (n, m) of (ŝ_n·ŝ_m − ŷ_n·ŷ_m)²``: the cosines between all pairs of patches are to
    be the teacher's. No rotation and no scale of either side matters.
    """

    tokens = ("patches",)

    def forward(
        self, prediction: TokenFeatures, target: TokenFeatures, batch: Batch | None = None
    ) -> Tensor:
        """See ``DistillationLoss``.

        Raises:
            ValueError: a side has no patches, or their shapes differ.
        """
        pair = pair_of(prediction, target, "patches")
        if pair is None:
            raise ValueError(
                "a Gram matrix is one of patches, and this teacher or prediction has none: give "
                "the teacher another loss in model.teacher_losses"
            )
        with without_autocast(pair[0].device):
            s, y = (unit(full_precision(t)) for t in pair)
            return (s @ s.mT - y @ y.mT).square().mean((1, 2))
