"""Colour and blur operations on one uint8 image, each a function of its parameters.

Jitter and greyscale act on PIL images through torchvision's functional operations; blur and
solarize act on uint8 tensors ``(3, H, W)``.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torch import Tensor
from torch.nn import functional

JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
"""The 24 orders of brightness (0), contrast (1), saturation (2) and hue (3), lexicographic."""


def jitter(
    image: Image.Image,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: int,
) -> Image.Image:
    """Torchvision's ColorJitter with given factors, in ``JITTER_ORDERS[order]``."""
    for operation in JITTER_ORDERS[order]:
        if operation == 0:
            image = tvf.adjust_brightness(image, brightness)
        elif operation == 1:
            image = tvf.adjust_contrast(image, contrast)
        elif operation == 2:
            image = tvf.adjust_saturation(image, saturation)
        else:
            image = tvf.adjust_hue(image, hue)
    return image


def grey(image: Image.Image) -> Image.Image:
    """Luma (ITU-R 601) in all three channels."""
    return image.convert("L").convert("RGB")


@lru_cache(maxsize=256)
def _kernel(size: int, sigma: float) -> Tensor:
    offsets = torch.linspace(-(size - 1) / 2, (size - 1) / 2, size)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def blur(image: Tensor, sigma: float, size: int) -> Tensor:
    """Gaussian blur of a uint8 ``(3, H, W)`` image with a ``size``-wide kernel, edges reflected.

    The two-dimensional kernel is the outer product of one-dimensional ones, so two passes give
    what one would, at 2·size instead of size² products.
    """
    kernel = _kernel(size, sigma)
    half = size // 2
    values = functional.pad(image[:, None].float(), (half, half, half, half), mode="reflect")
    values = functional.conv2d(values, kernel.view(1, 1, size, 1))
    values = functional.conv2d(values, kernel.view(1, 1, 1, size))
    return values[:, 0].round_().clamp_(0, 255).to(torch.uint8)


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert every value of a uint8 image that is at least ``threshold``."""
    return torch.where(image >= threshold, 255 - image, image)
