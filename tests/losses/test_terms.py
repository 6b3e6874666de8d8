"""The classics against independent NumPy implementations in float64, loop by loop, as published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import training as small
from torch import Tensor

from multikd.losses import (
    AttentionTransferTerm,
    HintTerm,
    ResponseTerm,
    RKDTerm,
    SimilarityPreservingTerm,
)
from multikd.losses.batch_relation import RelationTerm
from multikd.losses.classes import read_class_map
from multikd.losses.layers import attention_distance, attention_map, hint_distance
from multikd.losses.response import (
    decoupled_divergence,
    ensemble_probabilities,
    response_divergence,
)
from multikd.types import Batch, StudentOutput, TokenFeatures

B, K, D = 5, 4, 3


def normal(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def batch(positions: list[int] | None = None, labels: list[int] | None = None) -> Batch:
    made = small.batch(count=B, positions=None if positions is None else torch.tensor(positions))
    made.labels = torch.tensor(labels or [0, 1, 2, 3, 1])
    return made


def output(summary: Tensor, logits: Tensor | None = None) -> StudentOutput:
    return StudentOutput((TokenFeatures(summary),), TokenFeatures(summary, logits=logits))


def bound(term: Any, *names: str) -> Any:
    term.names = names
    if isinstance(term, ResponseTerm):
        term.weights = term.weights or dict.fromkeys(names, 1.0)
        term.uses_logits = True
    return term


# --------------------------------------------------------------------- NumPy, as the papers say it


def np_softmax(z: Any) -> Any:
    e = np.exp(z - z.max())
    return e / e.sum()


def np_huber(d: float) -> float:
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def np_distances(x: Any) -> Any:
    n = len(x)
    d = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)])
    return d / (d.sum() / (n * (n - 1)))


def np_rkd_distance(s: Any, t: Any) -> Any:
    ds, dt, n = np_distances(s), np_distances(t), len(s)
    return [
        sum(np_huber(ds[i, j] - dt[i, j]) for j in range(n) if j != i) / (n - 1) for i in range(n)
    ]


def np_cos(x: Any, i: int, j: int, k: int) -> float:
    a, b = x[j] - x[i], x[k] - x[i]
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def np_rkd_angle(s: Any, t: Any) -> Any:
    n, rows = len(s), []
    for i in range(n):
        pairs = [(j, k) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
        rows.append(
            sum(np_huber(np_cos(s, i, j, k) - np_cos(t, i, j, k)) for j, k in pairs) / len(pairs)
        )
    return rows


def np_similarity(s: Any, t: Any) -> Any:
    def rows(x: Any) -> Any:
        g = x @ x.T
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return ((rows(s) - rows(t)) ** 2).mean(axis=1)


# ------------------------------------------------------------------------------------- responses


def test_response_is_the_papers_divergence_of_an_ensemble() -> None:
    a, b, z = normal(B, K, seed=1), normal(B, K, seed=2), normal(B, K, seed=3)
    tau, weights, own = 3.0, {"a": 2.0, "b": 1.0}, {"a": 1.5}
    term = bound(
        ResponseTerm(temperature=tau, teachers=weights, temperatures=own, alpha=0.7), *"ab"
    )
    got = term(output(z, z), batch(), {"a": TokenFeatures(logits=a), "b": TokenFeatures(logits=b)})
    for i, label in enumerate([0, 1, 2, 3, 1]):
        p = (2 * np_softmax(a[i].numpy() / 1.5 / tau) + np_softmax(b[i].numpy() / tau)) / 3
        q = np_softmax(z[i].numpy() / tau)
        kl = sum(p[k] * math.log(p[k] / q[k]) for k in range(K))
        ce = -math.log(np_softmax(z[i].numpy())[label])
        assert got[i].item() == pytest.approx(0.7 * tau**2 * kl + 0.3 * ce, abs=1e-9)


def test_weights_of_absent_teachers_go_to_the_others_and_labels_are_optional() -> None:
    a, z = normal(B, K, seed=1), normal(B, K, seed=3, grad=True)
    targets = {"a": TokenFeatures(logits=a)}
    term = bound(ResponseTerm(teachers={"a": 0.5, "b": 7.0}, alpha=0.5), *"ab")
    alone = bound(ResponseTerm(alpha=0.5), "a")
    unlabelled = batch(labels=[-1] * B)
    got = term(output(z, z), unlabelled, targets)
    assert torch.equal(got, alone(output(z, z), unlabelled, targets))
    assert torch.allclose(got, 8.0 * response_divergence(torch.softmax(a / 4, 1), z, 4.0))
    nobody = bound(ResponseTerm(), "a")(output(z, z), batch(), {})
    (gradient,) = torch.autograd.grad(nobody.sum(), z)
    assert not nobody.any()
    assert not gradient.any()


def test_decoupled_parts_add_up_and_are_the_papers() -> None:
    a, z = normal(B, K, seed=1), normal(B, K, seed=3)
    p = torch.softmax(a / 2, 1)
    classes = torch.tensor([0, 1, 2, 3, 1])
    target, rest = decoupled_divergence(p, z, classes, 2.0)
    p_t = p.gather(1, classes.unsqueeze(1)).squeeze(1)
    assert torch.allclose(target + (1 - p_t) * rest, response_divergence(p, z, 2.0), atol=1e-12)
    q, one = np_softmax(z[0].numpy() / 2), p[0].numpy()
    two = one[0] * math.log(one[0] / q[0])
    two += (1 - one[0]) * math.log((1 - one[0]) / (1 - q[0]))
    assert target[0].item() == pytest.approx(two, abs=1e-12)
    others = [(one[k] / (1 - one[0]), q[k] / (1 - q[0])) for k in range(1, K)]
    assert rest[0].item() == pytest.approx(sum(x * math.log(x / y) for x, y in others), abs=1e-12)
    term = bound(ResponseTerm(temperature=2.0, decoupled=True, nontarget_weight=3.0), "a")
    got = term(output(z, z), batch(), {"a": TokenFeatures(logits=a)})
    assert torch.allclose(got, 4 * (target + 3 * rest))
    certain = torch.eye(K, dtype=torch.float64)[:1]
    assert all(
        torch.isfinite(x).all() for x in decoupled_divergence(certain, z[:1], classes[:1], 1)
    )


def test_gradients_of_responses() -> None:
    p = torch.softmax(normal(B, K, seed=1), 1)
    z, classes = normal(B, K, seed=3, grad=True), torch.tensor([0, 1, 2, 3, 1])
    assert torch.autograd.gradcheck(lambda x: response_divergence(p, x, 3.0), z)
    assert torch.autograd.gradcheck(lambda x: decoupled_divergence(p, x, classes, 3.0), z)


def test_an_ensemble_averages_probabilities_not_logits() -> None:
    sure, other = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    assert torch.allclose(
        ensemble_probabilities([sure, other], [1, 1], 1.0), torch.full((1, 2), 0.5)
    )
    with pytest.raises(ValueError, match="one shape from each teacher"):
        ensemble_probabilities([sure, torch.zeros(1, 3)], [1, 1], 1.0)


# -------------------------------------------------------------------------------- label spaces


def test_a_mapping_adds_probabilities_up(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"teacher": ["tabby", "tiger", "dog", "car"], "student": ["cat", "dog"], '
                    '"same": {"tabby": "cat", "tiger": "cat"}}')  # fmt: skip
    logits = normal(B, K)
    p = torch.softmax(logits / 2, 1)
    expected = torch.stack([p[:, 0] + p[:, 1], p[:, 2]], 1) / p[:, :3].sum(1, keepdim=True)
    mapped = read_class_map(path, 4, 2)(logits, 2.0)
    assert torch.allclose(torch.softmax(mapped / 2, 1), expected, atol=1e-12)
    path.write_text('{"classes": [0, 0, 1, null]}')
    assert torch.equal(read_class_map(path, 4, 2)(logits, 2.0), mapped)
    empty = read_class_map(path, 4, 3)(logits, 1.0)
    assert not torch.softmax(empty, 1)[:, 2].any()
    # However far a class without one is ahead of the others.
    path.write_text('{"classes": [null, 0, 1]}')
    ahead = read_class_map(path, 3, 3)(torch.tensor([[200.0, 0.0, -1.0]]), 1.0)
    one = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    assert torch.allclose(torch.softmax(ahead, 1)[0], torch.tensor([*one, 0.0]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"classes": [0, 1]}', "maps 2 classes and the teacher has 4"),
        ('{"classes": [0, 1, 2, 9]}', "numbers from 0 to 2"),
        ('{"classes": [null, null, null, null]}', "maps no class of the teacher"),
        ('{"teacher": ["a"], "student": ["a", "b"]}', "names 2 student classes"),
        ("[1, 2]", "maps no classes"),
    ],
)
def test_a_bad_mapping_is_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_class_map(path, 4, 3)


# ------------------------------------------------------------------------------------- relations


@pytest.mark.parametrize(
    ("term", "reference"),
    [
        (RKDTerm(distance=1.0, angle=0.0), np_rkd_distance),
        (RKDTerm(distance=0.0, angle=1.0), np_rkd_angle),
        (SimilarityPreservingTerm(token="summary"), np_similarity),
    ],
    ids=["distance", "angle", "similarity"],
)
def test_relations_are_the_papers(term: RelationTerm, reference: Any) -> None:
    s, t = normal(B, D, seed=1), 5.0 + normal(B, D + 2, seed=2)
    term = bound(term, "a", "absent")
    got = term(output(s), batch(), {"a": TokenFeatures(t)})
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), reference(s.numpy(), t.numpy()), atol=1e-9)
    # A filler takes part in no relation: the others' losses are those of the batch without it.
    fillers = batch(positions=[0, 1, -1, 3, 4])
    others = [0, 1, 3, 4]
    got = term(output(s), fillers, {"a": TokenFeatures(t)})
    expected = reference(s.numpy()[others], t.numpy()[others])
    np.testing.assert_allclose(got.numpy()[others], expected, atol=1e-9)
    assert got[2] == 0
    x = s.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: term(output(x), fillers, {"a": TokenFeatures(t)}), x, atol=1e-5
    )


@pytest.mark.parametrize("settings", [{"distance": -1.0}, {"distance": 0.0, "angle": 0.0},
                                      {"distance": torch.nan}, {"angle": torch.nan},
                                      {"angle": torch.inf}])  # fmt: skip
def test_weights_of_relations_are_finite(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite weights of 0 or more, not both 0"):
        RKDTerm(**settings)  # type: ignore[arg-type]


def test_a_weight_of_a_decoupled_part_is_finite() -> None:
    with pytest.raises(ValueError, match="0 or more and finite, received nan"):
        ResponseTerm(decoupled=True, target_weight=torch.nan)


def test_images_in_one_place_have_finite_gradients() -> None:
    s = normal(B, D, seed=1)
    s[1] = s[0]
    x = s.float().requires_grad_()
    term = bound(RKDTerm(), "a")
    loss = term(output(x), batch(), {"a": TokenFeatures(normal(B, D, seed=2).float())})
    (gradient,) = torch.autograd.grad(loss.mean(), x)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert gradient.any()
    loss = term(output(x * 0), batch(), {"a": TokenFeatures(s * 0)})  # all in one place
    assert torch.isfinite(loss).all()


# ----------------------------------------------------------------------------------- feature maps


def test_attention_transfer_is_the_papers() -> None:
    s, t = normal(B, 6, D, seed=1, grad=True), normal(B, 6, D + 1, seed=2)
    features = TokenFeatures(patches=s, grid=(2, 3))
    term = bound(AttentionTransferTerm(), "a")
    out = StudentOutput((features,), features)
    got = term(out, batch(), {"a": TokenFeatures(patches=t, grid=(2, 3))})
    for i in range(B):
        qs, qt = ((x[i].detach().numpy() ** 2).mean(axis=1) for x in (s, t))
        difference = qs / np.linalg.norm(qs) - qt / np.linalg.norm(qt)
        assert got[i].item() == pytest.approx((difference**2).mean(), abs=1e-12)
    q = attention_map(TokenFeatures(patches=t, grid=(2, 3))).patches
    assert q is not None
    assert torch.autograd.gradcheck(
        lambda x: attention_distance(x.square().mean(2), q.squeeze(2)), s
    )


def test_hints_regress_the_rung_and_meet_on_the_smaller_grid() -> None:
    module = small.module(
        {"rungs": "all"}, loss=None, terms={"hint": HintTerm(teachers=["vit", "cnn"], rung=0)}
    )
    term = module.terms["hint"]
    made = small.batch()
    images = made.views[0].float() / 255
    out = module.student(images)
    targets = module.targets(made, images, 0, ["vit"])
    got = term(out, made, targets)
    rung, y = out.rungs[0], targets["vit"]
    assert rung.grid == (2, 2)
    assert y.grid == (3, 3)
    linear = term.regressors["vit"]
    s = rung.patches @ linear.weight.T + linear.bias
    maps = y.patches.transpose(1, 2).reshape(6, -1, 3, 3)
    down = torch.nn.functional.interpolate(maps, (2, 2), mode="bilinear", antialias=True)
    expected = (s - down.flatten(2).transpose(1, 2)).square().mean((1, 2))
    assert torch.allclose(got, expected, atol=1e-6)
    got.mean().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.any()
    absent = term.regressors["cnn"].weight.grad  # of a teacher that did not run: zeros
    assert absent is not None
    assert not absent.any()
    x = normal(2, 3, D, seed=4, grad=True)
    assert torch.autograd.gradcheck(lambda x: hint_distance(x, normal(2, 3, D)), x)


def test_layers_of_a_teacher_are_what_timm_gives() -> None:
    teacher = small.teacher("test_resnet", 64)
    images = torch.rand(2, 3, 64, 64)
    plain = teacher(images)
    asked = teacher.ask_layers([-2, 1])
    features = teacher(images)
    assert torch.equal(features.summary, plain.summary)
    model, encoder = teacher.encoder.model, teacher.encoder
    maps = model.forward_intermediates(encoder.normalize(images), intermediates_only=True)
    for number, widths in asked:
        got = features.layers[features.layer_numbers.index(number)]
        assert got.patches.shape[2] == widths.patches
        assert torch.allclose(got.patches, maps[number].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="an index must be in"):
        teacher.ask_layers([7])
    with pytest.raises(ValueError, match="gives no intermediate layers"):
        small.summary_teacher().ask_layers([0])
