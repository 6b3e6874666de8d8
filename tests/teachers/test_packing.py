"""Packed linear layers give what plain ones give, wherever the encoder goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from multikd.onednn import available
from multikd.teachers import Teacher, TimmEncoder
from multikd.teachers.packing import PackedLinear, pack_linears

ARGUMENTS = {"vit_test": ("test_vit", 32)}


def encoder(name: str = "vit_tiny_patch16_224", size: int = 64) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(name, pretrained=False, image_size=size).eval().requires_grad_(False)


def packed_layers(module: nn.Module) -> list[PackedLinear]:
    return [m for m in module.modules() if isinstance(m, PackedLinear)]


def distance(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float((a.float() - b.float()).norm() / a.float().norm())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_test", "convnext_atto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_teacher_answers_as_a_plain_one(name: str, dtype: str) -> None:
    model = ARGUMENTS.get(name, (name, 64))[0] or name
    plain = Teacher(encoder(model), dtype=dtype, pack=False)  # type: ignore[arg-type]
    packed = Teacher(encoder(model), dtype=dtype)  # type: ignore[arg-type]
    assert not packed_layers(plain.encoder)
    assert packed_layers(packed.encoder)
    images = torch.rand(3, 3, 64, 64)
    tolerance = 2e-6 if dtype == "float32" else 2e-2
    a, b = plain(images), packed(images)
    assert distance(a.summary, b.summary) < tolerance
    assert distance(a.patches, b.patches) < tolerance
    # The exact answer is no further away than from the plain one.
    exact = Teacher(encoder(model), dtype="float32", pack=False)(images).patches
    assert distance(exact, b.patches) < 1.5 * distance(exact, a.patches) + 1e-6
    assert packed.fingerprint() == plain.fingerprint()
    assert list(packed.encoder.state_dict()) == list(plain.encoder.state_dict())


def test_gelu_goes_into_the_product_and_stays_where_there_is_none() -> None:
    module = encoder()
    count = pack_linears(module)
    layers = packed_layers(module)
    assert count == len(layers) == 12 * 4 + 1  # four a block, and the classifier
    assert sum(layer.gelu == "none" for layer in layers) == 12
    if not available(torch.float32):
        pytest.skip("this processor has no oneDNN products")
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        module(torch.rand(1, 3, 64, 64))
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == 49
    assert not [name for name in counts if "gelu" in name]


def test_torch_counts_the_same_work() -> None:
    images = torch.rand(2, 3, 64, 64)
    counts = []
    for pack in (False, True):
        teacher = Teacher(encoder(), dtype="float32", pack=pack)
        with FlopCounterMode(display=False) as counter:
            teacher(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_weights_that_change_are_seen_and_autograd_is_the_plain_layer(gelu: str | None) -> None:
    linear = nn.Linear(128, 256).requires_grad_(False)
    assert pack_linears(nn.Sequential(linear)) == 1
    layer: PackedLinear = linear  # type: ignore[assignment]
    layer.gelu = gelu
    x = torch.randn(2, 5, 128)

    def expected(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, layer.weight, layer.bias)
        return y if gelu is None else nn.functional.gelu(y, approximate=gelu)

    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected(x))
            layer.weight.mul_(2.0)
    with torch.no_grad():
        layer.double()
        torch.testing.assert_close(layer(x.double()), expected(x.double()))
        layer.float()
        torch.testing.assert_close(layer(x), expected(x))
        again = copy.deepcopy(layer)
        torch.testing.assert_close(again(x), expected(x))
        assert layer(x[:0]).shape == (0, 5, 256)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None


def test_what_someone_watches_or_made_their_own_is_left() -> None:
    class Mine(nn.Linear):
        pass

    watched = nn.Linear(128, 256)
    watched.register_forward_hook(lambda *_: None)
    trained = nn.Linear(128, 256)
    layers = [Mine(128, 256), watched, nn.Linear(4, 4)]
    module = nn.Sequential(*layers).requires_grad_(False)
    module.append(trained)
    assert pack_linears(module) == 0
    assert [type(layer) for layer in module] == [Mine, nn.Linear, nn.Linear, nn.Linear]
