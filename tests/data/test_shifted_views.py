from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from multikd.data.views import DrawKey, ShiftedViews


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def shifts(policy: ShiftedViews, key: DrawKey) -> np.ndarray:
    """In patches."""
    return policy.draw(key, (120, 90))[:2] * policy.size / policy.patch


@pytest.mark.parametrize("kind", ["live", "recorded"])
def test_two_views_share_the_crop_and_are_shifted_by_whole_patches(kind: str) -> None:
    policy = ShiftedViews(size=32, patch=8, most=1)
    seen = set()
    for position in range(40):
        keys = [
            DrawKey.live(3, 1, position, view)
            if kind == "live"
            else DrawKey.recorded(3, 0, position, 2, view)
            for view in (0, 1)
        ]
        drawn = [policy.draw(key, (120, 90)) for key in keys]
        assert np.array_equal(drawn[0][2:], drawn[1][2:])  # one crop, one flip
        views = [policy.apply(photo(), parameters) for parameters in drawn]
        assert all(view.shape == (3, 32, 32) for view in views)
        # What the first shows at (i, j) the second shows `difference` pixels further.
        difference = np.round((drawn[0][:2] - drawn[1][:2]) * 32).astype(int)
        assert not (difference % 8).any()
        down, right = difference
        first = views[0][:, max(0, -down) : 32 - max(0, down), max(0, -right) : 32 - max(0, right)]
        second = views[1][:, max(0, down) : 32 + min(0, down), max(0, right) : 32 + min(0, right)]
        assert torch.equal(first, second)
        seen.add(tuple(difference // 8))
    assert len(seen) > 10  # 25 there are
    assert any(position not in ((0, 0),) for position in seen)


def test_shifts_are_uniform_and_know_nothing_of_the_crop() -> None:
    policy = ShiftedViews(size=32, patch=4, most=2)
    drawn = [policy.draw(DrawKey.live(0, 0, i, 0), (120, 90)) for i in range(3000)]
    values = np.array([d[:2] * 8 for d in drawn])
    for column in values.T:
        counts = np.bincount(np.round(column + 2).astype(int), minlength=5)
        assert counts.min() > 0.8 * 600
    tops = np.array([d[2] for d in drawn])
    assert abs(np.corrcoef(values[:, 0], tops)[0, 1]) < 0.06
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.06


def test_a_draw_comes_back() -> None:
    policy = ShiftedViews(size=32, patch=8, most=1)
    key = DrawKey.live(3, 1, 7, 1)
    assert np.array_equal(policy.draw(key, (120, 90)), policy.draw(key, (120, 90)))
    assert len(policy.draw(key, (120, 90))) == len(policy.names)
    still = ShiftedViews(size=32, patch=8, most=0)
    assert not shifts(still, key).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 30, "patch": 8}, "whole patches wide"),
        ({"size": 32, "patch": 8, "most": 2}, "two views must overlap, so below 2 for 4 patches"),
        ({"size": 32, "patch": 8, "most": -1}, "most must be 0 or more"),
        ({"size": 32, "patch": 0}, "received 32 and 0"),
        ({"size": 32, "patch": 8, "most": 1, "flip": 2.0}, "probability flip"),
    ],
)
def test_bad_settings(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShiftedViews(**settings)  # type: ignore[arg-type]
