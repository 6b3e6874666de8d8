"""What one image costs: multiply-adds and latency, at the trained size, on this machine."""

from __future__ import annotations

import torch

from multikd.evaluation.cost import count_macs, one_thread, processor, time_passes
from multikd.export.card import Cost
from multikd.students import StudentEncoder

_RUNS, _SECONDS = 30, 3.0


def measure_cost(student: StudentEncoder) -> Cost:
    """Multiply-adds of one image, and p50 latency of batch 1 on one CPU thread.

    At most 30 runs or three seconds are timed, after three to warm up.
    """
    model = student.export_model().cpu().float().eval().requires_grad_(False)
    images = torch.rand(1, 3, *student.spec.image_size)
    with one_thread(), torch.inference_mode():
        macs = count_macs(model, images)
        latency = time_passes(lambda: model(images), _RUNS, seconds=_SECONDS)
    return Cost(macs, latency.p50, processor())
