"""What running an encoder costs on the device at hand: size, multiply-adds, memory, time.

Multiply-adds are counted by ``torch.utils.flop_counter`` (which counts each as two operations, so
its total is halved): convolutions and matrix products, attention included; normalisations,
activations and pooling are not counted, as in most papers' "FLOPs" or "MACs".
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from multikd.evaluation.memory import PeakMemory
from multikd.types import Grid

BATCHES = (1, 32)
REPEATS = 20
_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Time of one pass over a batch, milliseconds.

    Attributes:
        p50: median.
        p95: 95th percentile (linear between measurements).
        mean: over all passes timed; images/s is batch / mean.
        passes: how many were timed.
    """

    p50: float
    p95: float
    mean: float
    passes: int


@dataclass(frozen=True)
class EncoderCost:
    """Cost of an encoder, or of one deployed file of it.

    Attributes:
        parameters: numbers in weights; None where that isn't known (a graph file).
        macs: multiply-adds of one image; None where they can't be counted.
        device: name of the processor or GPU.
        threads: of PyTorch or ONNX Runtime on a CPU; None on a GPU.
        image_size: (H, W) that was run.
        peak_memory_mb: weights and the most that a pass over the largest batch held at once, in
            10⁶ bytes: CUDA's allocator peak; on a CPU the rise of the process's resident set
            (``VmHWM``, reset before) plus the weights. None where the system doesn't tell.
        latency: batch → times.
        file_mb: size of the deployed file.
        format: of the deployed file (``onnx``, ``onnx-int8-static`` …); empty for the encoder.
    """

    parameters: int | None
    macs: int | None
    device: str
    threads: int | None
    image_size: Grid
    peak_memory_mb: float | None
    latency: Mapping[int, Latency]
    file_mb: float | None = None
    format: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry ``cost`` of an encoder (or one of ``deployed``) in results.json."""
        found: dict[str, Any] = {
            "parameters": self.parameters,
            "macs": self.macs,
            "device": self.device,
            "threads": self.threads,
            "image_size": list(self.image_size),
            "peak_memory_mb": self.peak_memory_mb,
            "latency_ms": {str(batch): asdict(times) for batch, times in self.latency.items()},
            "images_per_second": {
                str(batch): 1000 * batch / times.mean for batch, times in self.latency.items()
            },
        }
        if self.file_mb is not None:
            found |= {"format": self.format, "file_mb": self.file_mb}
        return found


def measure_cost(
    network: nn.Module,
    image_size: Grid,
    *,
    device: torch.device | str = "cpu",
    batches: Sequence[int] = BATCHES,
    repeats: int = REPEATS,
) -> EncoderCost:
    """Run ``network`` on random images and count, weigh and time it.

    Args:
        network: float images ``(B, 3, H, W)`` → anything; moved to ``device`` and left there. It is
            run as it is, so put it into eval mode first.
        image_size: (H, W).
        device: where it is measured.
        batches: batch sizes that are timed; the largest decides the peak memory.
        repeats: passes timed for each, after three to warm up.

    Raises:
        ValueError: no batch sizes, or a setting below 1.
    """
    check_batches(batches, repeats)
    device = torch.device(device)
    network = network.to(device)
    parameters = sum(p.numel() for p in network.parameters())
    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    images = torch.rand(max(batches), 3, *image_size, device=device)
    macs = count_macs(network, images[:1])
    with torch.inference_mode():
        with PeakMemory(device) as memory:
            network(images)
            _synchronize(device)
        latency = {
            batch: time_passes(
                lambda part=images[:batch]: network(part),  # type: ignore[misc]
                repeats,
                lambda: _synchronize(device),
            )
            for batch in batches
        }
    return EncoderCost(
        parameters=parameters,
        macs=macs,
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        image_size=image_size,
        peak_memory_mb=memory.megabytes(weights),
        latency=latency,
    )


def count_macs(network: Callable[[Tensor], object], images: Tensor) -> int | None:
    """Multiply-adds of ``network(images)``; None where nothing countable runs.

    Fused attention is counted through its plain form, whose products are the same.
    """
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        network(images)
    # The counter's unit is one multiplication or addition.
    return counter.get_total_flops() // 2 or None


def time_passes(
    run: Callable[[], object],
    repeats: int = REPEATS,
    finish: Callable[[], None] = lambda: None,
    seconds: float = float("inf"),
) -> Latency:
    """Time ``run`` ``repeats`` times after three passes to warm up.

    Args:
        run: one pass.
        repeats: passes timed.
        finish: waits until the device has done what it was told.
        seconds: after so many at least three passes are enough.
    """
    for _ in range(_WARM_UP):
        run()
    finish()
    taken: list[float] = []
    while len(taken) < min(3, repeats) or (len(taken) < repeats and sum(taken) < seconds):
        begun = time.perf_counter()
        run()
        finish()
        taken.append(time.perf_counter() - begun)
    p50, p95 = 1000 * np.quantile(taken, [0.5, 0.95])
    return Latency(float(p50), float(p95), 1000 * sum(taken) / len(taken), len(taken))


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else str(device)


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one CPU thread for the time being."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_batches(batches: Sequence[int], repeats: int) -> None:
    """Refuse settings with which nothing could be timed.

    Raises:
        ValueError: no batch sizes, or a value below 1.
    """
    if not batches or min(batches) < 1 or repeats < 1:
        raise ValueError(
            f"cost needs batch sizes and repeats of at least 1, received {tuple(batches)} and "
            f"{repeats}"
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
