"""Throughput: images per second and the share of time that the step waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import training as small

from multikd.callbacks import Throughput
from multikd.types import Batch


class SlowData(small.Data):
    """Every batch takes its time."""

    def __init__(self, wait: float, count: int) -> None:
        super().__init__([small.batch()] * count)
        self.wait = wait

    def train_dataloader(self) -> small.Batches:
        return Slow(self.wait, *self.train)


class Slow(small.Batches):
    def __init__(self, wait: float, *batches: Batch) -> None:
        super().__init__(*batches)
        self.wait = wait

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            time.sleep(self.wait)
            yield batch


def logged(folder: Path, wait: float, **settings: int) -> small.Memory:
    memory = small.Memory()
    runner = small.trainer(folder, Throughput(), logger=memory, **settings)
    runner.fit(small.module(teachers=small.teachers(1)), datamodule=SlowData(wait, 6))
    return memory


def test_a_slow_loader_is_seen(tmp_path: Path) -> None:
    slow, quick = logged(tmp_path, 0.2, log_every_n_steps=2), logged(tmp_path, 0.0)
    rates = slow.values("train/images_per_second")
    assert len(rates) == 2  # three intervals, of which the first is left out
    assert all(rate <= 6 / 0.2 for rate in rates)
    waits = slow.values("train/data_wait")
    assert all(0.3 < wait < 1.0 for wait in waits)
    assert all(0.0 <= wait < 0.3 for wait in quick.values("train/data_wait"))
    assert len(quick.values("train/images_per_second")) == 5


def test_the_numbers_by_a_clock_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later: three looks a step, one of them a wait."""
    now = iter(range(10_000))
    monkeypatch.setattr(
        "multikd.callbacks.throughput.time", type("Clock", (), {"perf_counter": lambda: next(now)})
    )
    memory = logged(tmp_path, 0.0, log_every_n_steps=2)
    # An interval of two steps: reset; wait, end; wait, end. Six images a step.
    assert memory.values("train/images_per_second") == [pytest.approx(12 / 4)] * 2
    assert memory.values("train/data_wait") == [pytest.approx(2 / 4)] * 2


def test_the_pause_between_epochs_does_not_count(tmp_path: Path) -> None:
    memory = small.Memory()
    runner = small.trainer(
        tmp_path, Throughput(), Pause(), logger=memory, max_epochs=3, log_every_n_steps=2
    )
    data = small.Data([small.batch()] * 2)
    runner.fit(small.module(teachers=small.teachers(1)), datamodule=data)
    assert len(memory.values("train/images_per_second")) == 2
    assert all(rate > 12 / 0.5 for rate in memory.values("train/images_per_second"))


class Pause(small.Notes):
    def on_train_epoch_end(self, *_: object) -> None:
        time.sleep(0.5)
