from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multikd.losses.feature import FeatureLoss
from multikd.types import TokenFeatures


def pair(dtype: torch.dtype = torch.float32) -> tuple[TokenFeatures, TokenFeatures]:
    def draw() -> TokenFeatures:
        return TokenFeatures(
            torch.randn(3, 5, dtype=dtype), torch.randn(3, 4, 7, dtype=dtype), (2, 2)
        )

    return draw(), draw()


def reference(s: np.ndarray, y: np.ndarray, cosine: float, smooth: float, beta: float) -> float:
    """One token, by the formula, in float64."""
    s, y = s.astype(np.float64), y.astype(np.float64)
    cos = s @ y / (np.linalg.norm(s) * np.linalg.norm(y))
    d = np.abs(s - y)
    huber = np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()
    return float(cosine * (1 - cos) + smooth * huber)


@pytest.mark.parametrize("weights", [(0.5, 0.5, 1.0, 0.5, 0.5), (0.9, 0.1, 0.3, 2.0, 1.0)])
def test_agrees_with_a_loop_over_images_and_tokens(weights: tuple[float, ...]) -> None:
    cosine, smooth, beta, w_summary, w_patches = weights
    prediction, target = pair()
    loss = FeatureLoss(*weights)(prediction, target)
    assert loss.shape == (3,)
    assert prediction.patches is not None
    for i in range(3):
        parts = []
        for token in ("summary", "patches"):
            s, y = (getattr(f, token)[i].numpy() for f in (prediction, target))
            vectors = zip(np.atleast_2d(s), np.atleast_2d(y), strict=True)
            parts.append(np.mean([reference(a, b, cosine, smooth, beta) for a, b in vectors]))
        expected = (w_summary * parts[0] + w_patches * parts[1]) / (w_summary + w_patches)
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_a_missing_token_type_gives_its_weight_to_the_other() -> None:
    prediction, target = pair()
    loss = FeatureLoss(summary=0.2, patches=0.8)
    summary = loss(prediction, TokenFeatures(summary=target.summary))
    patches = loss(
        TokenFeatures(patches=prediction.patches, grid=(2, 2)),
        TokenFeatures(patches=target.patches, grid=(2, 2)),
    )
    torch.testing.assert_close(loss(prediction, target), 0.2 * summary + 0.8 * patches)
    only = FeatureLoss(summary=1.0, patches=0.0)
    torch.testing.assert_close(only(prediction, target), summary)


def test_gradcheck() -> None:
    prediction, target = pair(torch.float64)
    assert prediction.summary is not None
    assert prediction.patches is not None

    def function(summary: Tensor, patches: Tensor) -> Tensor:
        return FeatureLoss()(TokenFeatures(summary, patches, (2, 2)), target)

    inputs = (prediction.summary.requires_grad_(), prediction.patches.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("where", ["target", "prediction"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_image_is_seen_and_leaks_no_gradient(where: str, value: float) -> None:
    prediction, target = pair()
    clean = FeatureLoss()(prediction, target)
    broken = target if where == "target" else prediction
    assert broken.patches is not None
    broken.patches[1, 2, 3] = value
    for tensor in (prediction.summary, prediction.patches):
        assert tensor is not None
        tensor.requires_grad_()
    loss = FeatureLoss()(prediction, target)
    assert not torch.isfinite(loss[1])
    torch.testing.assert_close(loss[[0, 2]], clean[[0, 2]])
    # Dropped, as ``weigh`` does it.
    torch.where(torch.tensor([True, False, True]), loss, 0.0).sum().backward()
    for tensor in (prediction.summary, prediction.patches):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad[[0, 2]].abs().sum() > 0
    assert (prediction.patches.grad[1] == 0).all()


def test_float32_under_autocast_and_from_half_precisions() -> None:
    prediction, target = (f.to(dtype=torch.bfloat16) for f in pair())
    expected = FeatureLoss()(prediction.to(dtype=torch.float32), target.to(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = FeatureLoss()(prediction, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


def test_mistakes_are_named() -> None:
    prediction, target = pair()
    wrong = TokenFeatures(target.summary, torch.randn(3, 9, 7), (3, 3))
    with pytest.raises(ValueError, match=r"patches: \(3, 4, 7\) and \(3, 9, 7\); resample"):
        FeatureLoss()(prediction, wrong)
    with pytest.raises(ValueError, match="share no token type"):
        FeatureLoss(summary=0.0, patches=1.0)(prediction, TokenFeatures(summary=target.summary))
    for options in ({"cosine": -1.0}, {"summary": 0.0, "patches": 0.0}, {"beta": -1.0}):
        with pytest.raises(ValueError, match="received"):
            FeatureLoss(**options)


def test_compiles_into_one_graph() -> None:
    prediction, target = pair()

    def function(summary: Tensor, patches: Tensor) -> Tensor:
        return FeatureLoss()(TokenFeatures(summary, patches, (2, 2)), target)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for which in (function, compiled):
        summary, patches = (
            t.clone().requires_grad_() for t in (prediction.summary, prediction.patches)
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = which(summary, patches)
        loss.sum().backward()
        results.append((loss, summary.grad, patches.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_cosine_of_a_whole_map_is_theia_s() -> None:
    """Against torch's own functions on the flattened maps, with gradients in float64."""
    generator = torch.Generator().manual_seed(5)
    s, y = (torch.randn(3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    s = s.requires_grad_()
    loss = FeatureLoss(0.9, 0.1, summary=0.0, patches=1.0, whole_map=True)
    found = loss(TokenFeatures(patches=s, grid=(2, 3)), TokenFeatures(patches=y, grid=(2, 3)))
    assert found.shape == (3,)
    (gradient,) = torch.autograd.grad(found.sum(), s)
    wanted = torch.stack(
        [
            0.9 * (1 - torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
            + 0.1 * torch.nn.functional.smooth_l1_loss(a, b)
            for a, b in zip(s, y, strict=True)
        ]
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), s)[0])
    single = FeatureLoss(0.9, 0.1, summary=0.0, patches=1.0)
    each = single(TokenFeatures(patches=s, grid=(2, 3)), TokenFeatures(patches=y, grid=(2, 3)))
    assert (each - found).abs().max() > 1e-3
