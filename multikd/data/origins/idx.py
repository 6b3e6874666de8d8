"""IDX files (MNIST's format) as an origin."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multikd.data.origins.base import Listing, encode_png

_MOST_PIXELS_OF_IDX = 1 << 34


@dataclass
class IdxOrigin:
    """Images in an IDX file (MNIST's format), labels in another; either may be gzipped.

    Images are uint8 ``(N, H, W)`` grey or ``(N, H, W, 3)`` RGB, and are handed on as PNG.
    """

    images: str
    labels: str = ""
    classes: tuple[str, ...] = ()

    def list_items(self) -> Listing:
        """Items in the file's order."""
        count = len(self.pixels)
        labels = [-1] * count
        notes = [] if self.labels else ["no label file: the shards carry no labels"]
        classes = list(self.classes)
        if self.labels:
            values = read_idx(self.labels)
            if values.shape != (count,):
                raise ValueError(
                    f"{self.labels!r} has the shape {values.shape}, expected ({count},) for the "
                    f"{count} images of {self.images!r}"
                )
            labels = values.astype(int).tolist()
            classes = classes or [str(n) for n in range(max(labels, default=-1) + 1)]
            if max(labels, default=-1) >= len(classes):
                raise ValueError(
                    f"{self.labels!r} has the class number {max(labels)}, "
                    f"but {len(classes)} class names were given"
                )
        # The pixels belong to the listing's digest; there are no file sizes that could change.
        check = zlib.crc32(self.pixels.tobytes())
        return Listing([str(i) for i in range(count)], labels, [check] * count, classes, notes)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """All images, ``(N, H, W)`` or ``(N, H, W, 3)``."""
        pixels = read_idx(self.images)
        if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3):
            raise ValueError(
                f"{self.images!r} has the shape {pixels.shape}, "
                "expected images (N, H, W) or (N, H, W, 3)"
            )
        if not pixels.size:
            raise ValueError(f"{self.images!r} holds no images: its shape is {pixels.shape}")
        return pixels

    def picture(self, item: int) -> Image.Image:
        """The image itself, with nothing encoded in between."""
        return Image.fromarray(self.pixels[item])

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "labels": self.labels, "classes": self.classes}

    def read(self, item: int, name: str) -> bytes:
        """The image as PNG."""
        return encode_png(self.picture(item))


def read_idx(path: str) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Raises:
        ValueError: it does not exist, is no such file, or has fewer or more bytes than it says.
    """
    expanded = os.path.expanduser(path)
    try:
        with open(expanded, "rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(expanded) if zipped else open(expanded, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
                raise ValueError("it does not begin like an IDX file of unsigned bytes")
            shape = tuple(np.frombuffer(file.read(4 * head[3]), dtype=">u4").astype(int).tolist())
            size = int(np.prod(shape, dtype=object))
            if len(shape) != head[3] or size > _MOST_PIXELS_OF_IDX:
                raise ValueError(f"its header promises the shape {shape}")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        detail = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"cannot read the IDX file {path!r}: {detail}") from error
    if len(data) != size:
        found = "more" if len(data) > size else str(len(data))
        raise ValueError(
            f"cannot read the IDX file {path!r}: expected {size} bytes of data, received {found}"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
