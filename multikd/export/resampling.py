"""Crop and resize as two matrix products: exact in every format, for images of any size.

Resize operators differ among formats in their cubic coefficient, antialiasing and rounding. A
product with weights that the graph computes itself from the image's size does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of PIL's and torch's antialiased bicubic.
_CUBIC = -0.5


def cubic_weights(length: Tensor, window: Tensor, size: int, pixels: Tensor) -> Tensor:
    """Weights ``(size, L)`` that resize the centred ``window`` of a line to ``size`` points.

    The antialiased bicubic (Keys 1981, a = −0.5) of PIL, which widens the kernel when shrinking.

    Args:
        length: () L, as float32.
        window: () length of the part that is resized, float32, at most L.
        size: points to resize to.
        pixels: ``(L,)`` float32, 0 … L−1.
    """
    scale = window / size
    points = torch.arange(size, dtype=torch.float32, device=pixels.device)
    centres = (length - window) / 2 + (points + 0.5) * scale
    spread = scale.clamp(min=1.0)
    x = ((pixels + 0.5)[None, :] - centres[:, None]).abs() / spread
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def crop_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred part of the right aspect ratio, resized, in [0, 1].

    Args:
        images: uint8 ``(B, 3, H', W')``.
        size: ``(H, W)``.

    Returns:
        float32 ``(B, 3, H, W)``.
    """
    pixels = images.to(torch.float32) / 255
    rows = torch.arange(images.shape[2], dtype=torch.float32, device=images.device)
    columns = torch.arange(images.shape[3], dtype=torch.float32, device=images.device)
    # Lengths as tensors, so that the graph reads them off each image.
    height, width = torch.ones_like(rows).sum(), torch.ones_like(columns).sum()
    scale = torch.minimum(height / size[0], width / size[1])
    left = cubic_weights(height, scale * size[0], size[0], rows)
    right = cubic_weights(width, scale * size[1], size[1], columns)
    resized = torch.matmul(torch.matmul(left, pixels), right.T)
    return resized.clamp(0.0, 1.0)
