from __future__ import annotations

import pytest
import torch
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.functional import hash_unit
from multikd.losses.dropping import (
    HardestKept,
    NoDropping,
    Normalize,
    RandomTeachers,
    TeacherDropper,
    hardest_kept,
    weigh,
)

NAMES = ("zoe", "abe", "mia")


def naive_keep(losses: Tensor, draws: Tensor, p: float) -> Tensor:
    """The published description as a loop over images."""
    keep = torch.zeros_like(losses)
    for image in range(losses.shape[1]):
        hardest = max(range(len(losses)), key=lambda t: losses[t, image].item())
        for teacher in range(len(losses)):
            dropped = teacher != hardest and draws[teacher, image] < p
            keep[teacher, image] = 0.0 if dropped else 1.0
    return keep


def naive_total(losses: Tensor, keep: Tensor, lambdas: Tensor, normalize: Normalize) -> float:
    """Loops over images and teachers; for λ of mean 1."""
    teachers, images = losses.shape
    if normalize == "batch":
        pairs = [(t, b) for t in range(teachers) for b in range(images)]
        weight = {(t, b): float(lambdas[t] * keep[t, b]) for t, b in pairs}
        total = sum(weight[t, b] * float(losses[t, b]) for t, b in pairs if weight[t, b])
        return total / sum(weight.values())
    sums = []
    for b in range(images):
        kept = [t for t in range(teachers) if keep[t, b]]
        weighted = sum(float(lambdas[t] * losses[t, b]) for t in kept)
        sums.append(weighted / sum(float(lambdas[t]) for t in kept))
    return sum(sums) / images


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_hardest_kept_agrees_with_a_loop(p: float) -> None:
    losses, draws = torch.rand(4, 200), torch.rand(4, 200)
    keep = hardest_kept(losses, draws, p)
    assert torch.equal(keep, naive_keep(losses, draws, p))
    assert keep.dtype == torch.float32
    kept_share = (keep.sum().item() - 200) / 600
    assert kept_share == pytest.approx(1 - p, abs=0.06)


def test_a_nan_counts_as_the_hardest() -> None:
    losses = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])
    assert hardest_kept(losses, torch.zeros(2, 2), 0.5).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("normalize", ["image", "batch"])
@pytest.mark.parametrize("relative", [[1.0, 1.0, 1.0], [2.0, 0.75, 0.25], [0.0, 1.5, 1.5]])
def test_weigh_agrees_with_loops(normalize: Normalize, relative: list[float]) -> None:
    losses = torch.rand(3, 20)
    keep = naive_keep(losses, torch.rand(3, 20), 0.5)
    keep[1] = 1.0  # some weight in every image
    lambdas = torch.tensor(relative)
    total, weights = weigh(losses, keep, lambdas, normalize)
    assert total.item() == pytest.approx(naive_total(losses, keep, lambdas, normalize), rel=1e-5)
    torch.testing.assert_close(total, (weights * losses).sum(0).mean())
    assert (weights[keep == 0] == 0).all()
    if normalize == "image":  # each image counts equally
        torch.testing.assert_close(weights.sum(0), torch.ones(20))
    else:  # and here those that keep more teachers count more
        torch.testing.assert_close(weights.sum(0).mean(), torch.ones(()))
        assert weights.sum(0).std() > 0.1


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_a_dropped_nan_reaches_neither_value_nor_gradient(normalize: Normalize) -> None:
    losses = torch.tensor([[1.0, torch.nan, 3.0], [2.0, 5.0, torch.inf]], requires_grad=True)
    keep = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    lambdas = torch.ones(2, requires_grad=True)
    total, weights = weigh(losses, keep, lambdas, normalize)
    assert total.item() == pytest.approx({"image": (1.5 + 5 + 3) / 3, "batch": 11 / 4}[normalize])
    assert torch.isfinite(weights).all()
    total.backward()
    assert torch.isfinite(losses.grad).all()
    assert (losses.grad[keep == 0] == 0).all()
    assert torch.isfinite(lambdas.grad).all()
    # A kept one is seen.
    assert torch.isnan(weigh(losses, torch.ones(2, 3), lambdas, normalize)[0])


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_weigh_gradients(normalize: Normalize) -> None:
    losses = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    lambdas = torch.rand(3, dtype=torch.float64, requires_grad=True)
    keep = naive_keep(losses.detach(), torch.rand(3, 5), 0.5)
    assert torch.autograd.gradcheck(lambda x, y: weigh(x, keep, y, normalize)[0], (losses, lambdas))


def test_images_without_any_weight_are_left_out() -> None:
    losses, keep = torch.rand(2, 3), torch.tensor([[1.0, 1, 1], [0, 1, 1]])
    total, weights = weigh(losses, keep, torch.tensor([0.0, 2.0]), "image")
    assert weights[:, 0].tolist() == [0.0, 0.0]
    assert torch.isfinite(total)


def _weigh_on_rank(losses: Tensor, keep: Tensor, lambdas: Tensor) -> list[tuple[Tensor, Tensor]]:
    half = losses.shape[1] // 2
    own = slice(D.rank() * half, (D.rank() + 1) * half)
    results = []
    for normalize in ("image", "batch"):
        learned = lambdas.clone().requires_grad_()
        total, _ = weigh(losses[:, own], keep[:, own], learned, normalize)
        total.backward()
        # What DDP makes of it: the mean of the ranks' gradients.
        results.append((D.all_reduce_mean(total), D.all_reduce_mean(learned.grad)))
    return results


def test_two_ranks_equal_one_process() -> None:
    losses = torch.rand(3, 12)
    keep = naive_keep(losses, torch.rand(3, 12), 0.7)
    keep[:, :6] = 1.0  # so that the ranks keep different numbers of teachers
    lambdas = torch.tensor([2.0, 0.75, 0.25])
    for result in run_ranks(_weigh_on_rank, 2, losses, keep, lambdas):
        for normalize, (total, gradient) in zip(("image", "batch"), result, strict=True):
            learned = lambdas.clone().requires_grad_()
            expected, _ = weigh(losses, keep, learned, normalize)  # type: ignore[arg-type]
            expected.backward()
            torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gradient, learned.grad, rtol=1e-5, atol=1e-6)


def bound(dropper: TeacherDropper, names: tuple[str, ...] = NAMES) -> TeacherDropper:
    dropper.bind(names)
    return dropper


def test_hardest_kept_draws_by_position_whatever_the_batch_or_the_order_of_teachers() -> None:
    losses, positions = torch.rand(3, 100), torch.randperm(1000)[:100]
    keep = bound(HardestKept(seed=3)).keep(losses, positions, epoch=2)
    draws = torch.tensor(
        [[hash_unit(3, 2, p, sorted(NAMES).index(n)) for p in positions.tolist()] for n in NAMES]
    )
    assert torch.equal(keep, naive_keep(losses, draws, 0.5))
    order = torch.randperm(100)
    shuffled = bound(HardestKept(seed=3)).keep(losses[:, order], positions[order], 2)
    assert torch.equal(shuffled, keep[:, order])
    other = bound(HardestKept(seed=3), ("abe", "mia", "zoe"))
    assert torch.equal(other.keep(losses[[1, 2, 0]], positions, 2), keep[[1, 2, 0]])
    assert torch.equal(other.keep(losses, positions, 2, NAMES), keep)
    for dropper, epoch in ((HardestKept(seed=4), 2), (HardestKept(seed=3), 3)):
        assert not torch.equal(bound(dropper).keep(losses, positions, epoch), keep)


def test_hardest_kept_with_fewer_teachers() -> None:
    dropper = bound(HardestKept())
    positions = torch.arange(4)
    assert dropper.keep(torch.rand(1, 4), positions, 0, ["mia"]).tolist() == [[1.0] * 4]
    with pytest.raises(ValueError, match="1 rows for the 3 teachers"):
        dropper.keep(torch.rand(1, 4), positions, 0)


@pytest.mark.parametrize("dropper", [NoDropping(), HardestKept(p=1.0), RandomTeachers(p=1.0)])
def test_nothing_is_dropped_in_validation(dropper: TeacherDropper) -> None:
    bound(dropper).eval()
    assert dropper.keep(torch.rand(3, 5), torch.arange(5), 0).tolist() == [[1.0] * 5] * 3
    assert all(dropper.select(step) == NAMES for step in range(5))


def test_no_dropping_and_hardest_kept_run_all() -> None:
    for dropper in (NoDropping(), HardestKept()):
        assert bound(dropper).select(3) == NAMES
    assert bound(NoDropping()).keep(torch.rand(3, 2), torch.arange(2), 0).min() == 1
    assert (NoDropping().normalize, HardestKept().normalize) == ("image", "batch")
    assert HardestKept(normalize="image").normalize == "image"


def test_random_teachers() -> None:
    chosen = [bound(RandomTeachers(p=0.6, seed=1)).select(step) for step in range(3000)]
    assert chosen == [bound(RandomTeachers(p=0.6, seed=1)).select(step) for step in range(3000)]
    assert all(names and tuple(n for n in NAMES if n in names) == names for names in chosen)
    # 0.4 each, and a third of the 0.6³ of steps in which nobody would be left.
    for name in NAMES:
        share = sum(name in names for names in chosen) / len(chosen)
        assert share == pytest.approx(0.4 + 0.6**3 / 3, abs=0.03)
    assert {len(bound(RandomTeachers(p=1.0)).select(s)) for s in range(20)} == {1}
    assert {bound(RandomTeachers(p=0.0)).select(s) for s in range(20)} == {NAMES}
    assert chosen != [bound(RandomTeachers(p=0.6, seed=2)).select(step) for step in range(3000)]


def test_mistakes_are_named() -> None:
    for wrong in (lambda: HardestKept(p=1.5), lambda: RandomTeachers(p=-0.1)):
        with pytest.raises(ValueError, match=r"probability in \[0, 1\], received"):
            wrong()
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        HardestKept(normalize="bach")  # type: ignore[arg-type]
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="did you mean 'image'"):
        weigh(ones, ones, torch.ones(2), "images")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"received \(2, 3\), \(2, 3\) and \(3,\)"):
        weigh(ones, ones, torch.ones(3))


def test_dropping_and_weighing_compile_into_one_graph() -> None:
    dropper = bound(HardestKept())
    losses, positions = torch.rand(3, 8), torch.arange(8)

    def step(losses: Tensor, positions: Tensor) -> Tensor:
        keep = dropper.keep(losses, positions, 0, NAMES)
        return weigh(losses, keep, losses.new_ones(3), "batch")[0]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(losses, positions), step(losses, positions))


@pytest.mark.parametrize("normalize", ["image", "batch", "teacher"])
def test_a_nan_of_a_teacher_that_weighs_nothing_stays_out(normalize: Normalize) -> None:
    losses = torch.tensor([[1.0, 3.0], [float("nan"), float("nan")]])
    total, _ = weigh(losses, torch.ones(2, 2), torch.tensor([2.0, 0.0]), normalize)
    assert total.item() == pytest.approx(2.0)
