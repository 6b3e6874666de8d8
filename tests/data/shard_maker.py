"""Small real tar shards for the loader's tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def png(number: int, size: tuple[int, int] = (28, 28), grey: bool = True) -> bytes:
    """A PNG whose pixels are a function of ``number``; (width, height)."""
    width, height = size
    shape = (height, width) if grey else (height, width, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(
    folder: Path,
    lengths: Sequence[int],
    broken: Sequence[int] = (),
    name: str = "s",
    size: tuple[int, int] = (28, 28),
) -> list[str]:
    """Shards of so many samples each; sample i has key ``<name>-i`` and label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    number, urls = 0, []
    for shard, length in enumerate(lengths):
        path = folder / f"{name}-{shard:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(length):
                image = b"\x89PNG no image" if number in broken else png(number, size)
                for extension, data in (("png", image), ("cls", str(number % 10).encode())):
                    info = tarfile.TarInfo(f"{name}-{number}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
        urls.append(str(path))
    return urls
