"""How a step's time grows with teachers, batch and ranks; the cost model fitted and checked.

    python tools/bench/scaling.py [--json FILE] [--parts line model ranks]

Small ViTs at 96 px (36 patches, so that a setting takes a fraction of a second), float32 on the
CPU. (1) T = 1, 2, 4, 8 teachers: the straight line through the medians, its largest residual, and
what a teacher costs beyond its bare forward pass and its share of the ladder, both timed alone.
(2) The cost model of `multikd plan` is fitted to settings of T and batch, and predicts others that
were left out. (3) Images a second and core of two processes (torch's DDP over gloo, one thread
each) against a third that has the machine for itself; they take turns, step by step.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measuring import arguments, finish, in_turns, product_rate, ratio, shown, summary
from step import Ours, batch_of
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from multikd.backbones import skeleton
from multikd.losses import HardestKept
from multikd.modules import DistillationModule
from multikd.normalizers import EMAStandardizers
from multikd.performance import keep_freed_memory
from multikd.plan.counts import count_step
from multikd.plan.model import fit_coefficients, terms
from multikd.projectors import MLPProjectors
from multikd.students import StudentEncoder
from multikd.teachers import Teacher, TimmEncoder
from multikd.types import Batch

SIZE = 96
FITTED = ((1, 8), (1, 32), (2, 16), (4, 8), (4, 32), (8, 16))
HELD_OUT = ((2, 32), (4, 16), (8, 8), (8, 32), (1, 16))


def small(teachers: int) -> DistillationModule:
    """ViT-S/16 teachers and student of half the depth."""
    made = {
        f"teacher{t}": Teacher(
            TimmEncoder("vit_small_patch16_224", pretrained=False, image_size=SIZE),
            dtype="float32",
        )
        for t in range(teachers)
    }
    return DistillationModule(
        made,
        StudentEncoder("vit_small_patch16_224", image_size=SIZE, model_args={"depth": 6}),
        projectors=MLPProjectors(384, 1536),
        normalizers=EMAStandardizers(total_steps=1000),
        dropper=HardestKept(0.0),  # nothing is dropped: every step costs the same
    ).train()


def teachers_line(options: argparse.Namespace) -> dict[str, Any]:
    """Step time over the number of teachers."""
    counts = (1, 2, 4, 8)
    batch = batch_of(options.batch, SIZE)
    modules = {t: small(t) for t in counts}
    steps = {t: Ours(module, torch.float32) for t, module in modules.items()}
    runs: dict[str, Callable[[], object]] = {str(t): partial(steps[t], batch) for t in counts}
    runs["one teacher"] = lambda: modules[1].targets(
        batch, batch.views[0].float() / 255, 0, ["teacher0"]
    )
    images = batch.views[0].float() / 255
    with torch.no_grad():
        output = modules[8].student(images)
    rungs = [rung.map(lambda x: x.detach().requires_grad_()) for rung in output.rungs]
    grid = rungs[-1].grid

    def ladder(teachers: int) -> None:
        names = [f"teacher{t}" for t in range(teachers)]
        found = modules[8].ladder(rungs, dict.fromkeys(names, grid), names)
        tensors = [x for f in found.values() for x in (f.summary, f.patches) if x is not None]
        torch.autograd.grad(
            tensors,
            [p for n in names for p in modules[8].ladder.teacher_parameters(n)],
            [torch.ones_like(x) for x in tensors],
        )

    runs["ladder of 4"] = lambda: ladder(4)
    runs["ladder of 8"] = lambda: ladder(8)
    times = in_turns(runs, options.repeats)
    middle = {name: median(values) for name, values in times.items()}
    y = np.array([middle[str(t)] for t in counts])
    slope, start = np.polyfit(counts, y, 1)
    residual = float(np.abs((start + slope * np.array(counts)) / y - 1).max())
    bare = middle["one teacher"] + (middle["ladder of 8"] - middle["ladder of 4"]) / 4
    return {
        "seconds": {name: summary(values) for name, values in times.items()},
        "seconds_a_teacher": float(slope),
        "seconds_without": float(start),
        "largest_residual": residual,
        "bare_teacher_and_ladder_share": bare,
        "overhead_a_teacher": float(slope) / bare - 1,
    }


def cost_model(options: argparse.Namespace) -> dict[str, Any]:
    """Fit on some settings, predict others."""
    rate = product_rate(torch.float32)
    bandwidth = _bandwidth()
    rows, seconds = {}, {}
    for teachers in sorted({t for t, _ in (*FITTED, *HELD_OUT)}):
        with skeleton(), torch.device("meta"):
            counts = count_step(small(teachers), (SIZE, SIZE))
        step = Ours(small(teachers), torch.float32)
        batches = {b: batch_of(b, SIZE) for t, b in (*FITTED, *HELD_OUT) if t == teachers}
        times = in_turns(
            {str(b): partial(step, batch) for b, batch in batches.items()},
            options.repeats,
        )
        for b in batches:
            rows[teachers, b] = terms(counts, b, rate, bandwidth)
            seconds[teachers, b] = median(times[str(b)])
    found = fit_coefficients([rows[k] for k in FITTED], [seconds[k] for k in FITTED])
    weights = (found.teachers, found.training, found.optimizer, found.fixed)

    def error(key: tuple[int, int]) -> float:
        return float(np.dot(rows[key], weights)) / seconds[key] - 1

    return {
        "product_rate": rate,
        "bandwidth": bandwidth,
        "coefficients": dict(
            zip(("teachers", "training", "optimizer", "fixed"), weights, strict=True)
        ),
        "fitted": {f"T {t}, batch {b}": error((t, b)) for t, b in FITTED},
        "held_out": {f"T {t}, batch {b}": error((t, b)) for t, b in HELD_OUT},
        "seconds": {f"T {t}, batch {b}": s for (t, b), s in seconds.items()},
    }


def _bandwidth() -> float:
    """Bytes a second of an addition of 64 MB vectors."""
    a, b = torch.ones(1 << 24), torch.ones(1 << 24)
    times = in_turns({"add": lambda: a.add_(b)}, 7)["add"]
    return 3 * 4 * (1 << 24) / min(times)


class _Loss(nn.Module):
    """A step's loss as the forward pass of a module, which is what DDP wraps."""

    def __init__(self, module: DistillationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, number: int) -> Tensor:
        """The total."""
        return self.module.step(batch, 0, number, training=True)[0]


def _process(rank: int, port: int, turns: int, batch: int, gate: Any, results: Any) -> None:
    """Rank 0 or 1 of two, or (-1) the process that has its core for itself."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    if rank >= 0:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=2)
    module = small(2)
    optimizer = Ours(module, torch.float32).optimizer
    loss: nn.Module = _Loss(module)
    if rank >= 0:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    images = batch_of(batch, SIZE)
    for number in range(turns):
        for whose in ((-1,), (0, 1)) if number % 2 else ((0, 1), (-1,)):
            gate.wait()
            if rank not in whose:
                continue
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss(images, number).backward()
            optimizer.step()
            if rank < 1:
                results.put((rank, number, time.perf_counter() - begun))
    gate.wait()
    if rank >= 0:
        dist.destroy_process_group()


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of two processes (DDP) over twice those of one, one thread each, in turns."""
    context = mp.get_context("spawn")
    results, gate = context.Queue(), context.Barrier(3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    turns = options.repeats + 2
    given = (port, turns, options.batch, gate, results)
    processes = [context.Process(target=_process, args=(r, *given)) for r in (-1, 0, 1)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in range(2 * turns)]
    for process in processes:
        process.join()
    alone, together = (
        [seconds for who, number, seconds in sorted(found) if who == rank and number >= 2]
        for rank in (-1, 0)
    )
    return {
        "seconds": {"one": summary(alone), "two": summary(together)},
        "images_per_second": {
            "one": options.batch / median(alone),
            "two": 2 * options.batch / median(together),
        },
        "efficiency": ratio(alone, together),
    }


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["line", "model", "ranks"])
    options = arguments(parser)
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = [("", "value")]
    if "line" in options.parts:
        line = figures["line"] = teachers_line(options)
        rows += [
            ("ms a teacher", f"{1e3 * line['seconds_a_teacher']:.1f}"),
            ("ms of its bare forward and ladder share", _ms(line["bare_teacher_and_ladder_share"])),
            ("largest residual of the line", f"{100 * line['largest_residual']:.1f} %"),
            ("overhead of a teacher", f"{100 * line['overhead_a_teacher']:.1f} %"),
        ]
    if "model" in options.parts:
        model = figures["model"] = cost_model(options)
        rows += [(f"fitted: {k}", f"{100 * e:+.1f} %") for k, e in model["fitted"].items()]
        rows += [(f"held out: {k}", f"{100 * e:+.1f} %") for k, e in model["held_out"].items()]
    if "ranks" in options.parts:
        figures["ranks"] = ranks(options)
        rows.append(("two ranks, per core", shown(figures["ranks"]["efficiency"], "×")))
    finish(figures, "scaling", rows, options.json)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


if __name__ == "__main__":
    main()
