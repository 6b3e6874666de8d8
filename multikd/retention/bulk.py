"""Many small pictures of one size resized at once, to the bit what Pillow makes of each.

Data sets that are one array (IDX files, torchvision's small ones) have pictures so small that
calling Pillow for each costs more than resizing it. Pillow resizes bytes in fixed point (22 bits),
along one axis and then the other, rounding to bytes in between: with its own coefficients the same
can be done for a batch by matrix products of integers. Which axis comes first depends on the sizes
and on Pillow's version, so it is found by trying; where neither order gives Pillow's bytes, Pillow
resizes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Fractional bits of Pillow's coefficients for 8-bit images (``PRECISION_BITS``, Resample.c).
_BITS = 22
#: Above this side, resizing itself is what costs, and Pillow's loops are the better ones.
MAX_SIDE = 96

_FILTERS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)

Box = tuple[float, float, float, float]


def resize_all(
    pictures: npt.NDArray[np.uint8],
    size: tuple[int, int],
    box: Box,
    resampling: Image.Resampling,
) -> npt.NDArray[np.uint8]:
    """Each picture as ``Image.resize(size, resampling, box)`` gives it.

    Args:
        pictures: ``(B, H, W)`` or ``(B, H, W, C)``.
        size: width and height wanted, in Pillow's order.
        box: left, upper, right, lower edge of the part that is seen, in pixels, may be fractional.
        resampling: any of Pillow's.

    Returns:
        uint8 ``(B, height, width)`` or ``(B, height, width, C)``.
    """
    height, width = pictures.shape[1:3]
    order = _order(height, width, size, box, resampling)
    if order is None:
        each = (Image.fromarray(picture).resize(size, resampling, box=box) for picture in pictures)
        return np.stack([np.asarray(picture) for picture in each])
    return _resized(pictures, size, box, resampling, order)


def _resized(
    pictures: npt.NDArray[np.uint8],
    size: tuple[int, int],
    box: Box,
    resampling: Image.Resampling,
    order: tuple[int, int],
) -> npt.NDArray[np.uint8]:
    for axis in order:  # 1: along columns, 2: along rows
        low, high = box[2 - axis], box[4 - axis]
        weights = _weights(pictures.shape[axis], size[2 - axis], low, high, resampling)
        pictures = _along(pictures, axis, weights)
    return pictures


@lru_cache(maxsize=64)
def _order(
    height: int, width: int, size: tuple[int, int], box: Box, resampling: Image.Resampling
) -> tuple[int, int] | None:
    """The order of axes that gives what this Pillow gives for pictures of noise."""
    if max(height, width) > MAX_SIDE or resampling not in _FILTERS:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (4, height, width), dtype=np.uint8)
    truth = [np.asarray(Image.fromarray(p).resize(size, resampling, box=box)) for p in noise]
    for order in ((2, 1), (1, 2)):
        if np.array_equal(_resized(noise, size, box, resampling, order), np.stack(truth)):
            return order
    return None


@lru_cache(maxsize=64)
def _weights(
    n: int, m: int, low: float, high: float, resampling: Image.Resampling
) -> npt.NDArray[np.float64]:
    """How much of each of n pixels is in each of m outputs, ``(n, m)``: integers, over 2²².

    Pillow says so itself: unit pulses in an image of 32-bit integers, whose resized values are
    rounded as its coefficients are.
    """
    pulses = Image.fromarray(np.diag(np.full(n, 1 << _BITS, dtype=np.int32)))
    return np.asarray(pulses.resize((m, n), resampling, box=(low, 0, high, n)), dtype=np.float64)


def _along(
    pictures: npt.NDArray[np.uint8], axis: int, weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """One pass. All sums are integers far below 2⁵³: float64 products hold them exactly."""
    total = np.moveaxis(pictures, axis, -1).astype(np.float64) @ weights
    total += 1 << (_BITS - 1)
    total *= 2.0**-_BITS
    np.clip(total, 0, 255, out=total)
    return np.moveaxis(total.astype(np.uint8), -1, axis)  # the cast rounds down
