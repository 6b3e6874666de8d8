"""LGTM's influence agrees with an independent double backward; held-out batches; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data.shard_maker import make_shards
from helpers import methods, resuming
from helpers import training as small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multikd.callbacks import InfluentialSamples
from multikd.modules import InfluenceModule
from multikd.modules.optimizing import SecondOptimizer, virtual_step


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("influence")
    make_shards(folder, [12, 17])
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def double(exact: bool = False, reach: float = 0.01) -> InfluenceModule:
    """GELU models in float64, without dropout."""
    module = methods.module(
        "influence",
        exact=exact,
        reach=reach,
        student=methods.student(num_classes=methods.CLASSES),
        influence_rate=0.5,
        teacher_alpha=0.4,
        alpha=0.7,
    )
    return module.double().train()


def batches() -> tuple[Any, Any]:
    pair = small.batch(count=6, seed=1), small.batch(count=6, seed=2)
    for batch in pair:
        batch.views = [view.double() / 255.0 for view in batch.views]
    return pair


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q), written apart from the package's."""
    return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1)


def reference(module: InfluenceModule, batch: Any, held: Any, rate: float) -> dict[str, Any]:
    """Every quantity of METHODS section 4 by autograd alone; θ' by a hand-written SGD step."""
    student, teacher = module.student, module.trained_teacher
    theta = [p for p in student.parameters() if p.requires_grad]
    phi = [p for p in teacher.parameters() if p.requires_grad]
    images, labels = batch.views[0], batch.labels
    with sdpa_kernel(SDPBackend.MATH):
        z_s = student.features(images).logits
    z_t = teacher(images).logits
    loss_s = 0.7 * kl(z_t.detach(), z_s) + 0.3 * F.cross_entropy(z_s, labels, reduction="none")
    first = torch.autograd.grad(loss_s.mean(), theta, retain_graph=True)
    kept = [p.detach().clone() for p in theta]
    with torch.no_grad():
        for p, g in zip(theta, first, strict=True):
            p.copy_(p - rate * g)
    held_loss = F.cross_entropy(student.features(held.views[0]).logits, held.labels)
    g = torch.autograd.grad(held_loss, theta)
    with torch.no_grad():
        for p, old in zip(theta, kept, strict=True):
            p.copy_(old)
    with sdpa_kernel(SDPBackend.MATH):
        z_s = student.features(images).logits
    loss_t = (0.4 * kl(z_s, z_t) + 0.6 * F.cross_entropy(z_t, labels, reduction="none")).mean()
    inner = torch.autograd.grad(loss_t, theta, create_graph=True)
    slope = sum((a * b).sum() for a, b in zip(inner, g, strict=True))
    influence = torch.autograd.grad(slope, phi, retain_graph=True)
    plain = torch.autograd.grad(
        (0.4 * kl(z_s.detach(), z_t) + 0.6 * F.cross_entropy(z_t, labels, reduction="none")).mean(),
        phi,
        retain_graph=True,
    )
    samples = []
    for row in kl(z_t.detach(), z_s):
        parts = torch.autograd.grad(row, theta, retain_graph=True)
        samples.append(sum((a * b).sum() for a, b in zip(parts, g, strict=True)))
    return {
        "g": g,
        "influence": influence,
        "plain": plain,
        "samples": torch.stack(samples).detach(),  # type: ignore[arg-type]
    }


def taken(module: InfluenceModule, batch: Any, held: Any, rate: float) -> tuple[Any, Any, Any]:
    optimizer = torch.optim.SGD(list(module.student.parameters()), lr=rate)
    images = batch.views[0]
    with module._differentiable():
        logits = module.student.features(images).logits
    taught = module.trained_teacher(images).logits
    assert logits is not None
    g = module.direction(optimizer, batch, held, logits, taught)
    with_it = module.influence(batch, g, logits, taught, 0.5, 3)
    taught = module.trained_teacher(images).logits
    with module._differentiable():
        logits = module.student.features(images).logits
    assert logits is not None
    without = module.influence(batch, g, logits, taught, 0.0, 3)
    return g, with_it, without


def relative(got: Any, expected: Any) -> float:
    a = torch.cat([t.flatten() for t in got])
    b = torch.cat([t.flatten() for t in expected])
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("exact", [False, True])
def test_influence_is_the_mixed_second_derivative(exact: bool) -> None:
    """In float64, on a GELU model: 1e-4 by the finite difference, rounding by double backward."""
    module = double(exact, reach=5e-4)
    batch, held = batches()
    expected = reference(module, batch, held, rate=0.1)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    g, with_it, without = taken(module, batch, held, rate=0.1)
    assert relative(g.values(), expected["g"]) < 1e-12
    assert relative(without.gradients, expected["plain"]) < 1e-12
    influence = [(a - b) / 0.5 for a, b in zip(without.gradients, with_it.gradients, strict=True)]
    limit = 1e-9 if exact else 1e-4
    assert relative(influence, expected["influence"]) < limit
    assert relative([with_it.samples], [expected["samples"]]) < limit
    assert float(torch.stack([p.norm() for p in expected["influence"]]).max()) > 1e-5
    # Nothing has moved, and nothing was left behind.
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    assert all(p.grad is None for p in module.parameters())


def test_the_difference_converges_with_the_square_of_its_reach() -> None:
    """On this little ViT the published reach of 0.01 is off by 3e-3; a tenth of it by 3e-5."""
    errors = []
    batch, held = batches()
    expected = reference(double(), batch, held, rate=0.1)["influence"]
    for reach in (0.01, 0.001):
        _, with_it, without = taken(double(reach=reach), batch, held, rate=0.1)
        pairs = zip(without.gradients, with_it.gradients, strict=True)
        errors.append(relative([(a - b) / 0.5 for a, b in pairs], expected))
    assert errors[0] < 1e-2
    assert errors[1] < 1e-4
    assert 80 < errors[0] / errors[1] < 120


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam_fused"])
def test_a_virtual_step_is_the_step(kind: str) -> None:
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
        "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    }[kind]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = made([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.01}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for _ in range(2):  # with a state, and without
        gradients = [torch.randn_like(p) for p in parameters]
        before = [p.detach().clone() for p in parameters]
        moved = virtual_step(optimizer, parameters, gradients)
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
        assert all(t.requires_grad and t.is_leaf for t in moved)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters, moved, strict=True))


def test_the_teacher_s_step_and_the_relabelled_batch() -> None:
    """``teach`` against the reference's gradients and a hand-made step."""
    module, other = double(exact=True), double()
    batch, held = batches()
    expected = reference(other, batch, held, rate=0.1)
    module.second = SecondOptimizer(
        torch.optim.SGD([p for p in module.trained_teacher.parameters() if p.requires_grad], lr=0.2)
    )
    optimizer = torch.optim.SGD(list(module.student.parameters()), lr=0.1)
    logits, found = module.teach(batch, held, optimizer)
    moved = [p for p in module.trained_teacher.parameters() if p.requires_grad]
    start = [p for p in other.trained_teacher.parameters() if p.requires_grad]
    rows = zip(moved, start, expected["plain"], expected["influence"], strict=True)
    for now, then, plain, influence in rows:
        wanted = then - 0.2 * (plain - 0.5 * influence)  # η is 0.5
        assert torch.allclose(now, wanted, rtol=1e-8, atol=1e-9)
    assert torch.allclose(logits, other.student.features(batch.views[0]).logits)
    assert found.losses.shape == (6,)


def test_dropout_is_the_same_on_both_sides() -> None:
    module = methods.module("influence").train()
    batch = small.batch()
    images = batch.views[0].float() / 255.0
    same = [module.student_logits(images, {}, draws=7) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], module.student_logits(images, {}, draws=8))
    before = torch.random.get_rng_state()
    module.student_logits(images, {}, draws=7)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_never_sees_a_held_out_sample_and_the_log_names_samples(
    shards: list[str], tmp_path: Path
) -> None:
    data = methods.data(shards, val=shards)
    log = InfluentialSamples(top=2)
    steps = resuming.run(methods.module("influence"), data, tmp_path, log, max_epochs=2)
    trained = {key for keys in steps.keys for key in keys}
    stream = methods.data(shards)
    stream.setup("fit")
    batches = stream.held_out_batches(5)
    held = [key for _ in range(4) for key in next(batches).keys]
    assert len(held) == 20
    assert len(set(held)) == 12 // 4 + 17 // 4  # pass after pass
    assert not trained & set(held)
    again = stream.held_out_batches(5, start=2)
    assert next(again).keys == held[10:15]
    rows = [json.loads(line) for line in (tmp_path / "influence.0.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [0, 1, 2, 3] * 2
    for row, keys in zip(rows, steps.keys, strict=True):
        assert {key for key, _ in row["helpful"] + row["harmful"]} <= set(keys)
        assert len(row["helpful"]) == 2
        values = [value for _, value in row["helpful"]]
        assert values == sorted(values, reverse=True)
        assert row["helpful"][0][1] >= row["harmful"][0][1]


@pytest.mark.parametrize(
    ("settings", "shard_settings", "trainer", "words"),
    [
        ({}, {"held_out": None}, {}, "set data.held_out"),
        ({}, {"held_out": 15}, {}, "fewer than one held-out batch of 5"),
        ({}, {}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches to 1"),
        ({}, {}, {"precision": "bf16-true"}, "bf16-mixed or 32-true in place of bf16-true"),
    ],
)
def test_before_training(
    shards: list[str],
    tmp_path: Path,
    settings: Any,
    shard_settings: Any,
    trainer: Any,
    words: str,
) -> None:
    module = methods.module("influence", **settings)
    data = methods.data(shards, **shard_settings)
    with pytest.raises(ValueError, match=words):
        resuming.run(module, data, tmp_path, **trainer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"teacher_alpha": 0.0}, "teacher_alpha must be above 0"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"held_out_batch": 0}, "held_out_batch must be 1 or more"),
        ({"student": methods.student()}, "the student 0: set student.init_args.num_classes to 10"),
    ],
)
def test_bad_settings(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        methods.module("influence", **settings)
