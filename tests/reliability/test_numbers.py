"""Steps that are not finite: skipped on all ranks, as if they had not been; spikes; memory."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint

import multikd
from multikd.callbacks import (
    FiniteLossGuard,
    LossSpikes,
    NonFiniteLossError,
    StallWatch,
    Throughput,
)
from multikd.fit_faults import LostRankError, OutOfMemoryError, explained
from multikd.losses import DynamicWeightAverage, InverseLossScale
from multikd.modules import DistillationModule
from multikd.normalizers import EMAStandardizers
from multikd.saving import newest_whole, steps_in
from multikd.types import Batch


class Break(pl.Callback):
    """Makes a batch of one rank not finite: a teacher's features, or the gradient alone."""

    def __init__(self, what: str, steps: tuple[int, ...], rank: int = 0) -> None:
        self.what, self.steps, self.rank = what, steps, rank
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        self.batches += 1
        here = trainer.global_rank == self.rank and trainer.global_step in self.steps
        if self.what == "teacher":
            original = type(module).targets

            def targets(*args: Any) -> Any:
                found = original(module, *args)
                if here:
                    found["cnn"].summary[1, 3] = float("nan")
                return found

            module.targets = targets

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        here = trainer.global_rank == self.rank and trainer.global_step in self.steps
        if self.what == "gradient" and here:
            next(module.ladder.parameters()).grad.view(-1)[0] = float("inf")


class Bypass(pl.Callback):
    """What a skipped step must be like: everything is put back by hand, at the end of the step."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.kept: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        self.step = trainer.global_step
        if self.step in self.steps and index % trainer.accumulate_grad_batches == 0:
            self.kept = {k: v.clone() for k, v in module.state_dict().items()}
            (optimizer,) = trainer.optimizers
            self.optimizer = {
                p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()
            }

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.step in self.steps and trainer.global_step != self.step:
            module.load_state_dict(self.kept)
            (optimizer,) = trainer.optimizers
            for parameter, state in self.optimizer.items():
                for name, value in state.items():
                    optimizer.state[parameter][name].copy_(value)


def module() -> DistillationModule:
    return small.module(
        teachers=small.teachers(2),
        student=small.student("test_resnet", 32),  # batch norms, too
        balancer=InverseLossScale(),
        normalizers=EMAStandardizers(),
        ema_decay=0.9,
    )


def fit(
    folder: Path, *callbacks: pl.Callback, make: Any = small.trainer, **settings: Any
) -> tuple[small.Notes, DistillationModule]:
    notes, model = small.Notes(), module()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    data = small.Data([small.batch(seed=10 * s + rank) for s in range(6)])
    make(folder, *callbacks, notes, **settings).fit(model, datamodule=data)
    return notes, model


@pytest.mark.parametrize("what", ["teacher", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_has_not_been(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, accumulate: int
) -> None:
    guard, steps = FiniteLossGuard(), (1,)
    settings = {"accumulate_grad_batches": accumulate}
    _, skipped = fit(tmp_path, Break(what, steps), guard, **settings)
    _, expected = fit(tmp_path, Bypass(steps), **settings)
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    for key, value in expected.state_dict().items():
        assert torch.equal(value, skipped.state_dict()[key]), key
    (record,) = [r for r in caplog.records if "is skipped on all ranks" in r.getMessage()]
    if what == "teacher":
        assert "teacher 'cnn' at step 1, images image-" in record.getMessage()
        assert "'vit'" not in record.getMessage()
    else:
        assert "the gradient at step 1 (each loss is finite)" in record.getMessage()


def test_an_epoch_that_begins_with_a_skipped_step(tmp_path: Path) -> None:
    """The balancer hears of the new epoch all the same."""
    model = small.module(teachers=small.teachers(2), balancer=DynamicWeightAverage())
    data = small.Data([small.batch(seed=s) for s in range(3)])
    runner = small.trainer(tmp_path, Break("teacher", (3,)), FiniteLossGuard(), max_epochs=2)
    runner.fit(model, datamodule=data)
    assert isinstance(model.balancer, DynamicWeightAverage)
    assert (model.balancer.last > 0).all()
    assert model.balancer.count.tolist() == [2.0, 2.0]


def test_some_in_a_row_stop_the_run(tmp_path: Path) -> None:
    guard = FiniteLossGuard(max_in_a_row=2)
    breaks = Break("teacher", (1, 3, 4, 5))
    with pytest.raises(NonFiniteLossError, match="teacher 'cnn' at step 4.*2 steps in a row"):
        fit(tmp_path, breaks, guard)
    assert guard.skipped == 3
    again = FiniteLossGuard()
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.in_a_row) == (3, 2)


class Keep(pl.Callback):
    """Saves at the end, and keeps what the callback before it put in."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        self.kept = checkpoint["callbacks"]["LossSpikes"]


def on_two(folder: Path) -> dict[str, Any]:
    guard, spikes, keep = FiniteLossGuard(max_in_a_row=2), LossSpikes(window=10), Keep()
    broken = Break("teacher", (2,), rank=1)
    _, model = fit(folder, broken, guard, spikes, keep, make=small.ddp_trainer)
    own = list(spikes._recent)
    spikes.spikes = 3
    spikes.load_state_dict(keep.kept)
    again = (spikes.spikes, list(spikes._recent))
    alone = {"ranks": [{"spikes": n, "recent": [n, n + 0.5]} for n in (1, 2, 3)]}
    spikes.load_state_dict(alone)  # of another number of ranks
    pooled = (spikes.spikes, list(spikes._recent))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    lost = ""
    try:
        fit(folder, Break("gradient", (1, 2), rank=1), guard, make=small.ddp_trainer)
    except NonFiniteLossError as error:
        lost = str(error)
    kept = {"kept": keep.kept, "own": own, "again": again, "pooled": pooled}
    return {"skipped": guard.skipped, "state": state, "lost": lost, **kept}


def test_all_ranks_skip_together(tmp_path: Path) -> None:
    first, second = run_ranks(on_two, 2, tmp_path, timeout=150)
    assert first["skipped"] == second["skipped"] == 3
    assert first["lost"] == second["lost"]
    assert "the gradient at step 2" in first["lost"]
    for key, value in first["state"].items():
        assert torch.isfinite(value).all(), key
        if not key.split(".")[-1].startswith(("running_", "num_batches")):  # a rank's own
            assert torch.equal(value, second["state"][key]), key
    # Each rank's own recent losses are in the one checkpoint, and come back to it.
    assert first["kept"] == second["kept"]
    assert [one["recent"] for one in first["kept"]["ranks"]] == [first["own"], second["own"]]
    assert first["own"] != second["own"]
    assert [rank["again"] for rank in (first, second)] == [(0, first["own"]), (0, second["own"])]
    pooled = [1, 2, 3, 1.5, 2.5, 3.5]
    assert [rank["pooled"] for rank in (first, second)] == [(6, pooled), (0, pooled)]


def test_spikes_are_noted_with_their_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spikes = LossSpikes(window=20)
    spikes._folder = tmp_path
    generator = torch.Generator().manual_seed(0)
    values = (1.0 + 0.05 * torch.randn(60, generator=generator)).tolist()
    values[4] = 50.0  # too early: nothing to compare with
    values[30], values[31], values[45] = 3.0, float("nan"), 2.5
    for number, value in enumerate(values):
        record = SimpleNamespace(
            total=torch.tensor(value),
            losses=torch.tensor([[value], [value / 2]]),
            names=("a", "b"),
            keys=[f"key-{number}"],
        )
        model = SimpleNamespace(last_records=(record,), device=torch.device("cpu"))
        trainer = SimpleNamespace(current_epoch=1, global_rank=0)
        spikes.on_train_batch_end(trainer, model, None, None, number)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (tmp_path / "spikes.0.jsonl").read_text().splitlines()]
    assert [row["keys"] for row in rows] == [["key-30"], ["key-45"]]
    assert rows[0]["teachers"] == pytest.approx({"a": 3.0, "b": 1.5})
    (said,) = [r.getMessage() for r in caplog.records]  # the first, then the 10th
    assert "batch 30 of epoch 1" in said
    assert "key-30" in said
    other = LossSpikes(window=20)
    other.load_state_dict(spikes.state_dict())
    assert other.limit() == spikes.limit()
    with pytest.raises(ValueError, match="window at least 10"):
        LossSpikes(window=3)


def test_a_clock_that_jumps_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By years, forwards and back, at every look at it; a second's patience is by another clock."""
    expected, _ = fit(tmp_path)
    jumps = itertools.cycle((4e9, 0.0, 2e9, -1e9))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    saver = ModelCheckpoint(
        tmp_path, every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    watch = StallWatch(minutes=60.0)
    notes, _ = fit(tmp_path, saver, watch, Throughput(), enable_checkpointing=True)
    assert notes.totals == expected.totals
    assert notes.keys == expected.keys
    for path, when in zip(sorted(tmp_path.glob("*.ckpt")), (3e9, 1e9), strict=True):
        os.utime(path, (when, when))
    found = newest_whole(tmp_path.glob("*.ckpt"), [].append)
    assert found is not None
    assert found.step == 6
    assert max(tmp_path.glob("*.ckpt"), key=steps_in) == found.path


def test_nothing_asks_the_clock_but_what_dates_a_report() -> None:
    """Waits, time-outs and choices of files go by the monotonic clock or by steps."""
    for path in Path(multikd.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        asks = re.search(r"\btime\.time\(|\bdate(time)?\.(now|today)\(", text)
        assert asks is None or path.parent.name in ("retention", "ablation"), path


def test_faults_of_machines_in_one_sentence(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=2, global_step=7, precision="32-true", world_size=2, global_rank=1
    )
    model, data = module(), SimpleNamespace(batch_size=64, num_workers=4, prefetch_factor=2)

    def said(error: BaseException) -> Any:
        return explained(error, trainer, model, data)

    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        memory = said(error)
    assert isinstance(memory, OutOfMemoryError)
    for words in (
        "step 7",
        "data.batch_size (now 64)",
        "trainer.accumulate_grad_batches (now 2)",
        "model.student.grad_checkpointing=true",
        "precision=bf16-mixed",
    ):
        assert words in str(memory)
    assert isinstance(said(torch.OutOfMemoryError("CUDA out of memory.")), OutOfMemoryError)
    assert isinstance(said(MemoryError()), OutOfMemoryError)
    worker = said(RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."))
    assert "data.num_workers (now 4)" in str(worker)
    lost = said(RuntimeError("[gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:1"))
    assert isinstance(lost, LostRankError)
    assert lost.exit_code == 75
    assert "rank 1 of 2 stopped after step 7" in str(lost)
    trainer.world_size = 1
    assert said(RuntimeError("Broken pipe")) is None
    assert said(RuntimeError("some error of a user's own class")) is None
