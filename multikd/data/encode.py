"""What is done to an image on its way into a shard: checked, and only on request changed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from multikd.data.decode import DEFAULT_MAX_PIXELS, EXTENSION_OF_FORMAT, decode_with_format

ImageFormat = Literal["jpeg", "png", "webp"]
_FORMAT_NAMES: dict[str, ImageFormat] = {"JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}
_EXTENSIONS: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    Attributes:
        resize: shrink (never enlarge) to this short side in pixels; None leaves sizes alone.
        format: re-encode as this; None keeps what is not resized byte for byte, and gives what is
            resized its own format (PNG where that is neither JPEG nor WebP).
        quality: of JPEG and WebP, 1 to 100.
        max_pixels: larger images are refused before they are decoded.
    """

    resize: int | None = None
    format: ImageFormat | None = None
    quality: int = 90
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be a short side of 1 pixel or more, not {self.resize}")
        if self.format not in (None, *_EXTENSIONS):
            raise ValueError(
                f"format must be one of {', '.join(_EXTENSIONS)} or left out, not {self.format!r}"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1…100, not {self.quality}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, not {self.max_pixels}")

    def apply(self, data: bytes) -> tuple[bytes, str]:
        """Decode ``data`` in full (a check in itself), and give bytes and extension to store.

        Raises:
            SampleFault: as ``decode_image``.
        """
        image, name = decode_with_format(data, self.max_pixels)
        size = self._size(image.size)
        own = _FORMAT_NAMES.get(name, "png")
        fits = self.format is None or (self.format == own and name in ("JPEG", "WEBP", "PNG"))
        if size == image.size and fits:
            return data, EXTENSION_OF_FORMAT.get(name, "img")
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        target = self.format or own
        # Colour profile and EXIF describe the pixels as they were: left in, they would be wrong.
        image.info.clear()
        buffer = io.BytesIO()
        if target == "png":
            image.save(buffer, format="PNG", optimize=True)
        else:
            image.save(buffer, format=target.upper(), quality=self.quality)
        return buffer.getvalue(), _EXTENSIONS[target]

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        short = min(size)
        if self.resize is None or short <= self.resize:
            return size
        width, height = (max(1, round(side * self.resize / short)) for side in size)
        return width, height
