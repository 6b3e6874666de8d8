"""Streams of teachers, on a device that keeps account of what happened before what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import training as small
from torch import Tensor, nn

from multikd.teachers.resized import shared_sizes
from multikd.teachers.streams import TeacherStreams
from multikd.types import TokenFeatures


class Stream:
    """Its clock: how much of every stream, itself included, is done before its next operation."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.clock: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        for stream, time in other.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def work(self) -> tuple[Stream, int]:
        self.clock[self] += 1
        return self, self.clock[self]

    def sees(self, work: tuple[Stream, int]) -> bool:
        return self.clock.get(work[0], 0) >= work[1]


class Device:
    """As much of ``torch.cuda`` as streams take."""

    Stream = Stream

    def __init__(self) -> None:
        self.now = self.first = Stream()
        self.kept: list[tuple[Tensor, Stream]] = []  # memory that stays until a stream is done

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(Tensor, "record_stream", lambda t, s: made.kept.append((t, s)))
    return made


def check_batch(device: Device, streams: TeacherStreams, images: Tensor) -> None:
    """One batch of two teachers, whose every read comes after what it reads was written."""
    written = device.now.work()
    shared, done = [], {}

    def share(name: str) -> None:
        assert device.now is device.first
        shared.append(device.now.work())

    def run(name: str) -> TokenFeatures:
        assert device.now is not device.first
        assert device.now not in [stream for stream, _ in done.values()]
        assert all(device.now.sees(work) for work in [written, *shared])
        done[name] = device.now.work()
        return TokenFeatures(summary=torch.zeros(2, 4))

    found = streams.run(["a", "b"], images, share, run)
    assert len(shared) == 2
    assert all(device.now.sees(work) for work in done.values())
    for features in found.values():
        assert any(t is features.summary and s is device.first for t, s in device.kept)


def test_each_waits_for_what_it_reads(device: Device) -> None:
    streams = TeacherStreams(device)
    for _ in range(2):  # the second batch in the streams of the first
        check_batch(device, streams, torch.rand(2, 3, 8, 8))
    assert len(streams._streams) == 2


def test_a_module_resizes_in_the_stream_of_the_step(device: Device) -> None:
    module, data = small.module(teacher_streams=True), small.batch()
    assert module.teacher_streams is not None
    images = data.views[0].float() / 255
    alone = module.targets(data, images, 0, module.teacher_names)  # on a CPU one by one
    assert not module.teacher_streams._streams
    where = []
    original = nn.functional.interpolate

    def interpolate(*args: Any, **kwargs: Any) -> Tensor:
        where.append(device.now)
        return original(*args, **kwargs)

    with (
        patch("multikd.teachers.resized.functional.interpolate", interpolate),
        shared_sizes(),
    ):
        together = module._side_by_side(TeacherStreams(device), images, module.teacher_names)
    assert where == [device.first] * 2  # 48 px, and 64 px for two of the three
    for name, features in alone.items():
        assert torch.equal(together[name].summary, features.summary)


def test_streams_are_no_part_of_copies(device: Device) -> None:
    streams = TeacherStreams(device)
    streams.run(["a"], torch.rand(1, 3, 4, 4), lambda _: None, lambda _: TokenFeatures())
    assert streams._streams
    assert not copy.copy(streams)._streams
    module = small.module(teacher_streams=True)
    assert module.teacher_streams is not None
    assert pickle.loads(pickle.dumps(module.teacher_streams))._streams == {}
