"""A share of the patches in the patch loss: unbiased, cheaper, and refused where it can't be."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from helpers import training as small
from torch import Tensor, nn

from multikd.losses import FeatureLoss, GramLoss, HardestKept, LossSum, MSELoss
from multikd.modules import DistillationModule, patch_sampling
from multikd.modules import distillation as under_test
from multikd.normalizers import EMAStandardizers
from multikd.projectors import LinearProjectors, MLPProjectors, TransformerProjectors


def made(**settings: Any) -> DistillationModule:
    normalizers = EMAStandardizers(total_steps=10)
    return small.module(target_grid="student", normalizers=normalizers, **settings).train()


def gradients(module: DistillationModule) -> tuple[Tensor, list[Tensor]]:
    module.zero_grad()
    total, _ = module.step(small.batch(), 0, 0, training=True)
    total.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return total.detach(), found


@pytest.mark.parametrize("projectors", [LinearProjectors(), MLPProjectors(16, 16)])
@pytest.mark.parametrize(
    "loss", [FeatureLoss(), LossSum({"a": FeatureLoss(), "b": MSELoss()}, {"b": 0.5})]
)
def test_the_mean_over_samples_is_the_whole_exactly(
    projectors: Any, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that together are every patch once: their mean loss and gradient are the whole's."""
    torch.manual_seed(0)
    whole = made(projectors=projectors, loss=loss)
    share = made(projectors=projectors, loss=loss, patch_share=0.5)
    state = copy.deepcopy(whole.state_dict())
    expected, wanted = gradients(whole)
    orders: dict[tuple[int, int], Tensor] = {}
    halves = []
    for half in range(2):

        class Half(patch_sampling.PatchSample):
            def __init__(
                self, share: float, grids: Any, images: int, device: Any, half: int = half
            ) -> None:
                super().__init__(share, grids, images, device)
                for grid in self.places:
                    count = grid[0] * grid[1]
                    order = orders.setdefault(grid, torch.rand(images, count).argsort(1))
                    self.places[grid] = order.chunk(2, dim=1)[half]

        monkeypatch.setattr(under_test, "PatchSample", Half)
        share.load_state_dict(state)
        halves.append(gradients(share))
    assert orders, "nothing was sampled"
    assert all(count[0] * count[1] % 2 == 0 for count in orders)
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, expected)
    for a, b, full in zip(halves[0][1], halves[1][1], wanted, strict=True):
        torch.testing.assert_close((a + b) / 2, full, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(halves[0][0], halves[1][0], rtol=1e-6, atol=0)


def test_fewer_tokens_reach_the_ladder_and_all_of_them_in_validation() -> None:
    module = made(patch_share=0.25, dropper=HardestKept(0.5))
    seen: list[int] = []
    projectors = cast(nn.ModuleDict, module.ladder.projectors["vit"])
    for projector in projectors.values():
        cast(nn.Module, projector.patches).register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape[1])
        )
    count = 4  # 2 × 2 patches of the student
    module.step(small.batch(), 0, 0, training=True)
    assert set(seen) == {1}
    seen.clear()
    module.step(small.batch(), 0, 0, training=False)
    assert set(seen) == {count}


def test_the_same_seed_samples_the_same() -> None:
    module = made(patch_share=0.5)
    state = copy.deepcopy(module.state_dict())

    def once(seed: int) -> Tensor:
        module.load_state_dict(state)
        torch.manual_seed(seed)
        return gradients(module)[0]

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_share": 0.0}, "above 0 and at most 1"),
        ({"patch_share": 0.5, "loss": GramLoss()}, "no mean over them"),
        ({"patch_share": 0.5, "loss": FeatureLoss(whole_map=True)}, "no mean over them"),
        ({"patch_share": 0.5, "projectors": TransformerProjectors()}, "mix patches"),
    ],
)
def test_where_it_would_be_another_loss_it_is_refused(settings: Any, words: str) -> None:
    teachers = {"vit": small.teachers()["vit"]}
    with pytest.raises(ValueError, match=words):
        small.module(teachers=teachers, **settings)
