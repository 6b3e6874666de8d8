"""Where a view lies in its image: crop boxes, crop and resize."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Pixels = npt.NDArray[np.uint8]
"""An upright RGB image as an array, ``(H, W, 3)``."""

Range = tuple[float, float]
ATTEMPTS = 10  # torchvision's, before the central crop
BOX_DRAWS = 2 * ATTEMPTS + 2  # uniform numbers that ``crop_box`` takes


def crop_box(
    u: list[float], image_size: tuple[int, int], scale: Range, ratio: Range
) -> tuple[float, float, float, float]:
    """torchvision's RandomResizedCrop box, as fractions of the image's height and width.

    A fraction in float32 gives its pixel back by rounding for sides up to 4 million.
    """
    width, height = image_size
    logs = (math.log(ratio[0]), math.log(ratio[1]))
    for attempt in range(ATTEMPTS):
        area = width * height * between(u[2 * attempt], scale)
        aspect = math.exp(between(u[2 * attempt + 1], logs))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(u[2 * ATTEMPTS] * (height - h + 1))
            left = int(u[2 * ATTEMPTS + 1] * (width - w + 1))
            return top / height, left / width, h / height, w / width
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return ((height - h) // 2) / height, ((width - w) // 2) / width, h / height, w / width


def crop_resize(pixels: Pixels, box: list[float], size: int, flip: bool = False) -> Tensor:
    """Crop first, then resize: the pixels outside the crop cost and count nothing.

    Bicubic with antialiasing, in torch's 8-bit arithmetic: Pillow's to 2 grey levels, in a quarter
    of its time. Between the passes over width and height values are rounded and clipped, so the
    order counts; it is Pillow's since version 13 (before, the width always came first).

    Args:
        pixels: uint8 ``(H, W, 3)``.
        box: top, left, height and width as fractions of the image.
        size: side of the result.
        flip: left to right, in the end.

    Returns:
        uint8 ``(3, size, size)``.
    """
    height, width = pixels.shape[:2]
    top, left = round(box[0] * height), round(box[1] * width)
    h, w = round(box[2] * height), round(box[3] * width)
    # A batch of one whose channels lie together, which torch resizes without rearranging them.
    crop = torch.from_numpy(pixels[top : top + h, left : left + w])[None].permute(0, 3, 1, 2)
    if height_first(h, w, size):
        crop = functional.interpolate(crop, (size, w), mode="bicubic", antialias=True)
    if crop.shape[2:] != (size, size):
        crop = functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)
    view = crop[0].numpy()
    # NumPy takes the channels apart in half of torch's time.
    return torch.from_numpy(np.array(view[:, :, ::-1] if flip else view, order="C"))


def height_first(height: int, width: int, size: int) -> bool:
    """Whether Pillow resizes the height of an image before its width, to a square of ``size``."""
    return height - size > 2 * max(width - size, 0)


def resize_centre(image: Image.Image, resize: int, size: int) -> Tensor:
    """Resize the short side and cut out the centre, computing only what is kept; Pillow's bicubic.

    Returns:
        uint8 ``(3, size, size)``.
    """
    box = centre_box(image.size, (resize, resize), (size, size))
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def centre_box(
    image_size: tuple[int, int], resize: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The part of an image that remains when it is resized to cover ``resize`` and cut to ``size``.

    Args:
        image_size: (width, height) of the image.
        resize: (height, width) that the resized image covers, touching one of them.
        size: (height, width) of the centre that is kept.

    Returns:
        (left, top, right, bottom) in pixels of the image.
    """
    width, height = image_size
    by_width = resize[1] * height >= resize[0] * width  # the width is the side that binds
    new_w = resize[1] if by_width else int(resize[0] * width / height)
    new_h = int(resize[1] * height / width) if by_width else resize[0]
    left, top = round((new_w - size[1]) / 2), round((new_h - size[0]) / 2)
    step_x, step_y = width / new_w, height / new_h
    box = (left * step_x, top * step_y, (left + size[1]) * step_x, (top + size[0]) * step_y)
    # Rounding must not push the box past the image by an ulp: PIL refuses it.
    return (box[0], box[1], min(box[2], float(width)), min(box[3], float(height)))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 ``(3, H, W)`` of an RGB image."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def as_pixels(image: Image.Image | Pixels) -> Pixels:
    """An RGB image as an array."""
    return np.array(image) if isinstance(image, Image.Image) else image


def as_image(image: Image.Image | Pixels) -> Image.Image:
    """An RGB image as Pillow's."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def between(u: float, bounds: Range) -> float:
    """The place ``u`` in [0, 1) of an interval."""
    return bounds[0] + u * (bounds[1] - bounds[0])
