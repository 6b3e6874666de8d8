"""What the benchmarks share: turns, medians, the matrix-product rate, memory, printing."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from multikd.evaluation.cost import processor
from multikd.performance import keep_freed_memory

Run = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments(parser: argparse.ArgumentParser, threads: int = 2) -> argparse.Namespace:
    """Parse, with what every benchmark takes, and set threads, allocator and float32 products."""
    parser.add_argument("--repeats", type=int, default=7, help="of each variant (default: 7)")
    parser.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: glibc gives no freed block back (for every variant alike)",
    )
    parser.add_argument(
        "--float32", choices=("highest", "high", "medium"), default="highest", help="products"
    )
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: seconds of this process's one thread, for a machine that others use as well",
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1: it adds up the time of all threads")
    CLOCKS["used"] = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.float32)
    if options.allocator == "keep":
        keep_freed_memory()
    torch.manual_seed(0)
    return options


def in_turns(runs: Mapping[str, Run], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of callables that take turns, so that a busy moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warm_up, repeats):
            names = list(runs)
            for name in names if turn % 2 else reversed(names):
                clock = CLOCKS.get("used", time.perf_counter)
                start = clock()
                runs[name]()
                if turn >= 0:
                    times[name].append(clock() - start)
    finally:
        gc.enable()
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "least": min(values), "greatest": max(values)}


def ratio(slow: list[float], quick: list[float]) -> dict[str, float]:
    """How many times as fast, turn by turn: median and range."""
    return summary([a / b for a, b in zip(slow, quick, strict=True)])


def product_rate(dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP a second of a large matrix product (2048³) in this process, the best of the repeats."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    times = in_turns({"product": lambda: a @ b}, repeats)["product"]
    return 2 * 2048**3 / min(times)


def saved_bytes(forward: Run, parameters: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept alive until the sum is taken, so that no address comes twice
        total = sum(kept.values())
    del output
    return total


def peak_bytes(run: Run) -> int:
    """Most bytes that torch's allocator held at once during a run, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def shown(value: Mapping[str, float], unit: str = "", scale: float = 1.0) -> str:
    """Median and range for people."""
    low, high = scale * value["least"], scale * value["greatest"]
    return f"{scale * value['median']:.3g}{unit} [{low:.3g}, {high:.3g}]"


def finish(
    figures: dict[str, Any], title: str, rows: list[tuple[str, ...]], target: Path | None
) -> None:
    """Print a table (the first row has its titles), and the figures as JSON."""
    table = Table(title=title)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=130).print(table)
    text = json.dumps({"machine": machine(), **figures}, indent=2)
    print(text)
    if target is not None:
        target.write_text(text + "\n", encoding="utf-8")
