"""Colour and blur operations on one uint8 view ``(3, H, W)``, each a function of its parameters.

Brightness, contrast, saturation and hue are affine in RGB but for rounding and clipping between
them (hue nearly so: a turn about the grey axis in place of a shift in HSV), hence one 3×4 matrix
does all four, with greyscale too, in the distribution of torchvision's ColorJitter and a small
part of its time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
"""The 24 orders of brightness (0), contrast (1), saturation (2) and hue (3), lexicographic."""

_Rows = Sequence[Sequence[float]]
_Floats = npt.NDArray[np.float32]
_COLUMNS = 20_480  # multiplied by 3×4 numbers at once: OpenBLAS shares 2¹⁸ products among threads
_BLOCK = 16  # rows or columns that are blurred by one product
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision
_GREY = ((*_LUMA, 0.0),) * 3


def jitter_matrix(
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    order: int,
    mean: Sequence[float],
    grey: bool = False,
) -> _Rows:
    """Torchvision's ColorJitter with given factors, in ``JITTER_ORDERS[order]``, as one matrix.

    With the turn R and the saturation S = s·1 + (1 − s)·𝟙·lᵀ, l the luma, the linear part is
    brightness · contrast · (S·R or R·S), and greys 𝟙 pass all of them but the brightness as they
    are: R·𝟙 = S·𝟙 = 𝟙 and lᵀS = lᵀ. So what contrast adds is the same grey in every order but for
    what the turn makes of the mean before it. In plain numbers, as NumPy takes 1 µs a step.

    Args:
        brightness: factor on the values.
        contrast: factor on the distance from the mean grey of the image at that point.
        saturation: factor on the distance from each pixel's own grey.
        hue: part of a turn, −0.5 … 0.5.
        order: row of ``JITTER_ORDERS``.
        mean: mean red, green and blue of the image, which the contrast needs.
        grey: greyscale behind it.

    Returns:
        ``(3, 4)``: ``rgb' = m[:, :3] · rgb + m[:, 3]``.
    """
    same, up, down = _turn(hue)  # R is circulant, its first row same, down, up
    red, green, blue = _LUMA
    turned = (  # lᵀR
        red * same + green * up + blue * down,
        red * down + green * same + blue * up,
        red * up + green * down + blue * same,
    )
    place = JITTER_ORDERS[order].index
    late = place(3) < place(2)  # the saturation comes after the turn: lᵀ(S·R) = lᵀR
    middle = _dot(_LUMA, mean)
    if place(3) < place(1):
        after = _dot(turned, mean)
        both = place(2) < place(3)
        middle = saturation * after + (1.0 - saturation) * middle if both else after
    own = brightness * contrast * saturation
    common = brightness * contrast - own
    offset = brightness * (1.0 - contrast) * middle
    r, g, b = (common * weight for weight in (turned if late else _LUMA))
    if grey:
        return ((own * turned[0] + r, own * turned[1] + g, own * turned[2] + b, offset),) * 3
    return (
        (own * same + r, own * down + g, own * up + b, offset),
        (own * up + r, own * same + g, own * down + b, offset),
        (own * down + r, own * up + g, own * same + b, offset),
    )


def _turn(hue: float) -> tuple[float, float, float]:
    """A turn about the grey axis (Rodrigues): how much of each channel stays, goes up, goes down.

    Up is from red to green, green to blue and blue to red.
    """
    angle = 2.0 * math.pi * hue
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3.0)
    along = (1.0 - cos) / 3.0
    return cos + along, along + sin, along - sin


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


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
    mean = (np.einsum("ij->i", values[:3]) / values.shape[1]).tolist()
    matrix = jitter_matrix(brightness, contrast, saturation, hue, order, mean, grey)
    return _transformed(values, matrix).view(view.shape)


def grey(view: Tensor) -> Tensor:
    """Luma (ITU-R 601) in all three channels."""
    return _transformed(_planes(view), _GREY).view(view.shape)


def _planes(view: Tensor) -> _Floats:
    """uint8 ``(3, H, W)`` → float32 ``(4, H·W)``, the last row ones."""
    pixels = view.numpy().reshape(3, -1)
    values = np.empty((4, pixels.shape[1]), dtype=np.float32)
    values[:3] = pixels
    values[3] = 1.0
    return values


def _transformed(values: _Floats, matrix: _Rows) -> Tensor:
    """``matrix`` ``(3, 4)`` times ``values`` ``(4, N)``, as bytes."""
    narrow = np.array(matrix, dtype=np.float32)
    narrow[:, 3] += 0.5  # half up, by the truncation in the end
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
    the kernel has, in two thirds of the time of sums of shifted images.
    """
    band, half = _band(size, sigma), size // 2
    height, length = image.shape[1:]
    down, along = -height % _BLOCK, -length % _BLOCK  # so that the blocks come out even
    padded = functional.pad(image[None].float(), (half, half, half, half), mode="reflect")[0]
    if down or along:
        padded = functional.pad(padded, (0, along, 0, down))
    blocks = padded.unfold(1, band.shape[1], _BLOCK).transpose(2, 3).numpy()
    rows = np.matmul(band, blocks).reshape(3, height + down, -1)
    rows += np.float32(0.5)  # half up; the weights add up to 1
    blocks = torch.from_numpy(rows).unfold(2, band.shape[1], _BLOCK).transpose(1, 2).numpy()
    values = np.empty((3, height + down, length + along), dtype=np.float32)
    columns = values.reshape(3, height + down, -1, _BLOCK).swapaxes(1, 2)
    np.matmul(blocks, np.ascontiguousarray(band.T), out=columns)
    return torch.from_numpy(values[:, :height, :length].astype(np.uint8, order="C"))


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert every value of a uint8 image that is at least ``threshold``."""
    values = image.numpy()
    return torch.from_numpy(values ^ ((values >= threshold).view(np.uint8) * np.uint8(255)))
