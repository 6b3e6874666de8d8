"""Mosaics of small images for a teacher of large ones."""

from __future__ import annotations

import pytest
import torch
from helpers import training as small
from torch import Tensor, nn

from multikd.normalizers import NoNormalizers
from multikd.teachers import Teacher
from multikd.teachers.mosaic import compose, decompose
from multikd.types import EncoderSpec, TokenFeatures, Widths


class Means(nn.Module):
    """Mean colours of 8-pixel patches: what a patch says depends on that patch alone."""

    spec = EncoderSpec("means", Widths(3, 3), (64, 64), 8, (0.5,) * 3, (0.5,) * 3, fixed_size=True)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> TokenFeatures:
        self.sizes.append(tuple(images.shape))
        maps = nn.functional.avg_pool2d(images * self.scale, 8)
        grid = (maps.shape[2], maps.shape[3])
        return TokenFeatures(images.mean((2, 3)), maps.flatten(2).transpose(1, 2), grid)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("side", [2, 3])
def test_a_mosaic_taken_apart_is_the_single_images(count: int, side: int) -> None:
    images = torch.rand(count, 3, 16, 24)
    mosaics = compose(images, side)
    assert mosaics.shape == (-(-count // side**2), 3, side * 16, side * 24)
    assert torch.equal(mosaics[0, :, :16, :24], images[0])
    assert torch.equal(mosaics[0, :, :16, 24:48], images[1 % count])  # row by row
    apart = decompose(Means()(mosaics), side, count)
    single = Means()(images)
    assert apart.summary is None
    assert apart.grid == single.grid == (2, 3)
    torch.testing.assert_close(apart.patches, single.patches)


@pytest.mark.parametrize(("resize", "size"), [("own", 48), ("none", 32), ("grid", 40)])
def test_a_teacher_shows_a_mosaic_of_its_own_size(resize: str, size: int) -> None:
    encoder = Means()
    teacher = Teacher(encoder, resize=resize, mosaic=2)  # type: ignore[arg-type]
    assert teacher.widths == Widths(None, 3)
    images = torch.rand(5, 3, size, size)
    patch = size // 4
    features = teacher(images, patch)
    assert encoder.sizes == [(2, 3, 64, 64)]  # its own size, for two mosaics
    assert features.summary is None
    assert features.grid == teacher.grid_for((size, size), patch) == (4, 4)
    shown = images
    if size != 32:
        shown = nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    expected = Means()(shown.clamp(0, 1)).patches
    torch.testing.assert_close(features.patches, expected)


def test_a_real_vit_on_a_mosaic() -> None:
    teacher = small.teacher("test_vit", 96, mosaic=3)
    assert teacher.fingerprint() != small.teacher("test_vit", 96).fingerprint()
    images = torch.rand(4, 3, 32, 32)
    features = teacher(images)
    assert features.grid == teacher.grid_for((32, 32)) == (2, 2)
    whole = teacher.encoder(compose(images, 3))
    # Image 1 is the second tile of the first row of the first mosaic.
    tile = whole.patches.view(-1, 6, 6, 64)[0, :2, 2:4].reshape(4, 64)
    assert torch.equal(features.patches[1], tile)


def test_a_mosaic_trains() -> None:
    sam = small.teacher("test_vit", 64, mosaic=2)
    module = small.module(teachers={"sam": sam}, normalizers=NoNormalizers())
    module.train()
    total, record = module.step(small.batch(), 0, 0, training=True)
    total.backward()
    assert record.names == ("sam",)
    assert all(p.grad is not None for p in module.ladder.parameters())


def test_mistakes() -> None:
    for settings, words in (
        ({"mosaic": 0}, "mosaic must be 1 or more"),
        ({"mosaic": 3}, "3 images a side do not divide"),
    ):
        with pytest.raises(ValueError, match=words):
            Teacher(Means(), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no patches to cut out"):
        Teacher(small.SummaryOnly(), mosaic=2)
    with pytest.raises(ValueError, match="no whole patches of 8 px"):
        Teacher(Means(), resize="none", mosaic=2).grid_for((30, 30))
    with pytest.raises(ValueError, match="takes .* only"):
        Teacher(Means(), resize="grid", mosaic=2).grid_for((80, 80), 8)
    with pytest.raises(ValueError, match="does not divide the teacher's grid"):
        decompose(Means()(torch.rand(1, 3, 24, 24)), 2, 4)
