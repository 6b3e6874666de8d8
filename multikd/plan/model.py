"""The cost model of a step: FLOP, bytes and links → seconds.

``t = a·F_teachers/peak + b·F_training/peak + c·P/memory + d``, F of the batch, P the trained
parameters; d is what a step costs whatever is in it. For GPUs a and b are assumptions, and so are
the predictions; ``fit_coefficients`` takes them from measured steps instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multikd.plan.counts import StepCounts

# Bytes that AdamW reads and writes a float32 parameter: weight, gradient, two moments; three back.
_ADAM_BYTES = 28.0


@dataclass(frozen=True)
class Hardware:
    """One device, from its maker's data sheet, and how devices are joined.

    Attributes:
        name: what it is called.
        peak: bfloat16 FLOP a second, dense.
        memory: bytes.
        bandwidth: bytes a second of its memory.
        link: bytes a second that one device sends to others of its machine.
        network: bytes a second that one device sends to other machines.
        per_machine: devices in a machine.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_machine: int = 8


# Public peak figures: NVIDIA's and AMD's data sheets (dense, without sparsity). The network is one
# adapter of 400 Gbit/s a device (200 for A100), as their reference systems have it.
HARDWARE = {
    "a100": Hardware("A100 80 GB SXM", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Hardware("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Hardware("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Hardware("B200 SXM", 2250e12, 180e9, 8.0e12, 900e9, 50e9),
    "mi300x": Hardware("MI300X", 1307e12, 192e9, 5.3e12, 448e9, 50e9),
}


@dataclass(frozen=True)
class Coefficients:
    """How far from its peak a device works.

    Attributes:
        teachers: time of the teachers over their FLOP at the peak rate.
        training: the same of student and ladder, forward and backward.
        optimizer: time of the optimiser over its bytes at the memory's bandwidth.
        fixed: seconds a step that depend on nothing.
    """

    teachers: float
    training: float
    optimizer: float
    fixed: float


ASSUMED = Coefficients(teachers=1 / 0.45, training=1 / 0.35, optimizer=1.5, fixed=0.01)
"""For GPUs: 45 % of the peak in frozen forward passes, 35 % in training. Assumptions."""


def terms(counts: StepCounts, batch: int, peak: float, bandwidth: float) -> tuple[float, ...]:
    """What the coefficients multiply: seconds of each part at full speed, and 1."""
    return (
        batch * sum(counts.teachers.values()) / peak,
        batch * counts.training / peak,
        counts.trained * _ADAM_BYTES / bandwidth,
        1.0,
    )


def step_seconds(
    counts: StepCounts, batch: int, peak: float, bandwidth: float, by: Coefficients
) -> dict[str, float]:
    """Seconds of each part of a step of one device."""
    factors = (by.teachers, by.training, by.optimizer, by.fixed)
    names = ("teachers", "student and ladder", "optimizer", "fixed")
    parts = terms(counts, batch, peak, bandwidth)
    return {n: f * t for n, f, t in zip(names, factors, parts, strict=True)}


def fit_coefficients(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Coefficients:
    """Coefficients of 0 or more that explain measured steps, by relative least squares.

    Args:
        rows: ``terms`` of each measured setting.
        seconds: its measured time.

    Raises:
        ValueError: fewer settings than coefficients.
    """
    if len(rows) < 4 or len(rows) != len(seconds):
        raise ValueError(
            f"four coefficients need four or more measured steps, received {len(rows)} and "
            f"{len(seconds)} times"
        )
    times = np.asarray(seconds, dtype=np.float64)
    matrix = np.asarray(rows, dtype=np.float64) / times[:, None]
    free = list(range(4))
    while True:  # leaves out what would be negative, the most negative first
        found = np.linalg.lstsq(matrix[:, free], np.ones(len(times)), rcond=None)[0]
        if not len(free) or found.min() >= 0:
            break
        free.pop(int(found.argmin()))
    values = np.zeros(4)
    values[free] = found
    return Coefficients(*values.tolist())


def gradient_seconds(counts: StepCounts, hardware: Hardware, devices: int) -> float:
    """Seconds of the ring all-reduce of float32 gradients, nothing hidden behind the backward."""
    if devices < 2:
        return 0.0
    rate = hardware.link if devices <= hardware.per_machine else hardware.network
    return 2.0 * (devices - 1) / devices * 4.0 * counts.trained / rate


def memory_bytes(counts: StepCounts, batch: int, half: bool = True) -> dict[str, float]:
    """What a rank holds at the peak of a step: DDP, AdamW, autocast to bfloat16 (``half``)."""
    share = 0.5 if half else 1.0
    return {
        "teachers": sum(counts.teacher_parameters.values()) * 4.0 * share,
        "weights, gradients, AdamW": counts.trained * 16.0,
        "moving average": counts.averaged * 4.0,
        # Half of what is kept (norms, residuals) stays in float32 under autocast.
        "activations": batch * counts.kept * (0.75 if half else 1.0),
        "targets and predictions": 2.0 * batch * counts.targets,
    }
