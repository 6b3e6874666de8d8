import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject, PooledPixels
from sklearn.datasets import load_sample_image

from multikd.evaluation.corruptions import (
    CORRUPTIONS,
    corrupt,
    mean_corruption_error,
)
from multikd.evaluation.probe_head import evenly, fit_probed, images_of
from multikd.evaluation.resolution import ResolutionSweep
from multikd.evaluation.robustness import Adversarial, Corruptions
from multikd.types import TokenFeatures

COLOURS = torch.tensor([[122, 110, 110], [110, 122, 110], [110, 110, 122]])


def coloured(n, seed, size=32):
    """Noisy colours that a probe tells apart, and a small change does not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(-60, 61, (n, 3, size, size), generator=generator)
    images = (COLOURS[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return MemorySplit(
        images,
        labels,
        f"made/{seed}",
        classes=["red", "green", "blue"],
        metadata={"site": ["a", "b"] * (n // 2)},
    )


def subject(train=30, test=12):
    return MemorySubject(
        {"train": coloured(train, 0), "test": coloured(test, 1)}, PooledPixels((32, 32), 8)
    )


@pytest.fixture(scope="module")
def photograph():
    pytest.importorskip("imagecorruptions")
    return np.ascontiguousarray(load_sample_image("china.jpg")[100:196, 200:328])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_are_repeatable(photograph, name):
    state = np.random.get_state()[1].copy()
    means = []
    for severity in (1, 3, 5):
        changed = corrupt(photograph, name, severity, seed=4)
        assert changed.dtype == np.uint8
        assert changed.shape == photograph.shape
        means.append(np.abs(changed.astype(float) - photograph).mean())
    assert 0.5 < means[0] < means[2]
    np.testing.assert_array_equal(changed, corrupt(photograph, name, 5, seed=4))
    assert (np.random.get_state()[1] == state).all()
    if "noise" in name or name in ("glass_blur", "snow", "frost", "fog", "elastic_transform"):
        assert (changed != corrupt(photograph, name, 5, seed=5)).any()


def test_noise_and_contrast_equal_their_published_formulas(photograph):
    x = photograph / 255.0
    contrast = np.clip((x - x.mean((0, 1))) * 0.05 + x.mean((0, 1)), 0, 1) * 255
    got = corrupt(photograph, "contrast", 5)
    assert np.abs(got - contrast).max() <= 1
    flat = np.full((96, 96, 3), 128, np.uint8)
    noise = corrupt(flat, "gaussian_noise", 1, seed=1).astype(float) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.03)


def test_mean_corruption_error():
    own = {"fog": [0.1, 0.3], "snow": [0.5, 0.5]}
    reference = {"fog": [0.4, 0.4], "snow": [0.5, 0.75]}
    assert mean_corruption_error(own, reference) == pytest.approx((0.4 / 0.8 + 1 / 1.25) / 2)
    with pytest.raises(ValueError, match="same corruptions"):
        mean_corruption_error(own, {"fog": [0.1]})


def test_the_corruption_task():
    pytest.importorskip("imagecorruptions")
    made = subject()
    task = Corruptions(
        "made",
        limit=6,
        batch_size=4,
        corruptions=("contrast", "frost"),
        severities=(1, 5),
        groups=("site",),
        reference={"contrast": [0.5, 1.0], "frost": [0.25, 0.5]},
    )
    task.check(made.splits, {"pixels": made.spec})
    result = task.score(made)
    assert result.metrics["clean top1"] == 1
    # The same, image by image.
    probed = fit_probed(made, 3, 1.0, 0)
    places = evenly(12, 6)
    expected = np.zeros((6, 2, 2))
    for i, place in enumerate(places):
        pixels = made.splits["test"].images[place].permute(1, 2, 0).numpy()
        for j, name in enumerate(task.corruptions):
            for k, severity in enumerate(task.severities):
                changed = torch.from_numpy(corrupt(pixels, name, severity, place))
                logits = probed(changed.permute(2, 0, 1)[None].float() / 255)
                expected[i, j, k] = int(logits.argmax()) == place % 3
    np.testing.assert_allclose(result.per_sample, expected.mean((1, 2)))
    assert result.value == pytest.approx(expected.mean())
    assert 0.3 < result.value < 0.95
    np.testing.assert_allclose(result.details["errors"]["contrast"], 1 - expected[:, 0].mean(0))
    wrong = 1 - expected.mean(0).sum(1) / 2  # of contrast and of frost, over both severities
    mce = (2 * wrong[0] / 1.5 + 2 * wrong[1] / 0.75) / 2
    assert result.metrics["mCE"] == pytest.approx(mce)
    assert result.details["groups"]["site"]["groups"]["a"]["count"] == 3


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_attacks_stay_in_their_ball_and_work(attack):
    pytest.importorskip("art")
    made = subject()
    small = Adversarial("made", attack=attack, epsilon=0.5, batch_size=8).score(made)
    large = Adversarial("made", attack=attack, epsilon=40, batch_size=8).score(made)
    assert small.metrics["clean top1"] == large.metrics["clean top1"] == 1
    assert small.value == 1
    assert large.value < 0.2
    assert 39 < large.details["largest change"] <= 40.001
    again = Adversarial("made", attack=attack, epsilon=40, batch_size=8).score(made)
    assert again.per_sample.tolist() == large.per_sample.tolist()


def test_one_step_equals_the_sign_of_the_gradient():
    """FGSM, computed by hand from the encoder's own gradient."""
    pytest.importorskip("art")
    made = subject()
    probed = fit_probed(made, 3, 1.0, 0)
    images, labels = made.splits["test"].images.float() / 255, made.splits["test"].labels
    task = Adversarial("made", attack="fgsm", epsilon=3)
    got = task.attacked(probed, images, labels, 3)
    images.requires_grad_()
    torch.nn.functional.cross_entropy(probed(images), labels).backward()
    expected = (images + 3 / 255 * images.grad.sign()).clamp(0, 1).detach()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


class Switching:
    """Features of small images are of another kind than those of large ones."""

    def __init__(self):
        self.inner = PooledPixels((32, 32), 8)
        self.spec = self.inner.spec

    def __call__(self, images):
        out = self.inner(images)
        summary = out.summary - 0.45
        if images.shape[-1] < 24:
            summary = -summary.roll(1, dims=1)
        return TokenFeatures(summary, out.patches, out.grid)


def test_resolution_sweep_sees_a_mode_switch():
    task = ResolutionSweep("made", sizes=(32, 16, 24), k=3)
    assert task.sizes == (16, 24, 32)
    steady, switching = (
        task.score(MemorySubject(subject().splits, encoder))
        for encoder in (PooledPixels((32, 32), 8), Switching())
    )
    assert steady.value > 0.9
    assert steady.metrics["mode switch"] < 0.01
    assert switching.metrics["mode switch"] > 0.5
    curve = switching.details["curve"]
    assert curve["top1"][0] > 0.9  # small images alone are told apart
    assert curve["top1 with the reference's neighbours"][0] < 0.7
    assert curve["top1 with the reference's neighbours"][1:] == curve["top1"][1:]
    assert curve["cosine with the reference"][2] == pytest.approx(1)
    assert [r.size for r in task.requests(steady and subject().spec)][:2] == [(16, 16), (24, 24)]


def test_images_come_in_order_without_fillers():
    made = subject()
    found = list(images_of(made, "test", [1, 3, 8, 11], (32, 32), 3))
    assert [places for places, _ in found] == [[1, 3, 8], [11]]
    assert torch.equal(torch.cat([i for _, i in found]), made.splits["test"].images[[1, 3, 8, 11]])


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="did you mean 'snow'"):
        Corruptions("made", corruptions=("snw",))
    with pytest.raises(ValueError, match="severities from 1 to 5"):
        Corruptions("made", severities=(0, 1))
    with pytest.raises(ValueError, match="same severities"):
        Corruptions("made", corruptions=("fog",), reference={"fog": [0.5]})
    with pytest.raises(ValueError, match="limit and batch_size"):
        Adversarial("made", limit=0)
    with pytest.raises(ValueError, match="fgsm or pgd"):
        Adversarial("made", attack="pgd", epsilon=0)
    with pytest.raises(ValueError, match="two sizes or more"):
        ResolutionSweep("made", sizes=(32, 32))
    with pytest.raises(ValueError, match="must be one of"):
        ResolutionSweep("made", sizes=(32, 16), reference=8)
    small = {"tiny": PooledPixels((16, 16), 8).spec}
    with pytest.raises(ValueError, match="at least 32 px, and the encoder 'tiny' sees 16"):
        Corruptions("made").check(subject().splits, small)
    with pytest.raises(ValueError, match="at least 32 px, received 16×16"):
        corrupt(np.zeros((16, 16, 3), np.uint8), "fog", 1)
