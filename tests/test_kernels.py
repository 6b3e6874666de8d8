"""Linear layers and attention on a CPU: torch's operators or quicker ones, chosen call by call."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multikd import onednn
from multikd.backbones import build_model, kernels
from multikd.students import StudentEncoder

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2}


def vit(name: str = "vit_tiny_patch16_224", **model_args: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, image_size=64, num_classes=0, model_args={**TINY, **model_args}).eval()


class Seen(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.products = self.onednn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.fused += "scaled_dot_product" in str(func)
        self.products += "bmm" in str(func)
        self.onednn += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Seen]:
    with Seen() as seen, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return model(images), seen


def test_bfloat16_takes_products_and_float32_the_fused_one() -> None:
    model, images = vit(), torch.randn(2, 3, 64, 64)
    for dtype, plain in ((torch.bfloat16, True), (None, False), (torch.bfloat16, True)):
        _, seen = run(model, images, dtype)
        assert (seen.fused, seen.products) == ((0, 4) if plain else (2, 0))
        assert not torch.overrides._get_current_function_mode_stack()  # nothing stays behind
    _, seen = run(model.bfloat16(), images.bfloat16())
    assert (seen.fused, seen.products) == (0, 4)


@pytest.mark.parametrize("grad", [True, False])
def test_long_sequences_stay_fused(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels._MOST_TOKENS, grad, 16)  # 16 patches and the class token
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
        patch.setattr(kernels, "plain_is_faster", lambda *_, **__: False)
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
            model_args={**TINY, "embed_dim": 128},
        )
        with torch.autocast("cpu", torch.bfloat16):  # over 1,024 rows
            found = student(torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
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
    assert not torch.overrides._get_current_function_mode_stack()


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 3
) -> list[Tensor]:
    result = function(*inputs)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((result.double() * weights).sum(), inputs))


needs_onednn = pytest.mark.skipif(
    not (onednn.available(torch.float32) and onednn.available(torch.bfloat16)),
    reason="oneDNN has no such products here",
)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_as_near_to_float64_as_torch(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(8, 160, 136), (144, 136), *([(144,)] if bias else [])]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        ours = [kernels.linear(*inputs).detach(), *gradients_of(kernels.linear, inputs)]
        theirs = [F.linear(*inputs).detach(), *gradients_of(F.linear, inputs)]
    wanted = [F.linear(*exact).detach(), *gradients_of(F.linear, exact)]
    for mine, other, true in zip(ours, theirs, wanted, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        limit = max(1.3 * float((other - true).norm() / true.norm()), 1e-6)
        assert float((mine - true).norm() / true.norm()) < limit


@pytest.mark.parametrize("scale", [None, 0.37])
def test_attention_is_as_near_to_float64_as_products(scale: float | None) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, d).bfloat16() for n, d in ((5, 16), (7, 16), (7, 8))]
    exact = [t.double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]

    def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = scale) -> Tensor:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return ((q * factor) @ k.transpose(-2, -1)).softmax(-1) @ v

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, scale=scale)

    ours = [mine(*inputs), *gradients_of(mine, inputs)]
    theirs = [plain(*inputs), *gradients_of(plain, inputs)]
    wanted = [plain(*exact), *gradients_of(plain, exact)]
    for found, other, true in zip(ours, theirs, wanted, strict=True):
        assert (found - true).norm() < 1.3 * (other - true).norm()


def test_a_mask_with_gradients_is_added() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(3, 5, 5, requires_grad=True)
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]

    def theirs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    wanted = gradients_of(theirs, [q, k, v, mask])
    found = gradients_of(kernels.attention, [*half, mask])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.03)


@needs_onednn
def test_both_are_differentiable_twice() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: kernels._Attention.apply(q, k, v, 0.3), (q, k, v)
    )
    x, w, b = torch.randn(8, 130, 128), torch.randn(128, 128), torch.randn(128)
    inputs = [t.requires_grad_() for t in (x, w, b)]

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(function(*inputs).tanh().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().mean() for g in first), inputs))

    for a, b in zip(second(kernels.linear), second(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@needs_onednn
def test_a_bias_may_be_a_view() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(8, 160, 136), torch.randn(144, 136, requires_grad=True)
    for bias in (torch.randn(144, 2)[:, 0], torch.randn(1).expand(144)):
        torch.testing.assert_close(
            kernels.linear(x, w, bias), F.linear(x, w, bias), rtol=1e-4, atol=1e-4
        )


@needs_onednn
def test_only_what_a_gradient_needs_is_kept() -> None:
    x, w = torch.randn(1100, 136), torch.randn(144, 136)

    def kept(first: bool, second: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kernels.linear(
                x.clone().requires_grad_(first), w.clone().requires_grad_(second)
            ).sum().backward()
        return sum(sizes)

    assert kept(True, False) == w.numel()
    assert kept(False, True) == x.numel()


@needs_onednn
def test_trained_layers_and_they_alone_take_onednn() -> None:
    model = build_model(
        "vit_tiny_patch16_224",
        image_size=64,
        num_classes=0,
        model_args={"embed_dim": 128, "depth": 2, "num_heads": 2},
    )
    images = torch.randn(64, 3, 64, 64)  # 17 tokens each: over 1,024 rows
    plain = build_model_alike(model)
    with Seen() as seen:
        found = model(images)
    assert seen.onednn == 2 * 4
    with Seen() as other, torch.no_grad():
        assert torch.equal(model(images), plain(images))  # as the exported model's
    assert other.onednn == 0
    torch.testing.assert_close(found, plain(images), rtol=1e-4, atol=1e-5)
    # A few rows and float64 are left to torch.
    for left in (lambda: model(images[:2]), lambda: model.double()(images.double())):
        with Seen() as other:
            left()
        assert other.onednn == 0


@needs_onednn
def test_the_first_count_of_operations_is_whole() -> None:
    source = (
        "import torch; from torch.utils.flop_counter import FlopCounterMode as C\n"
        "from multikd.students import StudentEncoder\n"
        "s = StudentEncoder('vit_tiny_patch16_224', image_size=64)\n"
        "x, n = torch.rand(64, 3, 64, 64), []\n"
        "for _ in range(2):\n"
        "    with C(display=False) as c: s(x)\n"
        "    n.append(c.get_total_flops())\n"
        "assert n[0] == n[1], n"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_an_interrupt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    student = StudentEncoder("vit_tiny_patch16_224", image_size=64, model_args=TINY)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(student.model.blocks[1].attn.qkv, "forward", interrupted)
    for run in (student, student.features):
        with pytest.raises(KeyboardInterrupt):
            run(torch.rand(2, 3, 64, 64))
        assert not torch.overrides._get_current_function_mode_stack()
        assert kernels.quick_depth() == 0


def test_traces_hold_torchs_operators() -> None:
    model, images = vit().bfloat16(), torch.randn(2, 3, 64, 64).bfloat16()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against traces
        traced = torch.jit.trace(model, images, check_trace=False)
    names = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::scaled_dot_product_attention" in names


def test_functions_of_torch_func_get_gradients() -> None:
    torch.manual_seed(0)
    model = vit(embed_dim=128)
    state = dict(model.named_parameters())
    images = torch.randn(64, 3, 64, 64)

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, state, (images,)).square().mean()

    found = torch.func.grad(loss)(state)["blocks.0.mlp.fc1.weight"]
    wanted = torch.autograd.grad(loss(state), state["blocks.0.mlp.fc1.weight"])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_export_and_compile_see_plain_layers() -> None:
    model = vit(embed_dim=128)
    images = torch.randn(64, 3, 64, 64)
    program = torch.export.export(model, (images,))
    assert not [n for n in program.graph.nodes if "_linear_pointwise" in str(n.target)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def build_model_alike(model: nn.Module) -> nn.Module:
    """The same without hooks."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return plain
