"""Sums of MLPs against modules that are added one by one: values, every gradient, memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.ladder import Ladder
from multikd.losses import FeatureLoss, weigh
from multikd.mlp_sums import MLP, _pieces, mlp_sums
from multikd.projectors import MLPProjectors, mlp_weights
from multikd.types import Grid, TokenFeatures, Widths

WIDTHS, HIDDEN, OUT = (5, 6, 7), (4, 3, 8), (6, 9)


def make(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[list[MLP]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    inputs = [random(4, 3, d) for d in WIDTHS]
    outputs = [
        [MLP(random(h, d), random(h), random(o, h), random(o)) for d, h in zip(WIDTHS, HIDDEN)]  # noqa: B905
        for o in OUT
    ]
    return inputs, outputs


def one_by_one(inputs: Sequence[Tensor], outputs: Sequence[Sequence[MLP]]) -> list[Tensor]:
    return [
        torch.stack(
            [F.gelu(x @ m.w1.T + m.b1) @ m.w2.T + m.b2 for x, m in zip(inputs, mlps, strict=True)]
        ).sum(0)
        for mlps in outputs
    ]


def flat(inputs: list[Tensor], outputs: list[list[MLP]]) -> list[Tensor]:
    return [*inputs, *(w for mlps in outputs for m in mlps for w in m)]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kept", ["all", "some", "none of one"])
def test_values_and_all_gradients(skip: bool, kept: str) -> None:
    inputs, outputs = make(torch.float64)
    mask = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    if kept == "some":
        mask[0, 1] = mask[1, 0] = mask[1, 3] = 0
    elif kept == "none of one":
        mask[0] = 0
    upstream = [torch.randn(4, 3, o, dtype=torch.float64) * m for o, m in zip(OUT, mask)]  # noqa: B905
    tensors = flat(inputs, outputs)
    ours = mlp_sums(inputs, outputs, skip)
    theirs = one_by_one(inputs, outputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(ours, tensors, upstream)
    expected = torch.autograd.grad(theirs, tensors, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_an_output_that_nobody_uses() -> None:
    inputs, outputs = make(torch.float64)
    tensors = flat(inputs, outputs)

    def function(*values: Tensor) -> Tensor:
        mlps = [MLP(*values[i : i + 4]) for i in range(3, len(values), 4)]
        return mlp_sums(values[:3], [mlps[:3], mlps[3:]])[1]

    assert torch.autograd.gradcheck(function, tensors)
    function(*tensors).sum().backward()
    assert all(w.grad is None for m in outputs[0] for w in m)
    assert all(w.grad is not None for m in outputs[1] for w in m)
    # Biases of the second layers have equal gradients, and each its own memory.
    addresses = {m.b2.grad.data_ptr() for m in outputs[1]}
    assert len(addresses) == 3


def test_a_nan_in_a_dropped_row_reaches_no_gradient() -> None:
    inputs, outputs = make()
    with torch.no_grad():
        inputs[0][2] = float("nan")
    first, second = mlp_sums(inputs, outputs)
    (first[:2].sum() + second[3].sum()).backward()
    for tensor in flat(inputs, outputs):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_half_precision_is_as_near_to_exact_as_modules() -> None:
    inputs, outputs = make()
    exact = one_by_one(
        [x.double() for x in inputs], [[MLP(*(w.double() for w in m)) for m in o] for o in outputs]
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = mlp_sums(inputs, outputs)
        theirs = [
            sum(
                F.linear(F.gelu(F.linear(x, m.w1, m.b1)), m.w2, m.b2)
                for x, m in zip(inputs, mlps, strict=True)
            )
            for mlps in outputs
        ]
    for mine, modules, y in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16  # rounded once, where modules round each of the rungs
        off, theirs_off = (mine - y).square().mean(), (modules - y).square().mean()
        assert 0 < off < 1.2 * theirs_off
    ours[0].sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.dtype == torch.float32
    assert outputs[0][0].w1.grad is not None
    assert outputs[0][0].w1.grad.dtype == torch.float32


def test_a_graph_that_is_kept_is_differentiated_again() -> None:
    inputs, outputs = make()
    total = sum(y.square().sum() for y in mlp_sums(inputs, outputs))
    tensors = flat(inputs, outputs)
    once = torch.autograd.grad(total, tensors, retain_graph=True)
    again = torch.autograd.grad(total, tensors)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, tensors)


def test_an_image_whose_first_token_has_no_gradient_is_not_skipped() -> None:
    inputs, outputs = make(torch.float64)
    mask = torch.ones(4, 3, 1, dtype=torch.float64)
    mask[1, 0] = mask[2] = 0  # one token of an image; a whole image
    tensors = flat(inputs, outputs)
    found = torch.autograd.grad((mlp_sums(inputs, outputs, True)[0] * mask).sum(), inputs)
    expected = torch.autograd.grad((one_by_one(inputs, outputs)[0] * mask).sum(), tensors[:3])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused() -> None:
    inputs, outputs = make()
    (gradient,) = torch.autograd.grad(
        mlp_sums(inputs, outputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def ladders(rungs: int = 4) -> tuple[Ladder, Ladder, list[TokenFeatures], dict[str, Grid | None]]:
    widths = [Widths(8, 8)] * rungs
    teachers = {"a": Widths(6, 5), "b": Widths(7, None), "c": Widths(None, 4), "d": Widths(6, 6)}
    made = [Ladder(widths, teachers, MLPProjectors(6, 10), fused=fused) for fused in (True, False)]
    made[1].load_state_dict(made[0].state_dict())  # the same keys
    features = [
        TokenFeatures(
            torch.randn(5, 8).requires_grad_(), torch.randn(5, 16, 8).requires_grad_(), (4, 4)
        )
        for _ in widths
    ]
    grids: dict[str, Grid | None] = {"a": (4, 4), "b": None, "c": (2, 2), "d": (4, 4)}
    return made[0], made[1], features, grids


def test_ladder_with_loss_and_dropping_has_the_naive_gradients() -> None:
    """All of them, inputs and parameters, to 1e-5 in float32."""
    fused, naive, features, grids = ladders()
    for parameter, other in zip(fused.parameters(), naive.parameters(), strict=True):
        torch.nn.init.normal_(parameter, std=0.3)
        other.data.copy_(parameter.data)
    inputs = [t for f in features for t in (f.summary, f.patches) if t is not None]
    targets = {n: p.map(torch.randn_like) for n, p in naive(features, grids).items()}
    keep = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [1, 0, 0, 1, 1], [0, 0, 1, 0, 0]])
    found = []
    for ladder in (fused, naive):
        predictions = ladder(features, grids)
        losses = torch.stack([FeatureLoss()(predictions[n], targets[n]) for n in targets])
        total, _ = weigh(losses, keep.float(), torch.ones(4), "batch")
        found.append([total, *torch.autograd.grad(total, [*ladder.parameters(), *inputs])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert any(f.grad_fn is not None for f in [fused(features, grids)["a"].patches])


def test_the_fused_path_is_taken_and_kept_to_plain_mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, features, grids = ladders()
    calls: list[int] = []
    original = mlp_sums

    def counting(inputs: list[Tensor], outputs: list[list[MLP]]) -> list[Tensor]:
        calls.append(len(outputs))
        return original(inputs, outputs)

    monkeypatch.setattr("multikd.ladder.mlp_sums", counting)
    expected = fused(features, grids)
    assert sorted(calls) == [1, 1, 2, 2]  # b's summaries, c's patches, a and d together
    seen = []
    projector = fused.projectors["a"]["1"]  # type: ignore[index]
    handle = projector.patches[0].register_forward_hook(lambda *_: seen.append(1))
    assert mlp_weights(projector) is None
    watched = fused(features, grids)
    assert seen
    handle.remove()
    for name, features_ in expected.items():
        for token in ("summary", "patches"):
            a, b = getattr(features_, token), getattr(watched[name], token)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    projector.patches[1] = torch.nn.GELU("tanh")
    assert mlp_weights(projector) is None


def test_compiled_in_one_graph_with_the_same_gradients() -> None:
    fused, _, features, grids = ladders(2)
    inputs = [t for f in features for t in (f.summary, f.patches) if t is not None]

    def run() -> Tensor:
        return torch.stack(
            [f.patches.sum() for f in fused(features, grids).values() if f.patches is not None]
        ).sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(run(), inputs, allow_unused=True)
    theirs = torch.autograd.grad(compiled(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_less_is_kept_for_the_backward_pass() -> None:
    fused, naive, features, grids = ladders(6)
    kept = []
    for ladder in (fused, naive):
        known = {p.untyped_storage().data_ptr() for p in ladder.parameters()}
        storages: dict[int, int] = {}

        def pack(
            tensor: Tensor, known: set[int] = known, storages: dict[int, int] = storages
        ) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = ladder(features, grids)
        kept.append(sum(storages.values()))
        del output
    assert kept[0] < 0.75 * kept[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_ones_in_onednns_products_equal_float64(dtype: torch.dtype) -> None:
    """Over 1,024 rows and 16,384 weights, with gaps of unused images."""
    torch.manual_seed(0)
    images, tokens, width, out = 9, 150, 24, 130
    hidden = (96, 64)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    inputs = [random(images, tokens, width) for _ in hidden]
    outputs = [
        [MLP(random(h, width), random(h), random(out, h), random(out)) for h in hidden]
        for _ in range(2)
    ]
    upstream = [torch.randn(images, tokens, out) for _ in outputs]
    for image in (0, 3, 4, 8):
        upstream[0][image] = 0
    tensors = flat(inputs, outputs)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        ours = mlp_sums(inputs, outputs, True)
    found = torch.autograd.grad(ours, tensors, [g.to(y.dtype) for g, y in zip(upstream, ours)])  # noqa: B905
    wide = [t.detach().double().requires_grad_() for t in tensors]
    twins = iter(wide[len(inputs) :])
    exact = one_by_one(
        wide[: len(inputs)],
        [[MLP(*(next(twins) for _ in range(4))) for _ in mlps] for mlps in outputs],
    )
    wanted = torch.autograd.grad(exact, wide, [g.double() for g in upstream])
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    for a, b in zip([*ours, *found], [*exact, *wanted], strict=True):
        assert (a.double() - b).norm() < limit * b.norm()


def test_runs_of_chosen_images() -> None:
    whole = slice(None)
    assert _pieces(None, 10) == [(whole, whole)]
    assert _pieces(torch.tensor([], dtype=torch.int64), 10) == []
    assert _pieces(torch.tensor([0, 1, 3]), 10) == [
        (slice(0, 20), slice(0, 20)),
        (slice(30, 40), slice(20, 30)),
    ]
