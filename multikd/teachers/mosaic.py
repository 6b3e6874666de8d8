"""Mosaics: k × k small images in one large one, for a teacher that takes large images only."""

from __future__ import annotations

import torch
from torch import Tensor

from multikd.types import TokenFeatures


def compose(images: Tensor, side: int) -> Tensor:
    """Images ``(B, C, H, W)`` → mosaics ``(⌈B/k²⌉, C, k·H, k·W)`` for ``side`` k, row by row.

    The last mosaic is filled up with images from the start of the batch.
    """
    count, _, height, width = images.shape
    fill = -count % side**2
    if fill:
        more = images[torch.arange(fill, device=images.device) % count]
        images = torch.cat([images, more])
    rows = images.reshape(-1, side, side, images.shape[1], height, width)
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(-1, images.shape[1], side * height, side * width)


def decompose(features: TokenFeatures, side: int, count: int) -> TokenFeatures:
    """Patches of mosaics → patches of the first ``count`` images; summaries are of no image.

    Raises:
        ValueError: no patches, or a grid that ``side`` does not divide.
    """
    if features.patches is None or features.grid is None:
        raise ValueError("a mosaic gives patches alone, and this teacher has none: set mosaic to 1")
    h, w = features.grid
    if h % side or w % side:
        raise ValueError(
            f"a mosaic of {side}×{side} images does not divide the teacher's grid of {h}×{w}: "
            "choose another mosaic or image_size"
        )
    h, w = h // side, w // side
    patches = features.patches.reshape(-1, side, h, side, w, features.patches.shape[2])
    patches = patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, patches.shape[5])
    return TokenFeatures(patches=patches[:count], grid=(h, w))
