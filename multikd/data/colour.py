"""Colour and blur operations on one uint8 view ``(3, H, W)``, each a function of its parameters.

Brightness, contrast, saturation and hue are affine in RGB but for rounding and clipping between
them (hue nearly so: a turn about the grey axis in place of a shift in HSV), hence one 3×4 matrix
does all four, with greyscale too, in the distribution of torchvision's ColorJitter and a tenth of
its time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
"""The 24 orders of brightness (0), contrast (1), saturation (2) and hue (3), lexicographic."""

_Matrix = npt.NDArray[np.float64]
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow and torchvision
_GREY = np.tile(_LUMA, (3, 1))


def jitter_matrix(
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: int,
    mean: Sequence[float],
) -> _Matrix:
    """Torchvision's ColorJitter with given factors, in ``JITTER_ORDERS[order]``, as one matrix.

    Args:
        brightness: factor on the values.
        contrast: factor on the distance from the mean grey of the image at that point.
        saturation: factor on the distance from each pixel's own grey.
        hue: part of a turn, −0.5 … 0.5.
        order: row of ``JITTER_ORDERS``.
        mean: mean red, green and blue of the image, which the contrast needs.

    Returns:
        ``(3, 4)``: ``rgb' = m[:, :3] · rgb + m[:, 3]``.
    """
    linear, offset = np.eye(3), np.zeros(3)
    for operation in JITTER_ORDERS[order]:
        if operation == 0:
            linear, offset = brightness * linear, brightness * offset
        elif operation == 1:
            grey = _LUMA @ (linear @ np.asarray(mean) + offset)
            linear, offset = contrast * linear, contrast * offset + (1.0 - contrast) * grey
        else:
            step = _hue(hue) if operation == 3 else saturation * np.eye(3)
            if operation == 2:
                step = step + (1.0 - saturation) * _GREY
            linear, offset = step @ linear, step @ offset
    return np.column_stack([linear, offset])


def _hue(turn: float) -> _Matrix:
    """A turn about the grey axis (Rodrigues), from red towards green."""
    angle = 2.0 * math.pi * turn
    cos, sin = math.cos(angle), math.sin(angle)
    along = (1.0 - cos) / 3.0
    up, down = along + sin / math.sqrt(3.0), along - sin / math.sqrt(3.0)
    same = cos + along
    return np.array([[same, down, up], [up, same, down], [down, up, same]])


def jitter(
    view: Tensor,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: int,
    grey: bool = False,
) -> Tensor:
    """``jitter_matrix`` on a uint8 view, and greyscale behind it; rounded and clipped once."""
    values = view.reshape(3, -1).float()
    mean = (values.sum(1) / values.shape[1]).tolist()
    matrix = jitter_matrix(brightness, contrast, saturation, hue, order, mean)
    return _transformed(view, values, _GREY @ matrix if grey else matrix)


def grey(view: Tensor) -> Tensor:
    """Luma (ITU-R 601) in all three channels."""
    values = view.reshape(3, -1).float()
    return _transformed(view, values, np.column_stack([_GREY, np.zeros(3)]))


def _transformed(view: Tensor, values: Tensor, matrix: _Matrix) -> Tensor:
    # Plane by plane: for a product with a 3×3 matrix, libraries take twice as long.
    moved = torch.empty_like(values)
    for plane, weights in zip(moved, matrix.tolist(), strict=True):
        torch.mul(values[0], weights[0], out=plane)
        plane.add_(values[1], alpha=weights[1]).add_(values[2], alpha=weights[2])
        plane.add_(weights[3] + 0.5)  # half up, by the truncation below
    return _to_bytes(moved).view(view.shape)


def _to_bytes(values: Tensor) -> Tensor:
    """Floats clipped to 0 … 255 and truncated; through numpy, whose conversion is vectorised."""
    return torch.from_numpy(values.clamp_(0.0, 255.0).numpy().astype(np.uint8))


@lru_cache(maxsize=256)
def _kernel(size: int, sigma: float) -> tuple[float, ...]:
    offsets = np.linspace(-(size - 1) / 2, (size - 1) / 2, size)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return tuple((weights / weights.sum()).tolist())


def blur(image: Tensor, sigma: float, size: int) -> Tensor:
    """Gaussian blur of a uint8 ``(3, H, W)`` image with a ``size``-wide kernel, edges reflected.

    The two-dimensional kernel is the outer product of one-dimensional ones, so two passes give
    what one would; each is a sum of shifted images, quicker than a convolution of one channel.
    """
    kernel = _kernel(size, sigma)
    half = size // 2
    height, width = image.shape[1:]
    padded = functional.pad(image[None].float(), (half, half, half, half), mode="reflect")[0]
    rows = padded[:, :height] * kernel[0]
    for offset, weight in enumerate(kernel[1:], start=1):
        rows.add_(padded[:, offset : offset + height], alpha=weight)
    values = rows[:, :, :width] * kernel[0]
    for offset, weight in enumerate(kernel[1:], start=1):
        values.add_(rows[:, :, offset : offset + width], alpha=weight)
    return _to_bytes(values.add_(0.5))


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert every value of a uint8 image that is at least ``threshold``."""
    values = image.numpy()
    return torch.from_numpy(values ^ ((values >= threshold).view(np.uint8) * np.uint8(255)))
