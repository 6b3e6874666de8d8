"""Building, measuring, training and scoring one size."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd import preflight
from multikd.backbones import skeleton
from multikd.config_files import load_config
from multikd.data.module import ShardDataModule
from multikd.evaluation.cost import measure_cost
from multikd.fit import build_cli, without_known_noise
from multikd.imports import allowed_by_user
from multikd.runs.folder import CHECKPOINTS, LAST, RunsFolder
from multikd.runs.overrides import put, with_strings
from multikd.runs.process import fit_in_process
from multikd.runs.scoring import score
from multikd.runs.trainer import own_folder
from multikd.sizes.search import Budget, Search
from multikd.students import StudentEncoder

_HERE = ("accelerator=cpu", "devices=1", "strategy=auto", "num_nodes=1", "logger=false")


@dataclass(frozen=True)
class SizeRun:
    """One size with one seed."""

    size: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.size},seed={self.seed}"


def size_config(search: Search, run: SizeRun, out: Path) -> dict[str, Any]:
    """The whole config of a run, for ``multikd fit --config``.

    Raises:
        ValueError: a base that is not found, or a dotted key that leads nowhere.
    """
    config = copy.deepcopy(load_config(search.base))
    for key, value in {**search.settings, **search.sizes[run.size]}.items():
        put(config, key, with_strings(value, lambda text: text.replace("{out}", str(out))))
    config["seed_everything"] = run.seed
    put(config, "data.seed", run.seed)
    put(config, "data.recorded_seed", 0)  # one cache for runs of all seeds
    own_folder(config, RunsFolder(out).folder(run))
    return config


def build_student(search: Search, run: SizeRun, out: Path) -> StudentEncoder:
    """The student of a size, untrained; everything around it is checked from shapes alone.

    Raises:
        ValueError: it can't be built, or does not fit teachers or images, with the size's name.
    """
    config = size_config(search, run, out)
    arguments = [f"--config={json.dumps(config, default=str)}", *(f"--trainer.{a}" for a in _HERE)]
    try:
        with without_known_noise(), skeleton(), torch.device("meta"):
            cli = build_cli(arguments, run=False, typed=False)
            student = getattr(cli.model, "student", None)
            if not isinstance(student, StudentEncoder):
                raise ValueError("its module trains no single student")
            if isinstance(cli.datamodule, ShardDataModule):
                preflight.check_images(cli.model, cli.datamodule)
    except (ValueError, ImportError) as error:
        raise ValueError(f"the size {run.size!r} of {search.path}: {error}") from error
    return student


def student_cost(student: StudentEncoder, budget: Budget) -> dict[str, Any]:
    """What the encoder costs on this device: measured, with random weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _with_memory(student.export_model())
    threads = torch.get_num_threads()
    torch.set_num_threads(budget.threads or threads)
    try:
        cost = measure_cost(model, student.spec.image_size, device=device, batches=(budget.batch,))
    finally:
        torch.set_num_threads(threads)
    times = cost.latency[budget.batch]
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "latency_ms": times.p50,
        "memory_mb": cost.peak_memory_mb,
        "device": cost.device,
        "threads": cost.threads,
    }


def _with_memory(model: nn.Module) -> nn.Module:
    """A model of the meta device with numbers, which decide nothing of its cost."""
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(0.01)  # no denormal numbers, which would be slow
        else:
            tensor.data.zero_()
    for module in model.modules():
        variance = getattr(module, "running_var", None)
        if isinstance(variance, Tensor):
            variance.fill_(1.0)
    return model.eval().requires_grad_(False)


def over_budget(cost: dict[str, Any], budget: Budget) -> str:
    """Why a size is not trained; "" where it may be."""
    bounds = {
        "latency_ms": ("ms", budget.latency_ms),
        "memory_mb": ("MB", budget.memory_mb),
        "parameters": ("parameters", budget.parameters),
    }
    for key, (unit, most) in bounds.items():
        if most is not None and cost[key] is not None and cost[key] > most:
            return f"{cost[key]:,.4g} {unit}, the budget is {most:,.4g}"
    return ""


def do_size(search: Search, run: SizeRun, out: Path) -> dict[str, Any]:
    """Train and score, or go on where an earlier attempt was stopped.

    Returns:
        What its ``result.json`` holds.
    """
    folders = RunsFolder(out, what="search")
    folder = folders.folder(run)
    folders.put_config(run, size_config(search, run, out))
    begun = time.perf_counter()
    fit_in_process(folder, sorted(allowed_by_user()))
    trained = time.perf_counter()
    checkpoint, place = folder / CHECKPOINTS / LAST, folder / "evaluation"
    scores = score(f"student={checkpoint}", search.tasks, tuple(search.data), place, False)
    shutil.rmtree(place, ignore_errors=True)  # of this student alone, and scored now
    return {
        "checkpoint": str(checkpoint),
        "scores": scores["student"],
        "seconds_training": trained - begun,
        "seconds": time.perf_counter() - begun,
    }
