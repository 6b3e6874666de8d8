from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2

from multikd.data import colour, crops
from multikd.data.views import DrawKey, EvalViews, LightViews, UnicViews, recorded_number


def photo(width: int = 120, height: int = 90) -> Image.Image:
    """A smooth colourful image with noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + i) * 60 + np.cos(y / (7 + i)) * 50 + 120 for i in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def draws(policy: UnicViews | LightViews, count: int, size: tuple[int, int]) -> np.ndarray:
    return np.stack([policy.draw(DrawKey.live(0, 1, p, 0), size) for p in range(count)])


def test_a_draw_is_a_function_of_its_key() -> None:
    policy, size = UnicViews(32), (120, 90)
    drawn = policy.draw(DrawKey.live(1, 2, 3, 0), size)
    assert drawn.dtype == np.float32
    assert drawn.shape == (len(policy.names),)
    np.testing.assert_array_equal(drawn, UnicViews(32).draw(DrawKey.live(1, 2, 3, 0), size))
    others = [(0, 2, 3, 0), (1, 0, 3, 0), (1, 2, 0, 0), (1, 2, 3, 1)]
    for key in [DrawKey.live(*other) for other in others] + [DrawKey.recorded(1, 2, 3, 0)]:
        assert not np.array_equal(drawn, policy.draw(key, size))
    image = photo()
    view = policy.apply(image, drawn)
    assert view.dtype == torch.uint8
    assert view.shape == (3, 32, 32)
    assert torch.equal(view, policy.apply(image, drawn))


def test_probabilities_and_ranges_of_the_unic_draw() -> None:
    policy = UnicViews(32)
    values = dict(zip(policy.names, draws(policy, 4000, (120, 90)).T, strict=True))
    for name, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)):
        assert abs(values[name].mean() - p) < 4 * np.sqrt(p * (1 - p) / 4000), name
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        assert abs(values[name].min() - (1 - strength)) < 0.01
        assert abs(values[name].max() - (1 + strength)) < 0.01
        assert abs(values[name].mean() - 1) < 0.02
    assert abs(np.abs(values["hue"]).max() - 0.1) < 0.001
    counts = np.bincount(values["order"].astype(int), minlength=24)
    assert len(counts) == 24
    assert counts.min() > 110
    blurred = values["blur"][values["blur"] > 0]
    assert abs(len(blurred) / 4000 - 0.2) < 0.03
    assert blurred.min() < 0.15
    assert 4.9 < blurred.max() <= 5
    independent = np.corrcoef(values["flip"], values["jitter"])[0, 1]
    assert abs(independent) < 0.06


@pytest.mark.parametrize("size", [(120, 90), (400, 40), (28, 28)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    policy = LightViews(32, scale=(0.2, 1.0))
    ours = draws(policy, 3000, size)[:, :4] * np.array([size[1], size[0]] * 2)
    assert np.abs(ours - ours.round()).max() < 1e-3  # whole pixels come back out of float32
    torch.manual_seed(0)
    blank = torch.zeros(3, size[1], size[0])
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    spread = theirs.std(axis=0) + 1e-3
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 0.1 * spread + 0.05).all()
    assert (np.abs(ours.std(axis=0) - theirs.std(axis=0)) < 0.08 * spread + 0.05).all()


def stark(width: int = 120, height: int = 90) -> Image.Image:
    """Black and white noise: every other value is clipped between the passes of a resize."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)


def resized(crop: Image.Image, size: int) -> torch.Tensor:
    """Pillow's bicubic, a call for each pass: the order is ours, whatever Pillow's version."""
    between = (size, crop.height)
    if crops.height_first(crop.height, crop.width, size):
        between = (crop.width, size)
    for sides in (between, (size, size)):
        crop = crop.resize(sides, Image.Resampling.BICUBIC)
    return tvf.pil_to_tensor(crop)


def crop_of(image: Image.Image, drawn: np.ndarray) -> list[int]:
    """Top, left, height and width in pixels."""
    return [int(v) for v in (drawn[:4] * np.array([image.height, image.width] * 2)).round()]


@pytest.mark.parametrize(
    "image", [photo(), stark(), stark(90, 120)], ids=["photo", "stark", "stark and tall"]
)
def test_crop_and_flip_equal_pillows(image: Image.Image) -> None:
    policy, orders = LightViews(48, scale=(0.1, 1.0)), set()
    for position in range(60):
        drawn = policy.draw(DrawKey.live(0, 0, position, 0), image.size)
        top, left, height, width = crop_of(image, drawn)
        orders.add(crops.height_first(height, width, 48))
        reference = resized(image.crop((left, top, left + width, top + height)), 48)
        if drawn[4]:
            reference = v2.horizontal_flip(reference)
        assert levels(policy.apply(image, drawn), reference) <= 2
    assert orders == {True, False}


def test_crops_are_near_exact_arithmetic() -> None:
    """8-bit rounding (and clipping) between the two passes remains."""
    image, policy = photo(), LightViews(48, scale=(0.1, 1.0), flip=0.0)
    pixels, bicubic = tvf.pil_to_tensor(image).double(), v2.InterpolationMode.BICUBIC
    for position in range(30):
        drawn = policy.draw(DrawKey.live(0, 0, position, 0), image.size)
        box = crop_of(image, drawn)
        exact = v2.resized_crop(pixels, *box, [48, 48], bicubic, antialias=True)
        off = (policy.apply(image, drawn).double() - exact.clamp(0, 255)).abs()
        assert off.mean() < 0.5
        assert (off > 2).double().mean() < 1e-3


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow resized the width first before 13"
)
def test_the_order_of_the_passes_is_pillows() -> None:
    """Boxes around the border between the two orders; the wrong one is 20 levels off."""
    image, size = stark(150, 200), 48
    pixels, wrong = np.array(image), 0
    for width in (20, 47, 48, 49, 60, 96, 110, 150):
        border = size + 2 * max(width - size, 0)
        for height in {min(border + step, 200) for step in (-20, 0, 1, 2, 30)}:
            part = image.crop((0, 0, width, height))
            theirs = tvf.pil_to_tensor(part.resize((size, size), Image.Resampling.BICUBIC))
            view = crops.crop_resize(pixels, [0.0, 0.0, height / 200, width / 150], size)
            assert levels(view, theirs) <= 2, (height, width)
            other = part.resize((size, height), Image.Resampling.BICUBIC)
            other = other.resize((size, size), Image.Resampling.BICUBIC)
            wrong = max(wrong, levels(view, tvf.pil_to_tensor(other)))
    assert wrong > 10


def whole(policy: UnicViews, **values: float) -> np.ndarray:
    """Parameters that do nothing but what is named, on the whole image."""
    neutral = {"height": 1, "width": 1, "brightness": 1, "contrast": 1, "saturation": 1}
    drawn = [values.get(name, neutral.get(name, 0)) for name in policy.names]
    return np.array(drawn, dtype=np.float32)


def test_single_operations_equal_torchvision() -> None:
    image = photo(64, 64)
    pixels = tvf.pil_to_tensor(image)
    policy = UnicViews(64)
    assert torch.equal(policy.apply(image, whole(policy)), pixels)
    assert torch.equal(policy.apply(image, whole(policy, flip=1)), v2.horizontal_flip(pixels))
    grey = v2.rgb_to_grayscale(pixels, 3)
    assert levels(policy.apply(image, whole(policy, grey=1)), grey) <= 1
    solar = v2.solarize(pixels, 128)
    assert torch.equal(policy.apply(image, whole(policy, solarize=1)), solar)
    for sigma in (0.1, 0.7, 2.0, 5.0):
        drawn = whole(policy, blur=sigma)
        reference = v2.gaussian_blur(pixels, [9, 9], [float(drawn[-2])] * 2)
        assert levels(policy.apply(image, drawn), reference) <= 1
    for name, factor in (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2)):
        view = policy.apply(image, whole(policy, jitter=1, **{name: factor}))
        expected = tvf.pil_to_tensor(getattr(tvf, f"adjust_{name}")(image, factor))
        assert levels(view, expected) <= 1, name
        assert (view.double() - pixels.double()).abs().mean() > 4, name


@pytest.mark.parametrize("size", [16, 41, 48, 100])
@pytest.mark.parametrize("kernel", [3, 9, 23])
def test_blur_of_any_size_equals_torchvisions(size: int, kernel: int) -> None:
    pixels = tvf.pil_to_tensor(photo(size, size))
    for sigma in (0.1, 0.7, 2.0, 5.0):
        ours = colour.blur(pixels, sigma, kernel)
        assert ours.is_contiguous()
        assert levels(ours, v2.gaussian_blur(pixels, [kernel] * 2, [sigma] * 2)) <= 1
    white = torch.full((3, size, size), 255, dtype=torch.uint8)
    assert torch.equal(colour.blur(white, 2.0, kernel), white)


def test_hue_turns_the_way_of_torchvision_and_as_far() -> None:
    """A turn about the grey axis is no shift in HSV, but like it."""
    image, policy = photo(64, 64), UnicViews(64)
    pixels = tvf.pil_to_tensor(image).double()
    for turn in (0.1, 0.05, -0.1):
        ours = policy.apply(image, whole(policy, jitter=1, hue=turn)).double() - pixels
        theirs = tvf.pil_to_tensor(tvf.adjust_hue(image, turn)).double() - pixels
        likeness = (ours * theirs).sum() / (ours.norm() * theirs.norm())
        assert likeness > 0.75
        assert 0.7 < ours.norm() / theirs.norm() < 1.3
    neutral = policy.apply(image, whole(policy, jitter=1)).double()
    assert torch.equal(neutral, pixels)


def test_jitter_is_the_four_operations_in_the_order_of_the_parameters() -> None:
    """Against torchvision's operations one after another in float64, never clipped."""
    rng = np.random.default_rng(1)
    # More pixels than are multiplied at once.
    view = torch.from_numpy(rng.integers(90, 160, (3, 150, 141), dtype=np.uint8))
    brightness, contrast, saturation = 1.1, 0.8, 1.15
    results = set()
    for row, order in enumerate(colour.JITTER_ORDERS):
        expected = view.double()
        for number in order:
            grey = (expected * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
            if number == 0:
                expected = brightness * expected
            elif number == 1:
                expected = contrast * expected + (1 - contrast) * grey.mean()
            elif number == 2:
                expected = saturation * expected + (1 - saturation) * grey
        jittered = colour.jitter(view, brightness, contrast, saturation, 0.0, row)
        assert (jittered.double() - expected).abs().max() < 0.51
        turned = colour.jitter(view, brightness, contrast, saturation, 0.1, row)
        results.add(turned.numpy().tobytes())
        grey_too = colour.jitter(view, brightness, contrast, saturation, 0.1, row, grey=True)
        assert levels(grey_too, colour.grey(turned)) <= 1
    assert len(results) > 3


def test_the_jitter_s_matrix_is_the_product_of_its_steps() -> None:
    """Each step a 4×4 matrix in float64, the turn as the exponential of a rotation about grey."""
    luma, mean = torch.tensor([0.299, 0.587, 0.114]).double(), torch.tensor([90.0, 120.0, 40.0])
    brightness, contrast, saturation, hue = 1.3, 0.7, 1.15, 0.08
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).double() / 3**0.5
    grey = torch.eye(4).double()
    grey[:3, :3] = luma.expand(3, 3)
    for row, order in enumerate(colour.JITTER_ORDERS):
        product = torch.eye(4).double()
        for number in order:
            step = torch.eye(4).double()
            if number == 0:
                step[:3, :3] *= brightness
            elif number == 1:
                step[:3, :3] *= contrast
                now = (product @ torch.cat([mean.double(), torch.ones(1).double()]))[:3]
                step[:3, 3] = (1 - contrast) * (luma @ now)
            elif number == 2:
                step = saturation * step + (1 - saturation) * grey
            else:
                step[:3, :3] = torch.linalg.matrix_exp(2 * np.pi * hue * across)
            product = step @ product
        for also_grey, expected in ((False, product), (True, grey @ product)):
            matrix = colour.jitter_matrix(
                brightness, contrast, saturation, hue, row, mean.tolist(), also_grey
            )
            torch.testing.assert_close(torch.tensor(matrix).double(), expected[:3])


def test_colours_have_the_distribution_of_torchvisions_colour_jitter() -> None:
    """Mean and deviation of each channel over many draws, and how both vary."""
    image = photo(48, 48)
    pixels = tvf.pil_to_tensor(image)
    policy = UnicViews(48, jitter=1.0, grey=0.0, blur=0.0, solarize=0.0)
    reference = ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(0)
    ours, theirs = [], []
    for position in range(600):
        drawn = policy.draw(DrawKey.live(0, 0, position, 0), image.size)
        drawn[:4] = (0, 0, 1, 1)
        drawn[4] = 0
        for kept, view in (
            (ours, policy.apply(image, drawn)),
            (theirs, tvf.pil_to_tensor(reference(image))),
        ):
            values = view.double().flatten(1)
            kept.append(torch.cat([values.mean(1), values.std(1)]))
    a, b = torch.stack(ours), torch.stack(theirs)
    spread = b.std(0)
    # Three standard errors of the difference of two means, and a grey level for the turn.
    assert ((a.mean(0) - b.mean(0)).abs() < 3 * spread * (2 / 600) ** 0.5 + 1.5).all()
    assert ((a.std(0) / spread - 1).abs() < 0.2).all()
    assert (a.mean(0) - pixels.double().flatten(1).mean(1).repeat(2)).abs().max() > 0.2


@pytest.mark.parametrize("size", [(120, 90), (90, 121), (64, 64), (28, 28), (300, 31)])
@pytest.mark.parametrize("resize", [None, 73])
def test_eval_views_equal_resize_and_centre_crop(size: tuple[int, int], resize: int | None) -> None:
    image, policy = photo(*size), EvalViews(64, resize)
    resized = tvf.resize(image, resize or 64, tvf.InterpolationMode.BICUBIC)
    reference = tvf.pil_to_tensor(tvf.center_crop(resized, [64, 64]))
    drawn = policy.draw(DrawKey.live(0, 0, 0, 0), image.size)
    assert drawn.shape == (0,)
    # Only the part that is kept is computed, from a box in float32: 2 levels on noise.
    assert levels(policy.apply(image, drawn), reference) <= 2


def test_light_views_without_a_crop() -> None:
    image, policy = photo(), LightViews(48, scale=None, flip=1.0)
    view = policy.apply(image, policy.draw(DrawKey.live(0, 0, 0, 0), image.size))
    assert torch.equal(view.flip(-1), EvalViews(48).apply(image, np.zeros(0, np.float32)))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 3)])
def test_tiny_and_narrow_images(size: tuple[int, int]) -> None:
    image = photo(*size)
    for policy in (UnicViews(16), LightViews(16), LightViews(16, scale=None), EvalViews(16, 20)):
        for position in range(20):
            drawn = policy.draw(DrawKey.live(0, 0, position, 0), image.size)
            assert policy.apply(image, drawn).shape == (3, 16, 16)


def test_recorded_numbers_cover_all_views_over_consecutive_epochs() -> None:
    for sample in range(50):
        for start in (0, 13):
            numbers = [recorded_number(epoch, sample, 4) for epoch in range(start, start + 4)]
            assert sorted(numbers) == [0, 1, 2, 3]
    spread = np.bincount([recorded_number(0, sample, 4) for sample in range(4000)])
    assert spread.min() > 800


def test_arrays_and_images_give_one_view_and_a_policy_of_ones_own_gets_images() -> None:
    image = photo()
    seen: list[object] = []

    class Own(LightViews):
        def apply(self, image: Image.Image, parameters: np.ndarray) -> torch.Tensor:  # type: ignore[override]
            seen.append(image)
            return super().apply(image, parameters)

    for policy in (UnicViews(32), LightViews(32), LightViews(32, scale=None), EvalViews(32)):
        drawn = policy.draw(DrawKey.live(0, 0, 5, 0), image.size)
        assert torch.equal(policy.see(np.array(image), drawn), policy.apply(image, drawn))
    Own(32).see(np.array(image), Own(32).draw(DrawKey.live(0, 0, 5, 0), image.size))
    assert isinstance(seen[0], Image.Image)


def test_settings_are_described_and_checked() -> None:
    assert LightViews(32).describe() == {
        "class": "LightViews",
        "size": 32,
        "recorded": None,
        "scale": [0.5, 1.0],
        "ratio": [3 / 4, 4 / 3],
        "flip": 0.5,
    }
    assert UnicViews(32).describe() != UnicViews(32, hue=0.2).describe()
    for make, words in (
        (lambda: UnicViews(0), "size"),
        (lambda: UnicViews(32, scale=(0.0, 1.0)), "scale"),
        (lambda: UnicViews(32, grey=1.2), "grey"),
        (lambda: UnicViews(32, hue=0.6), "hue"),
        (lambda: UnicViews(32, blur_kernel=8), "blur_kernel"),
        (lambda: UnicViews(4), "blur_kernel"),
        (lambda: LightViews(32, recorded=0), "recorded"),
        (lambda: LightViews(32, ratio=(2.0, 1.0)), "ratio"),
        (lambda: EvalViews(32, 30), "resize"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
