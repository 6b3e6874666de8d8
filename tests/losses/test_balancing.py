from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.losses.balancing import (
    DynamicWeightAverage,
    FixedWeights,
    InverseLossScale,
    LossBalancer,
    UncertaintyWeights,
)
from multikd.losses.dropping import weigh

NAMES = ("zoe", "abe", "mia")


def bound(balancer: LossBalancer) -> LossBalancer:
    balancer.bind(NAMES)
    return balancer


def kinds() -> list[LossBalancer]:
    return [
        bound(FixedWeights({"abe": 3.0})),
        bound(UncertaintyWeights()),
        bound(DynamicWeightAverage()),
        bound(InverseLossScale()),
    ]


def test_fixed_weights_are_relative() -> None:
    lambdas, regulariser = bound(FixedWeights({"abe": 3.0}))(torch.rand(3), NAMES)
    torch.testing.assert_close(lambdas, torch.tensor([0.6, 1.8, 0.6]))
    assert regulariser.item() == 0
    lambdas, _ = bound(FixedWeights({"abe": 3.0}))(torch.rand(2), ("mia", "abe"))
    torch.testing.assert_close(lambdas, torch.tensor([0.5, 1.5]))
    assert bound(FixedWeights())(torch.rand(3), NAMES)[0].tolist() == [1.0] * 3
    # The only one that ran has weight 0: nothing to learn from, and no division by 0.
    assert bound(FixedWeights({"abe": 0.0}))(torch.rand(1), ["abe"])[0].tolist() == [0.0]


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_uncertainty_is_kendalls_sum_when_nothing_is_dropped(normalize: str) -> None:
    balancer = bound(UncertaintyWeights())
    assert isinstance(balancer, UncertaintyWeights)
    with torch.no_grad():
        balancer.log_variance.copy_(torch.tensor([0.3, -0.5, 1.1]))
    losses = torch.rand(3, 6) + 0.1
    lambdas, regulariser = balancer(losses.mean(1), NAMES)
    total, _ = weigh(losses, torch.ones(3, 6), lambdas, normalize)  # type: ignore[arg-type]
    sigma = np.exp(np.array([0.3, -0.5, 1.1]) / 2)
    expected = (losses.mean(1).numpy() / (2 * sigma**2) + np.log(sigma)).mean()
    assert (total + regulariser).item() == pytest.approx(expected, rel=1e-5)


def test_uncertainty_learns_the_loss_as_its_variance() -> None:
    balancer = bound(UncertaintyWeights())
    losses = torch.tensor([[0.2, 0.4], [2.0, 4.0], [0.01, 0.03]])
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for _ in range(300):
        lambdas, regulariser = balancer(losses.mean(1), NAMES)
        loss = weigh(losses, torch.ones(3, 2), lambdas, "image")[0] + regulariser
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Without the logarithm the variances would grow without end.
    (parameter,) = balancer.parameters()
    torch.testing.assert_close(parameter.exp(), losses.mean(1), rtol=1e-2, atol=1e-3)


def test_uncertainty_gradients() -> None:
    balancer = bound(UncertaintyWeights())
    losses, keep = torch.rand(3, 4).double(), torch.tensor([[1.0, 1, 0, 1]] * 2 + [[1.0] * 4])

    def function(log_variance: Tensor) -> Tensor:
        state = {"log_variance": log_variance}
        lambdas, reg = torch.func.functional_call(balancer, state, (losses.mean(1), NAMES))
        return weigh(losses, keep, lambdas, "image")[0] + reg

    start = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, start)


def test_uncertainty_gives_every_row_a_gradient_path_when_some_teachers_ran() -> None:
    balancer = bound(UncertaintyWeights())
    lambdas, regulariser = balancer(torch.ones(2), ("mia", "zoe"))
    (lambdas.sum() + regulariser).backward()
    (parameter,) = balancer.parameters()
    assert parameter.grad.ne(0).tolist() == [True, False, True]


def test_dynamic_weight_average_follows_the_paper() -> None:
    balancer = bound(DynamicWeightAverage(temperature=2.0))
    epochs = np.random.default_rng(0).random((4, 5, 3)) + 0.5
    means: list[np.ndarray] = []
    for epoch in epochs:
        if len(means) < 2:
            expected = np.ones(3)
        else:
            exponentials = np.exp(means[-1] / means[-2] / 2.0)
            expected = 3 * exponentials / exponentials.sum()
        for losses in epoch:
            lambdas, _ = balancer(torch.tensor(losses, dtype=torch.float32), NAMES)
            np.testing.assert_allclose(lambdas, expected, rtol=1e-5)
        balancer.end_epoch()
        means.append(epoch.mean(0))
    assert abs(expected - 1).max() > 0.01


def test_dynamic_weight_average_with_teachers_that_rest() -> None:
    balancer = bound(DynamicWeightAverage())
    for losses in ([2.0, 1.0], [1.0, 1.0]):
        balancer(torch.tensor(losses), ("mia", "abe"))
        balancer.end_epoch()
    lambdas, _ = balancer(torch.ones(3), NAMES)  # zoe never ran: ratio 1
    ratios = torch.tensor([1.0, 1.0, 0.5])
    torch.testing.assert_close(lambdas, 3 * torch.softmax(ratios / 2, 0))
    lambdas, _ = balancer(torch.ones(2), ("mia", "zoe"))
    torch.testing.assert_close(lambdas, 2 * torch.softmax(ratios[[2, 0]] / 2, 0))


def test_inverse_loss_scale() -> None:
    balancer = bound(InverseLossScale(momentum=0.9))
    data = np.random.default_rng(1).random((6, 3)) * [1, 10, 100] + 0.1
    running = data[0]
    for step, losses in enumerate(data):
        running = running if step == 0 else 0.9 * running + 0.1 * losses
        lambdas, _ = balancer(torch.tensor(losses, dtype=torch.float32), NAMES)
        expected = (1 / running) / (1 / running).mean()
        np.testing.assert_allclose(lambdas, expected, rtol=1e-5)
    assert lambdas[0] > lambdas[1] > lambdas[2]
    lambdas, _ = balancer.eval()(torch.zeros(2), ("mia", "zoe"))  # moves nothing
    expected = (1 / running)[[2, 0]] / (1 / running)[[2, 0]].mean()
    np.testing.assert_allclose(lambdas, expected, rtol=1e-5)


@pytest.mark.parametrize("balancer", kinds(), ids=lambda b: type(b).__name__)
def test_state_survives_checkpoints_half_precision_and_a_nan(balancer: LossBalancer) -> None:
    data = torch.rand(6, 3) + 0.2
    data[1, 0] = torch.nan

    def run(which: LossBalancer, rows: Tensor) -> Tensor:
        for losses in rows:
            lambdas, _ = which(losses, NAMES)
            which.end_epoch()
        return lambdas.detach()

    run(balancer, data[:3])
    fresh = bound(copy.deepcopy(balancer))
    fresh.load_state_dict(balancer.state_dict())
    half = copy.deepcopy(balancer).to(torch.bfloat16)
    expected = run(balancer, data[3:])
    assert torch.isfinite(expected).all()
    assert torch.equal(run(fresh, data[3:]), expected)
    assert torch.equal(run(half, data[3:]), expected)


def test_lambdas_carry_no_gradient_of_the_losses() -> None:
    for balancer in kinds():
        losses = torch.rand(3, requires_grad=True)
        lambdas, regulariser = balancer(losses, NAMES)
        if lambdas.requires_grad:
            (lambdas.sum() + regulariser).backward()
        assert losses.grad is None


def _on_rank(data: Tensor) -> list[Tensor]:
    own = slice(D.rank() * 4, (D.rank() + 1) * 4)
    return [balance(kind, data[..., own]) for kind in kinds()]


def balance(balancer: LossBalancer, data: Tensor) -> Tensor:
    for losses in data:
        lambdas, _ = balancer(losses.mean(1), NAMES)
        balancer.end_epoch()
    return lambdas.detach()


def test_two_ranks_equal_one_process() -> None:
    data = torch.rand(5, 3, 8) * torch.tensor([1.0, 10.0, 0.1]).view(1, 3, 1) + 0.05
    whole = [balance(kind, data) for kind in kinds()]
    for result in run_ranks(_on_rank, 2, data):
        for lambdas, expected in zip(result, whole, strict=True):
            torch.testing.assert_close(lambdas, expected, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="call bind first"):
        InverseLossScale()(torch.rand(1), ["zoe"])
    with pytest.raises(ValueError, match=r"weights 'zoey': did you mean 'zoe'"):
        bound(FixedWeights({"zoey": 1.0}))
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
            DynamicWeightAverage(temperature)
    with pytest.raises(ValueError, match="all teachers have weight 0"):
        bound(FixedWeights(dict.fromkeys(NAMES, 0.0)))
    with pytest.raises(ValueError, match=r"for each of 2 teachers, received \(3,\)"):
        bound(InverseLossScale())(torch.rand(3), ["zoe", "abe"])
    for wrong in (
        lambda: FixedWeights({"zoe": -1.0}),
        lambda: DynamicWeightAverage(0.0),
        lambda: InverseLossScale(1.0),
        lambda: FixedWeights().bind([]),
    ):
        with pytest.raises(ValueError, match="received"):
            wrong()
