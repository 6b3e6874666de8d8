"""Attention on a CPU: fused or in plain products, chosen call by call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multikd.backbones import attention, build_model
from multikd.students import StudentEncoder

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2}


def vit(name: str = "vit_tiny_patch16_224", **model_args: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, image_size=64, num_classes=0, model_args={**TINY, **model_args}).eval()


class Seen(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.fused += "scaled_dot_product" in str(func)
        self.products += "bmm" in str(func)
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Seen]:
    with Seen() as seen, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return model(images), seen


def test_bfloat16_takes_products_and_float32_the_fused_one() -> None:
    model, images = vit(), torch.randn(2, 3, 64, 64)
    for dtype, plain in ((torch.bfloat16, True), (None, False), (torch.bfloat16, True)):
        _, seen = run(model, images, dtype)
        assert (seen.fused, seen.products) == ((0, 4) if plain else (2, 0))
        assert all(block.attn.fused_attn for block in model.blocks)  # nothing stays behind
    _, seen = run(model.bfloat16(), images.bfloat16())
    assert (seen.fused, seen.products) == (0, 4)


@pytest.mark.parametrize("grad", [True, False])
def test_long_sequences_stay_fused(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._MOST_TOKENS, grad, 16)  # 16 patches and the class token
    with torch.set_grad_enabled(grad):
        _, seen = run(vit(), torch.randn(2, 3, 64, 64), torch.bfloat16)
        assert seen.fused == 2
    with torch.set_grad_enabled(not grad):
        assert run(vit(), torch.randn(2, 3, 64, 64), torch.bfloat16)[1].fused == 0


def test_both_ways_are_as_near_to_float64() -> None:
    model, images = vit(), torch.randn(4, 3, 64, 64)
    exact = copy.deepcopy(model).double()(images.double())
    plain, _ = run(model, images, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "plain_is_faster", lambda tokens: False)
        fused, seen = run(model, images, torch.bfloat16)
    assert seen.fused == 2
    off, other = (plain - exact).norm(), (fused - exact).norm()
    assert 0 < off < 1.3 * other


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
)
def test_gradients_of_families(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, image_size=None, num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    wide = model(images).square().mean()
    expected = torch.autograd.grad(wide, [p for p in model.parameters() if p.ndim > 1][-4:])
    with torch.autocast("cpu", torch.bfloat16), Seen() as seen:
        loss = model(images).float().square().mean()
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.ndim > 1][-4:])
    assert seen.fused == 0
    assert seen.products > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_recomputed_activations_choose_the_same_way() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        student = StudentEncoder(
            "vit_tiny_patch16_224",
            image_size=64,
            grad_checkpointing=checkpointing,
            model_args=TINY,
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = student(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        found.rungs[-1].patches.float().square().mean().backward()
        return [p.grad for p in student.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


def test_a_copy_and_a_pickle_choose_too() -> None:
    images = torch.randn(2, 3, 64, 64)
    model = vit()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert run(other, images, torch.bfloat16)[1].fused == 0


def test_an_error_inside_leaves_the_module_as_it_was() -> None:
    model = vit()
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        model.blocks[0].attn(torch.randn(1, 5, 63))
    assert model.blocks[0].attn.fused_attn
