"""What the deployed files of an encoder cost: ONNX graphs, quantised ones too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multikd.errors import MissingExtraError
from multikd.evaluation.cost import (
    BATCHES,
    REPEATS,
    EncoderCost,
    check_batches,
    processor,
    time_passes,
)
from multikd.evaluation.memory import PeakMemory
from multikd.types import Grid


def measure_onnx(
    path: Path,
    image_size: Grid,
    *,
    batches: Sequence[int] = BATCHES,
    repeats: int = REPEATS,
    threads: int | None = None,
    format: str = "onnx",
) -> EncoderCost:
    """The same of an ONNX file on ONNX Runtime's CPU provider.

    A graph with a fixed batch is timed at that batch alone. The peak includes loading the weights.

    Args:
        path: of the graph.
        image_size: (H, W), where the graph leaves it open.
        batches: batch sizes.
        repeats: passes timed for each, after three to warm up.
        threads: of ONNX Runtime; None takes as many as PyTorch uses.
        format: what to call it.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ValueError: the graph's input is no batch of images.
    """
    check_batches(batches, repeats)
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    with PeakMemory(torch.device("cpu")) as memory:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        name, dtype, fixed, size = _graph_input(session, path, image_size)
        sizes = [b for b in batches if fixed in (None, b)] or [fixed or 1]
        pixels = np.random.default_rng(0).random((max(sizes), 3, *size), dtype=np.float32)
        if dtype == "tensor(uint8)":
            inputs: Any = (255 * pixels).astype(np.uint8)
        else:
            # What normalised images look like.
            inputs = (pixels - 0.5) / 0.25
        session.run(None, {name: inputs})
    latency = {
        batch: time_passes(
            lambda part=inputs[:batch]: session.run(None, {name: part}),  # type: ignore[misc]
            repeats,
        )
        for batch in sizes
    }
    return EncoderCost(
        parameters=None,
        macs=None,
        device=processor(),
        threads=options.intra_op_num_threads,
        image_size=size,
        peak_memory_mb=memory.megabytes(0),
        latency=latency,
        file_mb=path.stat().st_size / 1e6,
        format=format,
    )


def measure_deployed(
    folder: Path, image_size: Grid, *, batches: Sequence[int] = BATCHES, repeats: int = REPEATS
) -> list[EncoderCost]:
    """Cost of every ONNX file of an exported folder, quantised ones too, by name.

    ``NAME.onnx`` is called ``onnx``, ``NAME.int8-static.onnx`` ``onnx-int8-static``.

    Raises:
        MissingExtraError: there are such files, and ONNX Runtime is not installed.
    """
    found = []
    for path in sorted(folder.glob("*.onnx")):
        kind = Path(path.stem).suffix.removeprefix(".")
        name = "onnx" + (f"-{kind}" if kind.startswith("int8") else "")
        found.append(measure_onnx(path, image_size, batches=batches, repeats=repeats, format=name))
    return found


def _graph_input(session: Any, path: Path, image_size: Grid) -> tuple[str, str, int | None, Grid]:
    """Name, dtype, fixed batch (or None) and (H, W) of a graph's only input."""
    inputs = session.get_inputs()
    shape = list(inputs[0].shape) if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] not in (3, "channels"):
        raise ValueError(
            f"{path.name} takes {[i.shape for i in inputs]}, and cost is measured on images "
            "(B, 3, H, W): give a graph of an encoder"
        )
    fixed = shape[0] if isinstance(shape[0], int) else None
    height, width = (
        side if isinstance(side, int) else own
        for side, own in zip(shape[2:], image_size, strict=True)
    )
    return inputs[0].name, inputs[0].type, fixed, (height, width)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "the cost of an ONNX file") from error
    return onnxruntime
