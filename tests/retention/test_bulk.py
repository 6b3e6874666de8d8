"""Batches of small pictures are resized to the bit as Pillow resizes each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from multikd.retention.bulk import resize_all

R = Image.Resampling


@pytest.mark.parametrize("resampling", [R.BILINEAR, R.BICUBIC, R.LANCZOS, R.NEAREST])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_each_picture_as_pillow_gives_it(resampling: R, channels: tuple[int, ...]) -> None:
    """Larger, smaller, one axis of each, not at all, fractional boxes, too large for us."""
    rng = np.random.default_rng(1)
    for height, width in ((28, 28), (17, 40), (96, 64), (100, 50)):
        pictures = rng.integers(0, 256, (3, height, width, *channels), dtype=np.uint8)
        pictures[0] = np.where(pictures[0] > 127, 255, 0)  # overshoots, which are clipped
        for size in ((64, 64), (20, 33), (width, height)):
            for box in ((0, 0, width, height), (1.5, 2.25, width - 1.5, height - 2.75)):
                ours = resize_all(pictures, size, box, resampling)
                theirs = [
                    np.asarray(Image.fromarray(p).resize(size, resampling, box=box))
                    for p in pictures
                ]
                assert np.array_equal(ours, np.stack(theirs)), (height, width, size, box)
