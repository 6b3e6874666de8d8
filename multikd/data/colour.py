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

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional

JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
"""The 24 orders of brightness (0), contrast (1), saturation (2) and hue (3), lexicographic."""

_Matrix = npt.NDArray[np.float64]
_Floats = npt.NDArray[np.float32]
_COLUMNS = 20_480  # multiplied by 3×4 numbers at once: with 21,846, OpenBLAS would start threads
_BLOCK = 16  # rows or columns that are blurred by one product
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
    values = _planes(view)
    mean = np.einsum("ij->i", values[:3]) / values.shape[1]
    matrix = jitter_matrix(brightness, contrast, saturation, hue, order, mean.tolist())
    return _transformed(values, _GREY @ matrix if grey else matrix).view(view.shape)


def grey(view: Tensor) -> Tensor:
    """Luma (ITU-R 601) in all three channels."""
    matrix = np.column_stack([_GREY, np.zeros(3)])
    return _transformed(_planes(view), matrix).view(view.shape)


def _planes(view: Tensor) -> _Floats:
    """uint8 ``(3, H, W)`` → float32 ``(4, H·W)``, the last row ones."""
    pixels = view.numpy().reshape(3, -1)
    values = np.empty((4, pixels.shape[1]), dtype=np.float32)
    values[:3] = pixels
    values[3] = 1.0
    return values


def _transformed(values: _Floats, matrix: _Matrix) -> Tensor:
    """``matrix`` ``(3, 4)`` times ``values`` ``(4, N)``, as bytes."""
    rounding = np.array((0.0, 0.0, 0.0, 0.5))  # half up, by the truncation in the end
    narrow = (matrix + rounding).astype(np.float32)
    count = values.shape[1]
    bytes_ = np.empty((3, count), dtype=np.uint8)
    moved = np.empty((3, min(count, _COLUMNS)), dtype=np.float32)
    for start in range(0, count, _COLUMNS):
        part = values[:, start : start + _COLUMNS]
        result = np.matmul(narrow, part, out=moved[:, : part.shape[1]])
        torch.from_numpy(result).clamp_(0.0, 255.0)  # in half of the time of numpy's
        bytes_[:, start : start + _COLUMNS] = result
    return torch.from_numpy(bytes_)


def _band(size: int, sigma: float) -> _Floats:
    """A Gaussian kernel as a matrix ``(_BLOCK, _BLOCK + size − 1)``: each row one pixel further."""
    half, width = size // 2, _BLOCK + size - 1
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-half, half + 1)]
    total = sum(weights)
    band = np.zeros((_BLOCK, width + 1), dtype=np.float32)
    band[:, :size] = [weight / total for weight in weights]
    return band.ravel()[: _BLOCK * width].reshape(_BLOCK, width)  # one less a row shifts the rows


def blur(image: Tensor, sigma: float, size: int) -> Tensor:
    """Gaussian blur of a uint8 ``(3, H, W)`` image with a ``size``-wide kernel, edges reflected.

    The two-dimensional kernel is the outer product of one-dimensional ones, so two passes give
    what one would; each multiplies blocks of rows or columns by a band matrix: more products than
    the kernel has, in half of the time.
    """
    band, half = _band(size, sigma), size // 2
    right = np.ascontiguousarray(band.T)
    width, (height, length) = len(right), image.shape[1:]
    down, along = -height % _BLOCK, -length % _BLOCK  # so that the blocks come out even
    padded = functional.pad(image[None].float(), (half, half, half, half), mode="reflect")
    if down or along:
        padded = functional.pad(padded, (0, along, 0, down))
    blocks = sliding_window_view(padded[0].numpy(), width, axis=1)[:, ::_BLOCK]
    rows = np.matmul(band, blocks.swapaxes(2, 3)).reshape(3, height + down, -1)
    rows += np.float32(0.5)  # half up; the weights add up to 1
    blocks = sliding_window_view(rows, width, axis=2)[:, :, ::_BLOCK]
    values = np.empty((*blocks.shape[:3], _BLOCK), dtype=np.float32)
    np.matmul(blocks.swapaxes(1, 2), right, out=values.swapaxes(1, 2))
    blurred = values.astype(np.uint8).reshape(3, height + down, length + along)
    return torch.from_numpy(np.ascontiguousarray(blurred[:, :height, :length]))


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert every value of a uint8 image that is at least ``threshold``."""
    values = image.numpy()
    return torch.from_numpy(values ^ ((values >= threshold).view(np.uint8) * np.uint8(255)))
