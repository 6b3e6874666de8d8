"""FiniteLossGuard: a NaN stops all ranks, is named, and leaves the last checkpoint alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

from multikd.callbacks import FiniteLossGuard, NonFiniteLossError
from multikd.losses import LabelLoss
from multikd.modules import DistillationModule, StepRecord
from multikd.types import Batch, TokenFeatures


def broken_teacher(module: DistillationModule, name: str, key: str) -> None:
    """Let ``name`` give a NaN for the image of this key."""
    original = module.targets

    def targets(
        batch: Batch, images: Any, view: int, names: Any, allotment: Any = None
    ) -> dict[str, TokenFeatures]:
        found = original(batch, images, view, names, allotment)
        if key in batch.keys and name in found:
            summary = found[name].summary
            assert summary is not None
            summary[batch.keys.index(key), 3] = float("nan")
        return found

    module.targets = targets  # type: ignore[method-assign]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


class BreaksAt(small.Notes):
    """Breaks a teacher at the first batch of an epoch, and notes the checkpoints of that moment."""

    def __init__(self, folder: Path, epoch: int) -> None:
        super().__init__()
        self.folder, self.epoch = folder, epoch
        self.before: dict[str, str] = {}

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.before = digests(self.folder)
            broken_teacher(module, "cnn", "image-1-4")


def test_it_names_teacher_and_image_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "checkpoints"
    breaks = BreaksAt(out, epoch=2)
    saver = ModelCheckpoint(out, "{epoch}", save_top_k=-1, save_last=True)
    module = small.module()
    runner = small.trainer(
        tmp_path,
        breaks,
        FiniteLossGuard(max_in_a_row=1),
        saver,
        max_epochs=4,
        enable_checkpointing=True,
    )
    data = small.Data([small.batch(seed=s) for s in range(3)])
    with pytest.raises(NonFiniteLossError) as stopped:
        runner.fit(module, datamodule=data)
    text = str(stopped.value)
    assert "teacher 'cnn' at step 7, images image-1-4." in text  # the second batch of epoch 2
    assert "'vit'" not in text
    assert len(breaks.losses) == 7  # and that step was not taken
    assert set(breaks.before) == {"epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"}
    assert digests(out) == breaks.before
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    for parameter in module.parameters():
        assert torch.isfinite(parameter).all()  # the optimiser has not used it


def test_a_term_is_named(tmp_path: Path) -> None:
    class Broken(LabelLoss):
        def forward(self, *args: Any) -> torch.Tensor:
            values = super().forward(*args)
            return torch.where(torch.arange(len(values)) == 1, float("inf"), values)

    module = small.module({"num_classes": 10}, terms={"labels": Broken()})
    with pytest.raises(NonFiniteLossError, match="term 'labels' at step 0, images image-0-1"):
        small.trainer(tmp_path, FiniteLossGuard(max_in_a_row=1)).fit(
            module, datamodule=small.Data([small.batch()])
        )


def record(bad: bool, step: int = 0, total: float = 1.0) -> StepRecord:
    losses = torch.ones(2, 7)
    if bad:
        losses[1] = float("nan")
    return StepRecord(
        names=("a", "b"),
        losses=losses,
        keep=torch.ones(2, 7),
        lambdas=torch.ones(2),
        total=torch.tensor(total),
        terms={},
        keys=[f"{step}-{i}" for i in range(7)],
        norms={},
    )


class Steps:
    """What the guard asks of trainer and module, on an accelerator that is not here."""

    def __init__(self, guard: FiniteLossGuard) -> None:
        self.guard = guard
        self.device = SimpleNamespace(type="cuda")
        self.step = -1

    def take(self, *bad: bool) -> None:
        self.step += 1
        module = SimpleNamespace(
            device=self.device, last_records=tuple(record(b, self.step) for b in bad)
        )
        self.guard.on_after_backward(SimpleNamespace(global_step=self.step), module)  # type: ignore[arg-type]

    def save(self) -> None:
        module = SimpleNamespace(device=torch.device("cpu"))
        self.guard.on_save_checkpoint(None, module, {})  # type: ignore[arg-type]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were pending at each look."""
    looks: list[int] = []
    original = FiniteLossGuard.check

    def check(self: FiniteLossGuard, device: torch.device) -> None:
        looks.append(len(self._pending))
        original(self, torch.device("cpu"))

    monkeypatch.setattr(FiniteLossGuard, "check", check)
    return looks


def test_on_an_accelerator_it_looks_every_n_steps_and_names_the_first(checked: list[int]) -> None:
    steps = Steps(FiniteLossGuard(every_n_steps=3, max_in_a_row=1))
    for _ in range(5):
        steps.take(False)
    assert checked == [3]
    with pytest.raises(NonFiniteLossError) as stopped:
        steps.take(True)
    assert "teacher 'b' at step 5, images 5-0, 5-1, 5-2, 5-3, 5-4 and 2 more" in str(stopped.value)
    assert checked == [3, 3]
    steps.take(False, True)  # the second of two views
    steps.take(True)
    with pytest.raises(NonFiniteLossError, match="at step 6"):
        steps.save()
    steps.save()  # nothing is left of it
    assert checked == [3, 3, 3]


def test_an_infinite_sum_of_finite_losses(checked: list[int]) -> None:
    guard = FiniteLossGuard(max_in_a_row=1)
    guard._pending = [(4, record(False, total=float("inf")))]
    with pytest.raises(NonFiniteLossError, match="the weighted sum at step 4 .each teacher's loss"):
        guard.check(torch.device("cpu"))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more"):
        FiniteLossGuard(0)


def one_rank_breaks(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    module = small.module()
    if rank == 1:
        broken_teacher(module, "next", "image-11-2")
    data = small.Data([small.batch(seed=10 * rank + s) for s in range(3)])
    out = folder / "checkpoints"
    saver = ModelCheckpoint(out, save_last=True, every_n_train_steps=1)
    runner = small.ddp_trainer(
        folder, FiniteLossGuard(max_in_a_row=1), saver, enable_checkpointing=True
    )
    try:
        runner.fit(module, datamodule=data)
    except NonFiniteLossError as error:
        steps = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
        return {"text": str(error), "step": runner.global_step, "saved": steps}
    return {}


def test_on_two_ranks_both_stop_with_the_same_words(tmp_path: Path) -> None:
    first, second = run_ranks(one_rank_breaks, 2, tmp_path, timeout=60)
    assert first == second
    assert "teacher 'next' at step 1, images image-11-2." in first["text"]
    assert (first["step"], first["saved"]) == (1, 1)
