from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.modules.undo import StepUndo
from multikd.normalizers import (
    BatchStandardizer,
    BatchStandardizers,
    EMAStandardizer,
    EMAStandardizers,
    FeatureNormalizer,
    FixedStandardizer,
    FixedStandardizers,
    GlobalStandardizers,
    NoNormalizers,
    NormalizerFactory,
    PHISNormalizers,
    WhiteningNormalizers,
)
from multikd.types import TOKEN_TYPES, TokenFeatures, Widths

WIDTHS = Widths(4, 6)
FACTORIES: list[NormalizerFactory] = [
    EMAStandardizers(total_steps=5),
    BatchStandardizers(),
    FixedStandardizers(images=40),
    GlobalStandardizers(images=40),
    PHISNormalizers(images=40),
    WhiteningNormalizers(images=40),
    NoNormalizers(),
]
LEARNING = FACTORIES[:-1]
every_kind = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)


def batches(steps: int = 5, images: int = 16, mean: float = 100.0) -> list[TokenFeatures]:
    """Badly conditioned: a mean of 100, a deviation of 0.5."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5 + mean

    return [TokenFeatures(draw(images, 4), draw(images, 9, 6), (3, 3)) for _ in range(steps)]


def rows(features: TokenFeatures, token: str) -> np.ndarray:
    tensor = getattr(features, token)
    return tensor.double().numpy().reshape(-1, tensor.shape[-1])


def run(factory: NormalizerFactory, data: list[TokenFeatures]) -> list[TokenFeatures]:
    normalizer = factory.build(WIDTHS)
    outputs = []
    for features in data:
        outputs.append(normalizer(features))
        normalizer.update(features)
    outputs.append(normalizer.eval()(data[0]))
    return outputs


def test_ema_follows_the_published_schedule() -> None:
    normalizer = EMAStandardizers(momentum_end=0.01).build(WIDTHS)
    assert isinstance(normalizer, EMAStandardizer)
    normalizer.set_total_steps(4)
    mean = {"summary": np.zeros(4), "patches": np.zeros(6)}
    std = {"summary": np.ones(4), "patches": np.ones(6)}
    for step, features in enumerate(batches(6, mean=3.0)):
        k = min(step / 4, 1.0)  # after the schedule, its end
        m = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k))
        assert normalizer.momentum().item() == pytest.approx(m, abs=1e-6)
        result = normalizer(features)
        for token in TOKEN_TYPES:
            y = rows(features, token)
            expected = (y - mean[token]) / (std[token] + 1e-6)
            np.testing.assert_allclose(rows(result, token), expected, atol=2e-5)
            mean[token] = (1 - m) * mean[token] + m * y.mean(0)
            std[token] = (1 - m) * std[token] + m * (y.std(0, ddof=1) + 1e-6)
        normalizer.update(features)
        for token in TOKEN_TYPES:
            np.testing.assert_allclose(normalizer.get_buffer(f"{token}_mean"), mean[token], 1e-5)
            np.testing.assert_allclose(normalizer.get_buffer(f"{token}_std"), std[token], 1e-5)


def test_ema_needs_to_know_its_length_and_the_factory_wins() -> None:
    normalizer = EMAStandardizers().build(WIDTHS)
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or max_steps"):
        normalizer.update(batches(1)[0])
    normalizer = EMAStandardizers(total_steps=7).build(WIDTHS)
    normalizer.set_total_steps(100)
    assert isinstance(normalizer, EMAStandardizer)
    assert normalizer.total_steps == 7


def test_batch_standardizer_in_training_and_evaluation() -> None:
    normalizer = BatchStandardizers(momentum=0.2).build(WIDTHS)
    mean, std = np.zeros(4), np.ones(4)
    for features in batches(3):
        y = rows(features, "summary")
        expected = (y - y.mean(0)) / y.std(0, ddof=1)
        np.testing.assert_allclose(normalizer(features).summary, expected, atol=5e-5)
        normalizer.update(features)
        mean, std = 0.8 * mean + 0.2 * y.mean(0), 0.8 * std + 0.2 * y.std(0, ddof=1)
    normalizer.eval()
    expected = (y - mean) / std
    np.testing.assert_allclose(normalizer(features).summary, expected, rtol=1e-5)


def test_batch_standardizer_has_a_floor() -> None:
    normalizer = BatchStandardizers().build(Widths(2, None))
    constant = TokenFeatures(torch.tensor([[3.0, 0.0], [3.0, 1e-4]]))
    result = normalizer(constant).summary
    np.testing.assert_allclose(result, [[0, -0.05], [0, 0.05]], atol=1e-6)


def test_fixed_statistics_are_exact_then_frozen() -> None:
    data = batches(6)
    normalizer = FixedStandardizers(images=40).build(WIDTHS)
    torch.testing.assert_close(normalizer(data[0]).patches, data[0].patches, rtol=0, atol=0)
    for features in data:
        normalizer.update(features)
    # 16 + 16 < 40 ≤ 16 + 16 + 16: three batches are measured.
    for token in TOKEN_TYPES:
        y = np.concatenate([rows(f, token) for f in data[:3]])
        np.testing.assert_allclose(normalizer.get_buffer(f"{token}_mean"), y.mean(0), rtol=1e-7)
        std = normalizer.get_buffer(f"{token}_std")
        np.testing.assert_allclose(std, y.std(0, ddof=1), rtol=1e-6)
    assert normalizer.get_buffer("images_seen").item() == 48
    expected = (rows(data[5], "summary") - rows_mean(data[:3])) / rows_std(data[:3])
    np.testing.assert_allclose(normalizer(data[5]).summary, expected, atol=5e-5)


def rows_mean(data: list[TokenFeatures]) -> np.ndarray:
    return np.concatenate([rows(f, "summary") for f in data]).mean(0)


def rows_std(data: list[TokenFeatures]) -> np.ndarray:
    return np.concatenate([rows(f, "summary") for f in data]).std(0, ddof=1)


def test_fixed_statistics_resume_and_count_images_of_patch_only_teachers() -> None:
    data = [TokenFeatures(patches=f.patches, grid=(3, 3)) for f in batches(4)]
    whole, first = (FixedStandardizers(images=40).build(Widths(None, 6)) for _ in range(2))
    for features in data[:2]:
        first.update(features)
    resumed = FixedStandardizers(images=40).build(Widths(None, 6))
    resumed._frozen = True  # whatever it was before loading
    resumed.load_state_dict(first.state_dict())
    for features in data[2:]:
        resumed.update(features)
    for features in data:
        whole.update(features)
    assert whole.get_buffer("images_seen").item() == 48
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, resumed.get_buffer(name)), name


def test_many_batches_lose_no_digits() -> None:
    data = batches(300, images=4, mean=1000.0)
    normalizer = FixedStandardizers(images=10**6).build(WIDTHS)
    for features in data:
        normalizer.update(features)
    y = np.concatenate([rows(f, "summary") for f in data])
    np.testing.assert_allclose(normalizer.get_buffer("summary_mean"), y.mean(0), rtol=1e-7)
    std = normalizer.get_buffer("summary_std")
    np.testing.assert_allclose(std, y.std(0, ddof=1), rtol=1e-5)


@every_kind
def test_inverse_and_affine_undo_forward(factory: NormalizerFactory) -> None:
    normalizer = factory.build(WIDTHS)
    for features in batches(3, mean=2.0):
        normalizer.update(features)
    normalizer.eval()
    raw = batches(1, mean=2.0)[0]
    result = normalizer(raw)
    back = normalizer.inverse(result)
    for token in TOKEN_TYPES:
        torch.testing.assert_close(getattr(back, token), getattr(raw, token))
        scale, shift = normalizer.affine(token)
        width = getattr(WIDTHS, token)
        assert shift.shape == (width,)
        assert scale.shape in ((width,), (width, width))
        s = getattr(result, token)
        mapped = (s * scale if scale.ndim == 1 else s @ scale) + shift
        torch.testing.assert_close(mapped, getattr(raw, token))
    assert back.grid == result.grid == (3, 3)


@every_kind
def test_eval_mode_learns_nothing(factory: NormalizerFactory) -> None:
    normalizer = factory.build(WIDTHS).eval()
    before = copy.deepcopy(normalizer.state_dict())
    normalizer.update(batches(1)[0])
    for name, value in normalizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_kind
def test_state_survives_a_checkpoint_and_bfloat16(factory: NormalizerFactory) -> None:
    data = batches(4)
    normalizer = factory.build(WIDTHS)
    for features in data[:2]:
        normalizer.update(features)
    reloaded = factory.build(WIDTHS)
    reloaded.load_state_dict(normalizer.state_dict())
    cast = torch.nn.Sequential(copy.deepcopy(normalizer)).to(torch.bfloat16).half()[0]
    for other in (reloaded, cast):
        assert isinstance(other, FeatureNormalizer)
        for features in data[2:]:
            other.update(features)
    for features in data[2:]:
        normalizer.update(features)
    for name, buffer in normalizer.named_buffers():
        assert cast.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(cast.get_buffer(name), buffer), name
        assert torch.equal(reloaded.get_buffer(name), buffer), name


@every_kind
def test_buffers_are_exact_under_another_default_dtype(factory: NormalizerFactory) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does
    try:
        normalizer = factory.build(WIDTHS)
        features = batches(1)[0].to(dtype=torch.bfloat16)
        outputs = normalizer(features)
        normalizer.update(features)
    finally:
        torch.set_default_dtype(torch.float32)
    assert outputs.summary.dtype == outputs.patches.dtype == torch.float32
    kinds = {buffer.dtype for buffer in normalizer.buffers()}
    assert kinds <= {torch.float32, torch.float64, torch.int64}
    assert all(b.dtype != torch.float64 for n, b in normalizer.named_buffers() if "_mean" in n)


@every_kind
def test_autocast_changes_nothing(factory: NormalizerFactory) -> None:
    data = batches(3)
    plain = run(factory, data)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(factory, data)
    for one, other in zip(plain, mixed, strict=True):
        assert torch.equal(one.summary, other.summary)
        assert torch.equal(one.patches, other.patches)


def _rank_run(factory: NormalizerFactory, data: list[TokenFeatures]) -> list[TokenFeatures]:
    half = len(data[0].summary) // 2
    own = slice(D.rank() * half, (D.rank() + 1) * half)
    return run(factory, [f.map(lambda t: t[own]) for f in data])


def test_two_ranks_equal_one_process() -> None:
    data = batches()
    for feature in data:  # unequal ranks: means 100 and 101
        feature.summary[8:] += 1.0
        feature.patches[8:] += 1.0
    for factory in FACTORIES:
        whole = run(factory, data)
        parts = run_ranks(_rank_run, 2, factory, data)
        for step, expected in enumerate(whole):
            for token in TOKEN_TYPES:
                joined = torch.cat([getattr(part[step], token) for part in parts])
                torch.testing.assert_close(
                    joined, getattr(expected, token), rtol=1e-5, atol=1e-5, msg=lambda m: m
                )


def test_a_broken_image_leaves_the_batch_standardiser_s_other_targets_alone() -> None:
    normalizer = BatchStandardizers().build(Widths(3, 3))
    good = TokenFeatures(5 + 2 * torch.randn(8, 3), 1 + torch.randn(8, 4, 3), (2, 2))
    normalizer.update(good)
    broken = good.map(torch.clone)
    broken.summary[2, 0], broken.patches[2, 1, 2] = torch.nan, torch.inf
    made, clean = normalizer(broken), normalizer(good)
    assert torch.isnan(made.summary[2, 0])
    others = torch.arange(8) != 2
    for token, dimension in (("summary", 0), ("patches", 2)):
        found, plain = getattr(made, token)[others], getattr(clean, token)[others]
        assert torch.isfinite(found).all()
        whole = torch.arange(3) != dimension
        assert torch.equal(found[..., whole], plain[..., whole])
        # The dimension itself is standardised as in evaluation.
        running = getattr(normalizer.eval()(good), token)[others]
        normalizer.train()
        assert torch.equal(found[..., dimension], running[..., dimension])


def test_a_nan_does_not_stay_in_the_statistics() -> None:
    for factory in LEARNING:
        normalizer = factory.build(WIDTHS)
        good = batches(2)
        normalizer.update(good[0])
        broken = good[1].map(lambda t: t.clone())
        broken.summary[0, 0] = torch.nan
        normalizer.update(broken)
        assert all(torch.isfinite(b).all() for b in normalizer.buffers()), type(factory)
        # It is seen in this batch's targets all the same.
        assert torch.isnan(normalizer(broken).summary).any()


def test_one_observation_leaves_the_deviation_alone() -> None:
    for factory in LEARNING:
        normalizer = factory.build(Widths(3, None))
        normalizer.update(TokenFeatures(torch.randn(1, 3)))
        torch.testing.assert_close(normalizer.get_buffer("summary_std"), torch.ones(3))


def test_token_types_that_are_missing_or_wrong() -> None:
    normalizer = EMAStandardizers(total_steps=3).build(Widths(4, None))
    assert list(dict(normalizer.named_buffers())) == ["summary_mean", "summary_std", "updates"]
    result = normalizer(TokenFeatures(summary=torch.randn(2, 4)))
    assert result.patches is None
    with pytest.raises(ValueError, match="no patches"):
        normalizer.affine("patches")
    with pytest.raises(ValueError, match=r"summary width of 4, received \(2, 5\)"):
        normalizer(TokenFeatures(summary=torch.randn(2, 5)))
    with pytest.raises(ValueError, match="patches width of None"):
        normalizer.update(TokenFeatures(patches=torch.randn(2, 4, 5), grid=(2, 2)))


def test_factories_check_their_settings() -> None:
    for wrong in (
        lambda: EMAStandardizers(momentum_end=-0.1),
        lambda: EMAStandardizers(total_steps=0),
        lambda: BatchStandardizers(momentum=0.0),
        lambda: FixedStandardizers(images=1),
        lambda: GlobalStandardizers(images=1),
        lambda: PHISNormalizers(images=1),
        lambda: PHISNormalizers(every=0),
        lambda: WhiteningNormalizers(images=1),
        lambda: WhiteningNormalizers(floor=0.0),
    ):
        with pytest.raises(ValueError, match="received"):
            wrong()
    assert isinstance(BatchStandardizers().build(WIDTHS), BatchStandardizer)
    assert isinstance(FixedStandardizers().build(WIDTHS), FixedStandardizer)


def test_forward_compiles_into_one_graph() -> None:
    normalizer = EMAStandardizers(total_steps=3).build(Widths(4, None))
    normalizer.update(TokenFeatures(torch.randn(5, 4)))

    def forward(x: Tensor) -> Tensor:
        return normalizer(TokenFeatures(x)).summary

    x = torch.randn(5, 4)
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), forward(x))


@pytest.mark.parametrize("factory", [FixedStandardizers(images=8), PHISNormalizers(images=8)])
def test_an_undone_step_goes_on_measuring(factory: NormalizerFactory) -> None:
    data = batches(4, images=4, mean=1.0)
    whole, undone = factory.build(WIDTHS), factory.build(WIDTHS)
    undo = StepUndo()
    for normalizer in (whole, undone):
        normalizer.train().update(data[0])
    undo.remember(undone)
    # It freezes within the step, which is then taken back.
    undone.update(data[2])
    undone.update(data[3])
    undo.undo()
    for normalizer in (whole, undone):
        normalizer.update(data[1])
        normalizer.update(data[2])
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), undone.buffers(), strict=True))


@pytest.mark.parametrize(("own", "updates"), [(1000, 500), (None, 250)])
def test_a_length_that_was_set_is_in_updates_whatever_the_ranks(
    own: int | None, updates: int
) -> None:
    normalizer = EMAStandardizers(total_steps=own).build(WIDTHS)
    normalizer.get_buffer("updates").fill_(500)
    normalizer.rescale_updates(0.5)
    assert int(normalizer.get_buffer("updates")) == updates
