"""What one image costs: multiply-adds and latency, at the trained size, on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from multikd.export.card import Cost
from multikd.students import StudentEncoder

_RUNS, _SECONDS = 30, 3.0


def measure_cost(student: StudentEncoder) -> Cost:
    """Multiply-adds of one image, and p50 latency of batch 1 on one CPU thread.

    At most 30 runs or three seconds are timed, after three to warm up.
    """
    model = student.export_model().cpu().float().eval().requires_grad_(False)
    images = torch.zeros(1, 3, *student.spec.image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            counter = FlopCounterMode(display=False)
            with counter:
                model(images)
            for _ in range(2):
                model(images)
            seconds: list[float] = []
            while len(seconds) < 3 or (len(seconds) < _RUNS and sum(seconds) < _SECONDS):
                begun = time.perf_counter()
                model(images)
                seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    macs = counter.get_total_flops() // 2
    return Cost(macs or None, 1000 * statistics.median(seconds), processor())


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
