"""A random share of the patches in the patch loss: the ladder works on fewer tokens.

The loss over patches is a mean over them, so that of a uniform sample has the same expectation, and
so has its gradient; its variance is the price. Off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from multikd.grids import resample_patches
from multikd.losses.feature import DistillationLoss
from multikd.types import Grid, TokenFeatures


class PatchSample:
    """The places of one step, on each grid where prediction and target meet.

    Drawn from torch's generator of the device, which the module seeds by (seed, epoch, batch,
    rank): nothing waits for the device, and a resumed run draws the same.

    Args:
        share: of the patches that is kept, above 0 and at most 1; at least one patch is.
        grids: where prediction and target meet.
        images: B.
        device: of the images.
    """

    def __init__(
        self, share: float, grids: Iterable[Grid | None], images: int, device: torch.device
    ) -> None:
        self.places: dict[Grid, Tensor] = {}
        for grid in dict.fromkeys(grids):
            if grid is None:
                continue
            count = grid[0] * grid[1]
            kept = max(1, math.ceil(share * count))
            if kept < count:
                draws = torch.rand((images, count), device=device)
                # In ascending order, so that memory is read in one direction.
                self.places[grid] = draws.topk(kept, dim=1).indices.sort(dim=1).values

    def of(self, features: TokenFeatures, grid: Grid | None) -> TokenFeatures:
        """The patches of ``features``, brought to ``grid``, that are in the sample."""
        places = None if grid is None else self.places.get(grid)
        if places is None or features.patches is None or grid is None:
            return features
        patches = features.patches
        if features.grid is not None:
            patches = resample_patches(patches, features.grid, grid)
        index = places.unsqueeze(2).expand(-1, -1, patches.shape[2])
        return TokenFeatures(
            summary=features.summary,
            patches=patches.gather(1, index),
            logits=features.logits,
            places=places,
            places_grid=grid,
        )


def check_share(
    share: float, losses: Mapping[str, DistillationLoss], tokenwise: bool, apart: bool
) -> None:
    """Refuse a share of patches where the sample's loss is another one.

    Raises:
        ValueError: a share outside (0, 1]; with less than 1, a loss that is no mean over patches,
            projectors that mix patches, or teachers that see only some images.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"patch_share must be above 0 and at most 1, received {share}")
    if share == 1.0:
        return
    mixing: Sequence[str] = [
        name
        for name, loss in losses.items()
        if "patches" in loss.tokens and not loss.means_over_patches
    ]
    if mixing:
        raise ValueError(
            f"patch_share={share} samples patches, and the loss of teacher {mixing[0]!r} "
            f"({type(losses[mixing[0]]).__name__}) is no mean over them: set patch_share to 1"
        )
    if not tokenwise:
        raise ValueError(
            f"patch_share={share} samples patches before the projectors, and these mix patches: "
            "take LinearProjectors or MLPProjectors, or set patch_share to 1"
        )
    if apart:
        raise ValueError(
            f"patch_share={share} does not go with teacher_data or partition: set it to 1"
        )
