import math

import pytest
import torch
from small_models import deployed
from torch.nn.functional import interpolate

from multikd.export.parity import (
    at_shape,
    check_images,
    measure_parity,
    parity_shapes,
    relative_error,
    synthetic_images,
)
from multikd.export.resampling import crop_resize


def test_every_image_has_its_own_denominator() -> None:
    expected = torch.tensor([[100.0, 1.0], [0.01, 0.0]])
    received = expected + torch.tensor([[0.0, 0.0], [0.001, 0.0]])
    assert relative_error(received, expected) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(expected, expected) == 0.0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_an_infinite_error(bad: float) -> None:
    assert relative_error(torch.tensor([[bad, 1.0]]), torch.ones(1, 2)) == math.inf
    assert relative_error(torch.full((1, 2), 1.0), torch.zeros(1, 2)) > 1e10
    with pytest.raises(ValueError, match=r"\(1, 3\) where the torch model gives \(1, 2\)"):
        relative_error(torch.ones(1, 3), torch.ones(1, 2))


def test_a_wrong_batch_or_resolution_is_found() -> None:
    encoder = deployed("ResNet")
    shapes = parity_shapes(encoder, dynamic_size=True)
    assert len({batch for batch, _, _ in shapes}) >= 3
    assert len({size[1:] for size in shapes}) == 3
    images = torch.rand(3, 3, 64, 64)
    good = measure_parity(encoder, encoder, shapes, images, 1e-6)
    assert good["max_relative_error"] == 0.0
    assert good["images"] == "real"
    assert len(good["cases"]) == len(shapes)
    for broken in (lambda x: len(x) == 5, lambda x: x.shape[2] != x.shape[3]):

        def run(x, broken=broken):
            return encoder(x) * (1.01 if broken(x) else 1.0)

        with pytest.raises(ValueError, match=r"differs from the torch model by 1\.0e-02"):
            measure_parity(encoder, run, shapes, images, 1e-4)


def test_images_are_checked_and_repeated() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    made = at_shape(images, (5, 32, 32))
    assert torch.equal(made, images[[0, 1, 0, 1, 0]].float() / 255)
    assert at_shape(images, (1, 40, 16)).shape == (1, 3, 40, 16)
    with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\).*received \(2, 1, 4, 4\)"):
        check_images(torch.zeros(2, 1, 4, 4), (4, 4))
    noise, kind = check_images(None, (48, 32))
    assert kind == "synthetic"
    assert noise.shape[1:] == (3, 48, 32)
    # Like a photograph, neighbours are alike: white noise has 1.13.
    assert (noise[..., 1:] - noise[..., :-1]).abs().mean() < 0.8 * noise.std()
    assert torch.equal(noise, synthetic_images((48, 32)))


@pytest.mark.parametrize("source", [(64, 64), (96, 64), (50, 131), (20, 24)])
def test_crop_and_resize_equal_torchs_antialiased_bicubic(source: tuple[int, int]) -> None:
    images = (synthetic_images(source, 2) * 255).to(torch.uint8)
    short = min(source)
    top, left = (source[0] - short) // 2, (source[1] - short) // 2
    if (source[0] - short) % 2 or (source[1] - short) % 2:
        images = images[..., : source[0] - (source[0] - short) % 2, :]
        images = images[..., : source[1] - (source[1] - short) % 2]
    crop = images[..., top : top + short, left : left + short].float() / 255
    # Beyond the crop's border ours sees the rest of the image: compare the inside.
    expected = interpolate(crop, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    received = crop_resize(images, (32, 32))
    assert received.shape == (2, 3, 32, 32)
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert torch.allclose(received[inside], expected[inside], atol=1e-5)
    if source[0] == source[1]:
        assert torch.allclose(received, expected, atol=1e-5)
