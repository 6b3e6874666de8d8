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


class Clock:
    """Every look is a second later, so that no load of the machine changes a number."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("multikd.callbacks.throughput.time", clock)
    return clock


def test_a_slow_loader_is_seen(tmp_path: Path) -> None:
    """On the real clock, and by bounds that hold however slow the machine is."""
    slow, quick = logged(tmp_path, 0.2, log_every_n_steps=2), logged(tmp_path, 0.0)
    rates = slow.values("train/images_per_second")
    assert len(rates) == 2  # three intervals, of which the first is left out
    assert all(0 < rate <= 6 / 0.2 for rate in rates)
    waits = slow.values("train/data_wait")
    assert all(wait * 12 / rate >= 2 * 0.2 - 1e-3 for wait, rate in zip(waits, rates, strict=True))
    assert all(0.0 <= wait <= 1.0 for wait in waits + quick.values("train/data_wait"))
    assert len(quick.values("train/images_per_second")) == 5


def test_the_numbers_by_a_clock_of_our_own(tmp_path: Path, clock: Clock) -> None:
    """Each look at the clock is a second later: three looks a step, one of them a wait."""
    memory = logged(tmp_path, 0.0, log_every_n_steps=2)
    # An interval of two steps: reset; wait, end; wait, end. Six images a step.
    assert memory.values("train/images_per_second") == [pytest.approx(12 / 4)] * 2
    assert memory.values("train/data_wait") == [pytest.approx(2 / 4)] * 2


def test_the_pause_between_epochs_does_not_count(tmp_path: Path, clock: Clock) -> None:
    memory = small.Memory()
    runner = small.trainer(
        tmp_path, Throughput(), Pause(clock), logger=memory, max_epochs=3, log_every_n_steps=2
    )
    data = small.Data([small.batch()] * 2)
    runner.fit(small.module(teachers=small.teachers(1)), datamodule=data)
    assert memory.values("train/images_per_second") == [pytest.approx(12 / 4)] * 2


class Pause(small.Notes):
    """A thousand seconds of validation after every epoch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_train_epoch_end(self, *_: object) -> None:
        self.clock.now += 1000.0
