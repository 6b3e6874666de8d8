"""Data of single teachers: what counts, what runs, what moves, against sums by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import training as small
from torch import Tensor

from multikd.data.claims import claims
from multikd.data.specs import DatasetSpec
from multikd.losses import (
    AngleLoss,
    FixedWeights,
    HardestKept,
    InverseLossScale,
    LossSum,
    MSELoss,
    NoDropping,
    RandomTeachers,
    ShiftEquivariantMSE,
    UncertaintyWeights,
)
from multikd.modules import DistillationModule
from multikd.normalizers import (
    BatchStandardizers,
    EMAStandardizers,
    FixedStandardizers,
    NoNormalizers,
    PHISNormalizers,
)
from multikd.types import Batch

NAMES = ("vit", "cnn", "next")
ORIGINS = [0, 1, 0, 2, 0, 1]
CLAIMS = {"vit": frozenset({0, 2}), "cnn": frozenset({1, 2}), "next": frozenset({2, 3})}


def batch(origins: list[int] = ORIGINS, **settings: Any) -> Batch:
    made = small.batch(count=len(origins), **settings)
    made.dataset, made.origins = torch.tensor(origins), origins
    return made


def module(**settings: Any) -> DistillationModule:
    made = small.module(**{"normalizers": NoNormalizers(), **settings}).train()
    for name in made.teacher_names:
        made.normalizer(name).set_total_steps(100)
    return made


def belongs(origins: list[int] = ORIGINS) -> Tensor:
    return torch.tensor([[o in CLAIMS[name] for o in origins] for name in NAMES])


def gradients(made: DistillationModule, total: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    total.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("normalize", ["image", "batch", "teacher"])
def test_the_total_is_that_of_masked_losses(normalize: Any) -> None:
    made = module(dropper=NoDropping(normalize))
    data, mask = batch(), belongs()
    whole, record = made.step(data, 0, 0, training=True)  # every image for every teacher
    gradients(made, whole)
    made.claims = CLAIMS
    total, own = made.step(data, 0, 0, training=True)
    assert own.names == NAMES
    assert own.images == {"vit": 4, "cnn": 3, "next": 1}
    assert torch.allclose(own.losses, torch.where(mask, record.losses, 0.0), rtol=1e-5)
    assert torch.equal(own.keep, mask.float())
    pairs = [(t, b) for t in range(3) for b in range(6) if mask[t, b]]
    loss = record.losses.double()
    if normalize == "image":
        by_hand = sum(loss[t, b] / mask[:, b].sum() for t, b in pairs) / 6
    elif normalize == "batch":
        by_hand = sum(loss[t, b] for t, b in pairs) / len(pairs)
    else:
        by_hand = sum(loss[t, b] / mask[t].sum() for t, b in pairs) / 3
    assert total.item() == pytest.approx(float(by_hand), rel=1e-5)
    found = gradients(made, total)
    # The same graph with what does not count masked out: the same gradient.
    made.claims = None
    keep = mask.float()
    made.dropper.keep = lambda *_: keep  # type: ignore[method-assign]
    masked, _ = made.step(data, 0, 0, training=True)
    expected = gradients(made, masked)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("dropper", [NoDropping, RandomTeachers])
def test_weights_of_teachers_count_where_an_image_has_one(dropper: Any) -> None:
    def weights(**settings: Any) -> Tensor:
        made = module(balancer=FixedWeights({"vit": 3.0}), **settings)
        made.claims = {name: frozenset({i}) for i, name in enumerate(NAMES)}
        total, record = made.step(batch([0, 1, 2, 0, 1, 2]), 0, 0, training=True)
        means = torch.stack([record.losses[t, t::3].mean() for t in range(3)])
        return torch.stack([total.detach(), (means * torch.tensor([1.8, 0.6, 0.6])).mean()])

    chosen = {"dropper": dropper(0.0)} if dropper is RandomTeachers else {}
    given, expected = weights(teacher_data="own", **chosen)
    assert given.item() == pytest.approx(expected.item(), rel=1e-5)
    # What somebody chose stays.
    assert module(dropper=NoDropping("image"), teacher_data="own").dropper.normalize == "image"
    assert module(teacher_data="all").dropper.normalize == "image"


def test_uncertainty_of_an_absent_teacher_is_left_alone() -> None:
    made = module(balancer=UncertaintyWeights())
    made.claims = CLAIMS
    total, _ = made.step(batch([0, 0, 1, 0]), 0, 0, training=True)
    moved = gradients(made, total)["balancer.log_variance"]
    assert moved[:2].all()
    assert moved[2] == 0.0


def test_a_teacher_without_an_image_is_not_run_and_moves_nothing(monkeypatch: Any) -> None:
    parts = LossSum({"summary": AngleLoss(), "patches": MSELoss(0.0, 1.0)})
    kinds = [EMAStandardizers(), BatchStandardizers(), FixedStandardizers(8), PHISNormalizers(8)]
    for kind in kinds:
        made = module(normalizers=kind, balancer=InverseLossScale(), loss=copy.deepcopy(parts))
        made.claims = CLAIMS
        seen: list[tuple[str, int]] = []
        run = made.run_teacher
        monkeypatch.setattr(
            made, "run_teacher", lambda n, x, s=seen, r=run: s.append((n, len(x))) or r(n, x)
        )
        before = copy.deepcopy(made.state_dict())
        total, record = made.step(batch([0, 0, 1, 0]), 0, 0, training=True)
        assert seen == [("vit", 3), ("cnn", 1)]
        assert record.images == {"vit": 3, "cnn": 1, "next": 0}
        assert "train/loss/next" not in record.values()
        assert torch.isfinite(total)
        found = gradients(made, total)
        of_next = [g for n, g in found.items() if n.startswith("ladder.projectors.next.")]
        assert of_next
        assert not any(g.any() for g in of_next)
        after = made.state_dict()
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        own = {n for n in moved if ".next." in n}
        assert own <= {"normalizers.next.updates"}  # the schedule goes by the length of the run
        assert any(n.startswith("normalizers.vit.") for n in moved)
        assert made.balancer.seen.tolist() == [True, True, False]


def test_the_hardest_teacher_is_one_of_the_images_own() -> None:
    made = module(dropper=HardestKept(p=1.0, normalize="image"))
    made.claims = CLAIMS
    for seed in range(4):
        total, record = made.step(batch([0, 1, 2, 2], seed=seed), 0, 0, training=True)
        mask = belongs([0, 1, 2, 2])
        assert record.keep.sum(0).tolist() == [1.0] * 4
        assert not record.keep[~mask].any()
        best = torch.where(mask, record.losses, -1.0).argmax(0)
        assert record.keep.argmax(0).tolist() == best.tolist()
    assert torch.isfinite(total)


def test_a_step_of_which_no_teacher_has_an_image_still_has_gradients() -> None:
    made = module(dropper=RandomTeachers(p=1.0))
    made.claims = CLAIMS
    totals = set()
    for step in range(12):
        total, record = made.step(batch([0, 0]), 0, step, training=True)
        gradients(made, total)
        totals.add((record.names, round(total.item(), 6) == 0))
    assert (("next",), True) in totals
    assert (("vit",), False) in totals


def test_losses_get_their_images_shifts_and_labels() -> None:
    made = module(loss=ShiftEquivariantMSE(), teacher_view=1)
    made.claims = CLAIMS
    data = batch(views=2)
    data.view_parameters = torch.zeros(6, 2, 7)
    data.view_parameters[:, 0, 0] = torch.tensor([0.0, 0.5, 0.0, -0.5, 0.25, 0.0])
    total, record = made.step(data, 0, 0, training=True)
    made.claims = None
    _, whole = made.step(data, 0, 0, training=True)
    assert torch.allclose(record.losses, torch.where(belongs(), whole.losses, 0.0), rtol=1e-5)
    assert torch.isfinite(total)
    own = data.take([1, 3], torch.tensor([1, 3]))
    assert (own.keys, own.origins, own.labels.tolist()) == (
        [data.keys[1], data.keys[3]], [1, 2], [1, 3],
    )  # fmt: skip


def test_cached_features_are_read_in_their_rows() -> None:
    made = module()
    data = batch()
    images = data.views[0].float() / 255
    made.claims = CLAIMS
    live, _ = made.step(data, 0, 0, training=True)
    data.cached = {name: made.run_teacher(name, images) for name in NAMES}
    kept, _ = made.step(data, 0, 0, training=True)
    assert kept.item() == pytest.approx(live.item(), rel=1e-5)


def spec(teachers: list[str] | None = None, generic: bool = False) -> DatasetSpec:
    return DatasetSpec("x", teachers=teachers, generic=generic)


def test_policies() -> None:
    sets = {"web": spec(["a"], True), "people": spec(["b"]), "scenes": spec(["b", "c"])}
    assert claims(sets, ["a", "b", "c"], "own") == {"a": {0}, "b": {1, 2}, "c": {2}}
    assert claims(sets, ["a", "b", "c"], "own_and_generic") == {
        "a": {0}, "b": {0, 1, 2}, "c": {0, 2},
    }  # fmt: skip
    assert claims(sets, ["a", "b", "c"], "all") is None
    assert claims({"web": spec(), "more": spec()}, ["a"], None) is None


@pytest.mark.parametrize(
    ("sets", "policy", "words"),
    [
        ({"x": spec(["a"])}, None, "does not say what follows: set it to own, own_and_generic"),
        ({}, "own", "needs data.train to be a mixture"),
        ({"x": spec(["d"])}, "own", "unknown teacher of a data set 'd'"),
        ({"x": spec(["a", "b"]), "y": spec(generic=True)}, "own", "claims the data set 'y'"),
        ({"x": spec(["a", "b"]), "y": spec()}, "own_and_generic", "or make it generic"),
        ({"x": spec(["a"])}, "own", "no data set feeds teacher 'b'"),
        ({"x": spec(["a"])}, "ours", "unknown teacher_data 'ours'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(sets: Any, policy: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        claims(sets, ["a", "b"], policy)
