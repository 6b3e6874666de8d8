"""What makes steps quick: no waiting for the device, one graph, one resize, a fused optimiser."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from helpers import training as small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multikd.fit import OwnArguments
from multikd.losses import FeatureLoss, HardestKept, InverseLossScale, UncertaintyWeights
from multikd.normalizers import EMAStandardizers, PHISNormalizers
from multikd.optim import fuse, parameter_groups
from multikd.performance import product_error, tune_process
from multikd.projectors import MLPProjectors
from multikd.teachers.resized import resized, shared_sizes
from multikd.types import Batch, Grid

# What makes the host wait for an accelerator's queue.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Counts the operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits() -> None:
    with Waits() as waits:
        x = torch.ones(3)
        x.sum().item()
        x.nonzero()
        bool(x[0] > 0)
    assert waits.found["_local_scalar_dense"] == 2
    assert waits.found["nonzero"] == 1


class AsOnAnAccelerator(pl.Callback):
    """Counts waits from the start of each batch to its end."""

    def __init__(self) -> None:
        self.waits: list[Waits] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.waits.append(Waits())
        self.waits[-1].__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.waits[-1].__exit__(None, None, None)


@pytest.mark.parametrize(
    ("balancer", "normalizers"),
    [(UncertaintyWeights, EMAStandardizers), (InverseLossScale, PHISNormalizers)],
)
def test_a_step_waits_for_nothing_between_logging_intervals(
    balancer: Any, normalizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On CPUs, where nothing waits, the ladder looks for rows without a gradient.
    monkeypatch.setattr("multikd.mlp_sums._used", lambda gradient: None)
    module = small.module(
        dropper=HardestKept(),
        balancer=balancer(),
        normalizers=normalizers(),
        projectors=MLPProjectors(8, 16),
        ema_decay=0.9,
    )
    if normalizers is PHISNormalizers:
        for name in module.teacher_names:
            module.normalizer(name).images = 1  # type: ignore[assignment]
    counter = AsOnAnAccelerator()
    runner = small.trainer(tmp_path, counter, max_epochs=1, log_every_n_steps=100)
    runner.fit(module, datamodule=small.Data([small.batch(seed=i) for i in range(3)]))
    assert len(counter.waits) == 3
    # The first batch makes the optimiser's state; statistics that are measured wait while they are.
    for waits in counter.waits[2:]:
        assert waits.calls > 500
        assert not waits.found


def test_student_ladder_and_losses_are_one_graph() -> None:
    module = small.module(
        teachers=small.teachers(1), projectors=MLPProjectors(8, 16), loss=FeatureLoss()
    ).train()
    data = small.batch()
    images = data.views[0].float() / 255
    targets = {
        n: f.map(torch.randn_like)
        for n, f in module.targets(data, images, 0, module.teacher_names).items()
    }
    grids: dict[str, Grid | None] = {n: module.target_grid(n, (32, 32)) for n in targets}
    from multikd.modules.distillation import on_grid

    wanted = {n: on_grid(f.map(torch.Tensor.float), grids[n]) for n, f in targets.items()}

    def losses(images: Tensor) -> Tensor:
        predictions = module.ladder(module.student(images).rungs, grids)
        return torch.stack([module.losses[n](predictions[n], wanted[n], None) for n in wanted])

    compiled = torch.compile(losses, backend="eager", fullgraph=True)  # raises at a break
    ours, theirs = losses(images), compiled(images)
    torch.testing.assert_close(ours, theirs)
    parameters = [p for p in module.ladder.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters),
        torch.autograd.grad(theirs.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_teachers_of_one_size_share_the_resized_images() -> None:
    module, data = small.module(), small.batch()
    images = data.views[0].float() / 255
    alone = {n: module.run_teacher(n, images) for n in module.teacher_names}
    with patch(
        "multikd.teachers.resized.functional.interpolate", wraps=nn.functional.interpolate
    ) as calls:
        together = module.targets(data, images, 0, module.teacher_names)
        assert calls.call_count == 2  # 48 px, and 64 px for two of the three
        calls.reset_mock()
        with shared_sizes():
            first = resized(images, (40, 40))
            assert resized(images, (40, 40)) is first
            assert resized(images.clone(), (40, 40)) is not first
            assert resized(images, (32, 32)) is images
        assert resized(images, (40, 40)) is not first
        assert calls.call_count == 3
    for name, features in alone.items():
        torch.testing.assert_close(together[name].summary, features.summary)


def test_adam_is_fused_unless_told_otherwise_and_gives_the_same_steps() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    results = []
    for fused in (True, False):
        layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        layers.load_state_dict(start.state_dict())
        optimizer = torch.optim.AdamW(parameter_groups(layers.named_parameters()), lr=0.01)
        assert not fused or fuse(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            layers(torch.full((2, 5), 0.1 * step + 0.1)).square().sum().backward()
            optimizer.step()
        results.append([p.detach() for p in layers.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    groups = parameter_groups(start.named_parameters())
    for told in (
        torch.optim.AdamW(groups, foreach=True),
        torch.optim.AdamW(groups, fused=False),
        torch.optim.SGD(groups, lr=0.1),
        torch.optim.AdamW([torch.zeros(3, device="meta").requires_grad_()]),
    ):
        assert not fuse(told)


def test_settings_of_the_process_are_taken_out_of_the_arguments(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = OwnArguments.taken_from(
        ["fit", "--allocator=default", "--float32_products", "medium", "--a=1"]
    )
    assert (own.allocator, own.float32_products, own.rest) == (
        "default",
        "medium",
        ["fit", "--a=1"],
    )
    assert OwnArguments.taken_from(["fit"]).allocator == "keep"
    for wrong in ("--allocator=jemalloc", "--float32_products=low", "--allocator"):
        with pytest.raises(ValueError, match="must be one of"):
            OwnArguments.taken_from(["fit", wrong])
    before = torch.get_float32_matmul_precision()
    try:
        with caplog.at_level("INFO"):
            tune_process("default", None)
            assert not caplog.text
            tune_process("default", "highest")
        assert "relative error" in caplog.text
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert 0 < product_error(128) < 1e-5


def test_a_batch_is_not_changed_by_a_step() -> None:
    module = small.module(projectors=MLPProjectors(8, 16)).train()
    for name in module.teacher_names:
        module.normalizer(name).set_total_steps(10)
    data: Batch = small.batch()
    before = data.views[0].clone()
    module.step(data, 0, 0, training=True)
    assert torch.equal(data.views[0], before)
