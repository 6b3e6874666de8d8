"""Training on a cache that kept only some patches: the prediction is compared at those."""

from __future__ import annotations

import pytest
import torch
from helpers import training as small

from multikd.normalizers import NoNormalizers
from multikd.types import TokenFeatures


def test_all_patches_in_another_order_give_the_same_loss() -> None:
    module = small.module(normalizers=NoNormalizers(), target_grid="teacher")
    batch = small.batch()
    whole, _ = module.step(batch, 0, 0, training=True)
    images = batch.views[0].float() / 255
    batch.cached = {}
    generator = torch.Generator().manual_seed(0)
    for name in module.teacher_names:
        found = module.run_teacher(name, images)
        assert found.patches is not None
        count = found.patches.shape[1]
        places = torch.stack(
            [torch.randperm(count, generator=generator) for _ in range(len(batch))]
        )
        index = places.unsqueeze(2).expand(-1, -1, found.patches.shape[2])
        batch.cached[name] = TokenFeatures(
            found.summary, found.patches.gather(1, index), None,
            places=places, places_grid=found.grid,
        )  # fmt: skip
    sampled, _ = module.step(batch, 0, 0, training=True)
    assert sampled.item() == pytest.approx(whole.item(), rel=1e-5)
    # Half of them are another loss, and train the same student.
    for features in batch.cached.values():
        assert features.patches is not None
        assert features.places is not None
        kept = max(1, features.patches.shape[1] // 2)
        features.patches, features.places = features.patches[:, :kept], features.places[:, :kept]
    half, _ = module.step(batch, 0, 0, training=True)
    assert half.item() != pytest.approx(whole.item(), rel=1e-6)
    torch.autograd.backward(half)
    assert all(p.grad is not None for p in module.ladder.parameters())
