"""Views: an image seen through recorded parameters.

A policy's ``draw`` turns a key into a float32 vector of parameters; its ``apply`` is a pure
function of (image, parameters). The key is a counter, so a view depends on (seed, epoch,
position, view) alone, or, for *recorded* views, on (seed, data set, sample, number): those come
back in later epochs, and teachers' features of them can be kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from multikd.data import colour, crops
from multikd.data.counters import Stream, uniforms
from multikd.data.crops import BOX_DRAWS, Pixels, Range

Parameters = npt.NDArray[np.float32]

Function = TypeVar("Function", bound=Callable[..., Any])

_BOX = ("top", "left", "height", "width")


def takes_pixels(apply: Function) -> Function:
    """Mark a policy's ``apply``: it also takes images as arrays, which are not made images then.

    A policy that overrides ``apply`` without this mark is given PIL images, as ever.
    """
    apply.takes_pixels = True  # type: ignore[attr-defined]
    return apply


class DrawKey(NamedTuple):
    """What a view's random numbers are a function of."""

    seed: int
    stream: Stream
    a: int
    b: int
    c: int

    @staticmethod
    def live(seed: int, epoch: int, position: int, view: int) -> DrawKey:
        """A new view each epoch."""
        return DrawKey(seed, Stream.LIVE_VIEW, epoch, position, view)

    @staticmethod
    def recorded(seed: int, dataset: int, sample: int, number: int, view: int = 0) -> DrawKey:
        """The ``number``-th recorded view of a sample."""
        return DrawKey(seed, Stream.RECORDED_VIEW, dataset, sample, (view << 32) | number)

    def shared(self) -> DrawKey:
        """The key of the first view of the same sample: what all its views have in common."""
        recorded = self.stream == Stream.RECORDED_VIEW
        return self._replace(c=self.c & 0xFFFFFFFF if recorded else 0)

    def uniforms(self, count: int) -> list[float]:
        """``count`` draws in [0, 1)."""
        drawn: list[float] = uniforms(
            count, self.seed, self.stream, self.a, self.b, self.c
        ).tolist()
        return drawn


def recorded_number(epoch: int, sample: int, count: int) -> int:
    """Which of ``count`` recorded views a sample shows at an epoch.

    Over ``count`` consecutive epochs every one comes once; the mixed bits of the sample's index
    spread the numbers over a batch.
    """
    mixed = (sample * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return (epoch + (mixed >> 33)) % count


class ViewPolicy(ABC):
    """How images become views.

    Attributes:
        size: side of the square view in pixels.
        recorded: number of recorded views a sample has; None draws a new one each epoch.
        names: what each entry of the parameter vector is (its layout).
    """

    size: int
    recorded: int | None
    names: tuple[str, ...]

    def _check(self, size: int, recorded: int | None) -> None:
        if size < 1:
            raise ValueError(f"the size of a view must be at least 1 pixel, received {size}")
        if recorded is not None and recorded < 1:
            raise ValueError(f"recorded must be at least 1 view or null, received {recorded}")
        self.size = size
        self.recorded = recorded

    @abstractmethod
    def draw(self, key: DrawKey, image_size: tuple[int, int]) -> Parameters:
        """Parameters ``(P,)`` in the order of ``names`` for an image of (width, height)."""

    @abstractmethod
    def apply(self, image: Image.Image, parameters: Parameters) -> Tensor:
        """The view of an RGB image: uint8 ``(3, size, size)``. Pure."""

    def see(self, pixels: Pixels, parameters: Parameters) -> Tensor:
        """``apply`` for an image that was decoded to an array ``(H, W, 3)``."""
        if getattr(type(self).apply, "takes_pixels", False):
            return self.apply(pixels, parameters)  # type: ignore[arg-type]
        return self.apply(Image.fromarray(pixels), parameters)

    def describe(self) -> dict[str, object]:
        """Class and settings, as JSON values: what a view's content depends on."""
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if not name.startswith("_")
        }
        return {"class": type(self).__name__, **settings}


class UnicViews(ViewPolicy):
    """UNIC's augmentation (arXiv 2408.05088; values of the published code).

    RandomResizedCrop (bicubic, antialiased), flip, colour jitter in random order, grey, blur,
    solarize. Layout of the parameters: ``top, left, height, width`` of the crop as fractions of
    the image, ``flip`` (0/1), ``jitter`` (0/1), ``brightness, contrast, saturation`` factors,
    ``hue`` shift, ``order`` (row of ``colour.JITTER_ORDERS``), ``grey`` (0/1), ``blur`` (sigma,
    0 = none), ``solarize`` (0/1).

    Args:
        size: side of the view.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's aspect ratio.
        flip, jitter, grey, blur, solarize: probabilities.
        brightness, contrast, saturation, hue: jitter strengths as torchvision's ColorJitter.
        blur_kernel, blur_sigma: odd kernel width and range of sigma.
        solarize_threshold: values from here on are inverted.
        recorded: see ``ViewPolicy``.
    """

    names = (
        *_BOX,
        *("flip", "jitter", "brightness", "contrast", "saturation", "hue", "order"),
        *("grey", "blur", "solarize"),
    )

    def __init__(
        self,
        size: int = 224,
        scale: Range = (0.08, 1.0),
        ratio: Range = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grey: float = 0.2,
        blur: float = 0.2,
        blur_kernel: int = 9,
        blur_sigma: Range = (0.1, 5.0),
        solarize: float = 0.2,
        solarize_threshold: int = 128,
        recorded: int | None = None,
    ) -> None:
        self._check(size, recorded)
        self.scale, self.ratio = _scale(scale), _range("ratio", ratio)
        self.flip = _probability("flip", flip)
        self.jitter = _probability("jitter", jitter)
        self.brightness = _strength("brightness", brightness, 1.0)
        self.contrast = _strength("contrast", contrast, 1.0)
        self.saturation = _strength("saturation", saturation, 1.0)
        self.hue = _strength("hue", hue, 0.5)
        self.grey = _probability("grey", grey)
        self.blur = _probability("blur", blur)
        if blur_kernel % 2 == 0 or not 1 <= blur_kernel // 2 < size:
            raise ValueError(
                f"blur_kernel must be odd, at least 3 and less than twice the view's size of "
                f"{size}, received {blur_kernel}"
            )
        self.blur_kernel = blur_kernel
        self.blur_sigma = _range("blur_sigma", blur_sigma)
        self.solarize = _probability("solarize", solarize)
        self.solarize_threshold = solarize_threshold

    def draw(self, key: DrawKey, image_size: tuple[int, int]) -> Parameters:
        """See the class for the layout."""
        drawn = key.uniforms(BOX_DRAWS + 11)
        u = drawn[BOX_DRAWS:]
        return np.array(
            (
                *crops.crop_box(drawn, image_size, self.scale, self.ratio),
                u[0] < self.flip,
                u[1] < self.jitter,
                *(
                    1 + (2 * x - 1) * strength
                    for x, strength in (
                        (u[2], self.brightness),
                        (u[3], self.contrast),
                        (u[4], self.saturation),
                    )
                ),
                (2 * u[5] - 1) * self.hue,
                int(u[6] * len(colour.JITTER_ORDERS)),
                u[7] < self.grey,
                crops.between(u[9], self.blur_sigma) if u[8] < self.blur else 0.0,
                u[10] < self.solarize,
            ),
            dtype=np.float32,
        )

    @takes_pixels
    def apply(self, image: Image.Image | Pixels, parameters: Parameters) -> Tensor:
        """Crop, flip, jitter, grey, blur, solarize, in this order."""
        values: list[float] = parameters.tolist()
        flip, jitter, brightness, contrast, saturation, hue, order, grey, sigma, solar = values[4:]
        view = crops.crop_resize(crops.as_pixels(image), values[:4], self.size, flip=bool(flip))
        if jitter:
            view = colour.jitter(
                view, brightness, contrast, saturation, hue, int(order), grey=bool(grey)
            )
        elif grey:
            view = colour.grey(view)
        if sigma:
            view = colour.blur(view, sigma, self.blur_kernel)
        if solar:
            view = colour.solarize(view, self.solarize_threshold)
        return view

    def describe(self) -> dict[str, object]:
        """See ``ViewPolicy``; also how colours are computed, which cached features depend on."""
        return {**super().describe(), "colour": "one matrix"}


class LightViews(ViewPolicy):
    """A gentle crop and a flip.

    Layout of the parameters: ``top, left, height, width`` of the crop as fractions of the image,
    ``flip`` (0/1). With ``scale=None`` nothing is cropped at random: short side to ``size``,
    centre crop, flip; the box is then the whole image.

    Args:
        size: side of the view.
        scale: range of the crop's share of the image's area, or None.
        ratio: range of the crop's aspect ratio.
        flip: probability.
        recorded: see ``ViewPolicy``.
    """

    names = (*_BOX, "flip")

    def __init__(
        self,
        size: int = 224,
        scale: Range | None = (0.5, 1.0),
        ratio: Range = (3 / 4, 4 / 3),
        flip: float = 0.5,
        recorded: int | None = None,
    ) -> None:
        self._check(size, recorded)
        self.scale = None if scale is None else _scale(scale)
        self.ratio = _range("ratio", ratio)
        self.flip = _probability("flip", flip)

    def draw(self, key: DrawKey, image_size: tuple[int, int]) -> Parameters:
        """See the class for the layout."""
        drawn = key.uniforms(BOX_DRAWS + 1)
        box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
        if self.scale is not None:
            box = crops.crop_box(drawn, image_size, self.scale, self.ratio)
        return np.array((*box, drawn[-1] < self.flip), dtype=np.float32)

    @takes_pixels
    def apply(self, image: Image.Image | Pixels, parameters: Parameters) -> Tensor:
        """Crop (or resize and centre crop), then flip."""
        values: list[float] = parameters.tolist()
        if self.scale is not None:
            pixels, flip = crops.as_pixels(image), bool(values[4])
            return crops.crop_resize(pixels, values[:4], self.size, flip)
        view = crops.resize_centre(crops.as_image(image), self.size, self.size)
        return view.flip(-1) if values[4] else view


class ShiftedViews(ViewPolicy):
    """Views of one crop that are shifted against one another by whole patches (C-RADIOv4).

    Two of them in ``train_views``, with the same settings, give two views of each image: the same
    crop and flip for both, and for each a shift of its own by up to ``most`` patches each way.
    Layout of the parameters: ``shift_top, shift_left`` (how far the view lies down and right of the
    crop's centre, in sides of the view), then ``top, left, height, width`` of the crop with its
    margin, and ``flip``. Losses that compare shifted views read the first two.

    Args:
        size: side of the view, whole patches.
        patch: pixels of a patch: of the student's, if grids are to stay aligned.
        most: largest shift in patches.
        scale: range of the crop's share of the image's area (with its margin).
        ratio: range of the crop's aspect ratio.
        flip: probability.
        recorded: see ``ViewPolicy``.
    """

    names = ("shift_top", "shift_left", *_BOX, "flip")

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        most: int = 2,
        scale: Range = (0.5, 1.0),
        ratio: Range = (3 / 4, 4 / 3),
        flip: float = 0.5,
        recorded: int | None = None,
    ) -> None:
        self._check(size, recorded)
        if patch < 1 or size % patch:
            raise ValueError(
                f"a shifted view must be whole patches wide: size must be a multiple of patch, "
                f"received {size} and {patch}"
            )
        if not 0 <= 2 * most < size // patch:
            raise ValueError(
                f"most must be 0 or more and two views must overlap, so below "
                f"{size // patch / 2:g} for {size // patch} patches, received {most}"
            )
        self.patch, self.most = patch, most
        self.scale, self.ratio = _scale(scale), _range("ratio", ratio)
        self.flip = _probability("flip", flip)

    def draw(self, key: DrawKey, image_size: tuple[int, int]) -> Parameters:
        """See the class for the layout."""
        common = key.shared().uniforms(BOX_DRAWS + 1)
        box = crops.crop_box(common, image_size, self.scale, self.ratio)
        # Behind the common draws, so that the first view's shift is no function of its crop.
        own = key.uniforms(BOX_DRAWS + 3)[-2:]
        steps = [int(u * (2 * self.most + 1)) - self.most for u in own]
        shift = [step * self.patch / self.size for step in steps]
        return np.array((*shift, *box, common[-1] < self.flip), dtype=np.float32)

    @takes_pixels
    def apply(self, image: Image.Image | Pixels, parameters: Parameters) -> Tensor:
        """Crop with a margin of ``most`` patches, flip, and cut out the shifted view."""
        values: list[float] = parameters.tolist()
        margin = self.most * self.patch
        pixels, side = crops.as_pixels(image), self.size + 2 * margin
        view = crops.crop_resize(pixels, values[2:6], side, flip=bool(values[6]))
        top, left = (margin + round(shift * self.size) for shift in values[:2])
        return view[:, top : top + self.size, left : left + self.size].contiguous()


class EvalViews(ViewPolicy):
    """Short side to ``resize`` (bicubic, antialiased), centre crop of ``size``. No parameters.

    Args:
        size: side of the view.
        resize: short side before the crop; None: ``size`` (as the published UNIC evaluates).
    """

    names = ()

    def __init__(self, size: int = 224, resize: int | None = None) -> None:
        self._check(size, 1)  # the one view there is comes back each epoch
        if resize is not None and resize < size:
            raise ValueError(f"resize must be at least the size {size}, received {resize}")
        self.resize = resize

    def draw(self, key: DrawKey, image_size: tuple[int, int]) -> Parameters:
        """Nothing is drawn: ``(0,)``."""
        return np.zeros(0, dtype=np.float32)

    @takes_pixels
    def apply(self, image: Image.Image | Pixels, parameters: Parameters) -> Tensor:
        """Resize and centre crop."""
        image = crops.as_image(image)
        return crops.resize_centre(image, self.resize or self.size, self.size)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"the probability {name} must be in 0 … 1, received {value}")
    return value


def _strength(name: str, value: float, most: float) -> float:
    if not 0 <= value <= most:
        raise ValueError(f"the jitter strength {name} must be in 0 … {most}, received {value}")
    return value


def _range(name: str, bounds: Range) -> Range:
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be an increasing pair from 0 on, received {bounds}")
    return (bounds[0], bounds[1])


def _scale(bounds: Range) -> Range:
    low, high = _range("scale", bounds)
    if low == 0 or high > 1:
        raise ValueError(f"scale must lie in (0, 1], received {bounds}")
    return (low, high)
