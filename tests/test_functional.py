from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional import pairwise_cosine_similarity

from multikd import functional as M

MASK = (1 << 64) - 1


def test_cosine_distance_agrees_with_torchmetrics() -> None:
    s, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    expected = 1 - pairwise_cosine_similarity(s, y).diagonal()
    torch.testing.assert_close(M.cosine_distance(s, y), expected)
    torch.testing.assert_close(M.cosine_distance(s, -3 * s), torch.full((7,), 2.0).double())
    # Shapes of any rank, over the last dimension.
    assert M.cosine_distance(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).shape == (2, 3)


def test_cosine_distance_of_a_zero_vector_is_one_with_finite_gradient() -> None:
    s = torch.zeros(2, 4, requires_grad=True)
    distance = M.cosine_distance(s, torch.zeros(2, 4))
    assert distance.tolist() == [1.0, 1.0]
    distance.sum().backward()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_smooth_l1_agrees_with_numpy(beta: float) -> None:
    s, y = torch.randn(4, 3, 6) * 2, torch.randn(4, 3, 6)
    d = np.abs((s - y).numpy().astype(np.float64))
    expected = np.where(d < beta, d**2 / (2 * beta or 1.0), d - beta / 2).mean(-1)
    np.testing.assert_allclose(M.smooth_l1(s, y, beta), expected, rtol=1e-5)


def test_distances_pass_gradcheck() -> None:
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: M.cosine_distance(x, y), s)
    assert torch.autograd.gradcheck(lambda x: M.smooth_l1(x, y), s)


def test_per_image() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert M.per_image(x).tolist() == [1.0, 4.0]
    assert M.per_image(x[:, 0]).tolist() == [0.0, 3.0]


@pytest.mark.parametrize("shape, dim", [((400, 5), 0), ((20, 30, 5), (0, 1))])
def test_batch_moments_keep_the_digits_of_badly_conditioned_features(
    shape: tuple[int, ...], dim: int | tuple[int, ...]
) -> None:
    x = torch.randn(shape) * 0.5 + 1000
    exact = x.double().numpy().reshape(-1, 5)
    count, mean, m2 = M.batch_moments(x, dim)
    assert count.item() == len(exact)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-10)
    np.testing.assert_allclose(m2, exact.var(0) * len(exact), rtol=1e-5)
    # The naive form that it replaces is off by far more: this test can fail.
    flat = x.reshape(-1, 5)
    naive = (flat.square().sum(0) - flat.sum(0).square() / len(exact)).double()
    assert ((naive - m2).abs() / m2).max() > 1e-3


@pytest.mark.parametrize("weights", [(0.5, 0.5, 1.0), (0.9, 0.1, 0.3), (0.0, 1.0, 0.0)])
def test_token_distance_is_the_sum_of_the_two(weights: tuple[float, float, float]) -> None:
    cosine, smooth, beta = weights
    s, y = (torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gradient = torch.randn(3, 4, dtype=torch.float64)
    expected = cosine * M.cosine_distance(s, y) + smooth * M.smooth_l1(s, y, beta)
    distance = M.token_distance(s, y, *weights)
    torch.testing.assert_close(distance, expected)
    for one, other in zip(
        torch.autograd.grad(distance, (s, y), gradient),
        torch.autograd.grad(expected, (s, y), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    if beta:
        assert torch.autograd.gradcheck(lambda a, b: M.token_distance(a, b, *weights), (s, y))


@pytest.mark.parametrize("block", [1, 50])
def test_token_distance_in_blocks_of_images_is_the_same(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, y = (torch.randn(5, 4, 6, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        s[3] = torch.nan  # an image that is dropped
    gradient = torch.randn(5, 4)
    gradient[3] = gradient[1] = 0
    gradient[0, 2] = 0

    def values() -> list[torch.Tensor]:
        distance = M.token_distance(s, y, 0.5, 0.5, 1.0)
        return [distance, *torch.autograd.grad(distance, (s, y), gradient)]

    whole = values()
    monkeypatch.setattr(M, "_BLOCK", block)
    for one, other in zip(values(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert not whole[1][1].any()
    assert not whole[1][3].any()


def test_token_distance_of_half_precisions_is_computed_in_float32() -> None:
    s, y = torch.randn(3, 4, 64), torch.randn(3, 4, 64)
    half = s.bfloat16().requires_grad_()
    single = half.detach().float().requires_grad_()
    distance = M.token_distance(half, y, 0.5, 0.5, 1.0)
    expected = M.token_distance(single, y, 0.5, 0.5, 1.0)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=0, atol=0)
    distance.sum().backward()
    expected.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, single.grad.bfloat16(), rtol=0, atol=0)


def test_token_distance_of_zero_vectors_has_finite_gradients() -> None:
    s = torch.zeros(2, 4, requires_grad=True)
    y = torch.tensor([[0.0] * 4, [1.0] * 4])
    M.token_distance(s, y, 0.5, 0.5, 1.0).sum().backward()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_token_distance_that_is_masked_leaks_nothing(value: float) -> None:
    s, y = torch.randn(3, 4), torch.randn(3, 4)
    s[1, 2] = value
    y[2, 0] = value
    s.requires_grad_()
    y.requires_grad_()
    distance = M.token_distance(s, y, 0.5, 0.5, 1.0)
    assert torch.isfinite(distance).tolist() == [True, False, False]
    torch.where(torch.isfinite(distance), distance, 0.0).sum().backward()
    for gradient in (s.grad, y.grad):
        assert gradient[0].abs().min() > 0
        assert (gradient[1:] == 0).all()


def test_where_images() -> None:
    x = torch.ones(3, 2, 2)
    x[1, 0, 1] = torch.nan
    x[2, 1, 1] = -torch.inf
    x.requires_grad_()
    clean = M.where_images(torch.tensor([True, False, False]), x)
    assert torch.isfinite(clean).all()
    (clean * torch.nan).sum().backward()
    assert torch.isnan(x.grad[0]).all()
    assert (x.grad[1:] == 0).all()


def reference_splitmix(value: int) -> int:
    """SplitMix64's output function as in the paper, on Python integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_splitmix_gives_the_published_sequence() -> None:
    # First outputs of SplitMix64 from state 0, as in the reference implementation's test vectors.
    state, gamma = 0, 0x9E3779B97F4A7C15
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [M._mix_int((state + i * gamma) & MASK) for i in range(3)] == known


@pytest.mark.parametrize("seed, epoch", [(0, 0), (-5, 3), (2**63 + 11, 2**40)])
def test_hash_uniform_is_the_hash_of_its_keys(seed: int, epoch: int) -> None:
    positions = torch.tensor([0, 1, 2, 10**12, -1])
    for stream in (0, 7):
        draws = M.hash_uniform(seed, epoch, positions, stream)
        assert draws.dtype == torch.float32
        for position, draw in zip(positions.tolist(), draws.tolist(), strict=True):
            state = reference_splitmix(seed & MASK)
            for key in (epoch, position, stream):
                state = reference_splitmix(state ^ (key & MASK))
            assert draw == (state >> 40) / 2**24 == M.hash_unit(seed, epoch, position, stream)


def test_hash_uniform_takes_tensors_as_keys() -> None:
    positions = torch.arange(6)
    streams = torch.tensor([[0], [1], [5]])
    draws = M.hash_uniform(3, torch.tensor(2), positions, streams)
    expected = torch.stack([M.hash_uniform(3, 2, positions, s) for s in (0, 1, 5)])
    assert torch.equal(draws, expected)


def test_hash_uniform_is_uniform_and_its_keys_independent() -> None:
    positions = torch.arange(20_000)
    draws = [
        M.hash_uniform(seed, epoch, positions, stream)
        for seed, epoch, stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        counts = torch.histc(draw, bins=20, min=0, max=1)
        # χ² with 19 degrees of freedom exceeds 50 with probability 1e-4; the keys are fixed.
        assert ((counts - 1000) ** 2 / 1000).sum() < 50
    correlation = torch.corrcoef(torch.stack([*draws, draws[0].roll(1)]))
    assert (correlation - torch.eye(5)).abs().max() < 0.03


def test_hash_uniform_compiles_into_one_graph() -> None:
    positions = torch.arange(4)
    compiled = torch.compile(M.hash_uniform, backend="eager", fullgraph=True)
    assert torch.equal(compiled(0, 1, positions, 2), M.hash_uniform(0, 1, positions, 2))


def test_without_autocast() -> None:
    a = torch.randn(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with M.without_autocast(a.device):
            assert (a @ a).dtype == torch.float32
    with M.without_autocast(torch.device("meta")):
        assert F.relu(a).dtype == torch.float32
