from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from multikd.grids import resample_patches, target_grid


def test_equal_grids_give_the_very_same_tensor() -> None:
    patches = torch.randn(2, 6, 3)
    assert resample_patches(patches, (2, 3), (2, 3)) is patches


@pytest.mark.parametrize(
    "source, target",
    [((7, 5), (3, 4)), ((4, 4), (8, 6)), ((6, 3), (3, 6)), ((5, 1), (2, 1)), ((16, 16), (14, 14))],
)
def test_resampling_agrees_with_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    # Pillow's bilinear is antialiased when shrinking: an independent implementation.
    patches = torch.rand(1, source[0] * source[1], 2)
    result = resample_patches(patches, source, target).reshape(*target, 2)
    for channel in range(2):
        plane = Image.fromarray(patches[0, :, channel].reshape(source).numpy())
        expected = plane.resize(target[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(result[..., channel], np.asarray(expected), atol=1e-5)


def test_row_major_order_and_half_pixel_centres() -> None:
    # A ramp along the width stays one; along the height nothing changes.
    ramp = torch.arange(4.0).repeat(2, 1).reshape(1, 8, 1)
    halved = resample_patches(ramp, (2, 4), (2, 2), antialias=False)
    assert halved.flatten().tolist() == [0.5, 2.5, 0.5, 2.5]


def test_commutes_with_affine_maps() -> None:
    patches, scale, shift = torch.randn(2, 30, 4), torch.rand(4) + 0.5, torch.randn(4)
    before = resample_patches(patches * scale + shift, (6, 5), (3, 4))
    after = resample_patches(patches, (6, 5), (3, 4)) * scale + shift
    torch.testing.assert_close(before, after)


def test_antialias_averages_all_patches_and_can_be_left_out() -> None:
    spike = torch.zeros(1, 64, 1)
    spike[0, 0] = 1.0  # no patch of a plain 8→2 resampling reads the corner
    assert resample_patches(spike, (8, 8), (2, 2), antialias=False).sum() == 0
    assert resample_patches(spike, (8, 8), (2, 2)).sum() > 0


def test_half_precision_keeps_its_dtype_and_is_rounded_once() -> None:
    patches = torch.randn(1, 16, 2).bfloat16()
    result = resample_patches(patches, (4, 4), (2, 2))
    assert result.dtype == torch.bfloat16
    expected = resample_patches(patches.float(), (4, 4), (2, 2)).bfloat16()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("target", [(2, 3), (5, 4), (2, 5)])
def test_gradients(target: tuple[int, int]) -> None:
    patches = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resample_patches(x, (3, 4), target), patches)


def test_slices_of_tokens_are_accepted() -> None:
    tokens = torch.randn(2, 1 + 16, 3)
    view = resample_patches(tokens[:, 1:], (4, 4), (2, 2))
    torch.testing.assert_close(view, resample_patches(tokens[:, 1:].clone(), (4, 4), (2, 2)))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 9, D\).*received \(2, 8, 3\)"):
        resample_patches(torch.zeros(2, 8, 3), (3, 3), (2, 2))
    with pytest.raises(ValueError, match="1 or more"):
        resample_patches(torch.zeros(2, 9, 3), (3, 3), (0, 2))


def test_target_grid() -> None:
    student = [(32, 32), (8, 8)]  # the last rung counts
    assert target_grid(student, (14, 14), "teacher") == (14, 14)
    assert target_grid(student, (14, 14), "student") == (8, 8)
    assert target_grid(student, (14, 14), "smaller") == (8, 8)
    assert target_grid(student, (2, 7), "smaller") == (2, 7)
    assert target_grid([(2, 8)], (4, 4), "smaller") == (4, 4)
    with pytest.raises(ValueError, match="smaler.*did you mean 'smaller'"):
        target_grid(student, (14, 14), "smaler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        target_grid([], (14, 14), "teacher")
