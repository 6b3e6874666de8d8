"""What one job of a study does: fill the cache, score the teachers, train and score a student."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

import multikd
from multikd.ablation.plan import Run
from multikd.checkpoints import CHECKPOINT_KEY
from multikd.files import write_atomically
from multikd.fit import MultikdCLI, build_cli, run_lightning, without_known_noise
from multikd.modules.distillation import DistillationModule
from multikd.runs.folder import CHECKPOINTS, CONFIG, LAST
from multikd.runs.scoring import score

EVALUATION = "evaluation"


def do(run: Run, out: Path, tasks: str, data: tuple[str, ...]) -> dict[str, Any]:
    """Do a job; returns what its ``result.json`` holds.

    Raises:
        ValueError and others: it failed.
    """
    folder = out / "runs" / run.name
    config = folder / CONFIG
    begun = time.perf_counter()
    if run.kind == "cache":
        result = fill(config, out / "features")
    elif run.kind == "teachers":
        result = score_teachers(config, folder, out, tasks, data)
    else:
        result = train_and_score(run, config, folder, tasks, data)
    return {**result, "seconds": time.perf_counter() - begun}


def fill(config: Path, cache: Path) -> dict[str, Any]:
    """The shared feature cache."""
    from multikd.cache_command import run_cache

    found = run_cache([f"--config={config}"], cache, progress=False)
    return {} if found is None else dict(found[1])


def train_and_score(
    run: Run, config: Path, folder: Path, tasks: str, data: tuple[str, ...]
) -> dict[str, Any]:
    """An ordinary ``fit`` (none for the empty set), then ``evaluate``'s tasks."""
    checkpoint = folder / CHECKPOINTS / LAST
    begun = time.perf_counter()
    if not run.combination.subset:
        save_untrained(_built(config), checkpoint)
    else:
        with without_known_noise():
            run_lightning(["fit", f"--config={config}", "--resume", "auto"])
    trained = time.perf_counter()
    cache = folder / EVALUATION
    scores = score(f"student={checkpoint}", tasks, data, cache, with_teachers=False)["student"]
    shutil.rmtree(cache, ignore_errors=True)  # of this student alone, and scored now
    return {
        "scores": scores,
        "seconds_training": trained - begun,
        "seconds_scoring": time.perf_counter() - trained,
        "diagnostics": diagnostics(folder / "logs"),
    }


def score_teachers(
    config: Path, folder: Path, out: Path, tasks: str, data: tuple[str, ...]
) -> dict[str, Any]:
    """The teachers' own scores, and what running each of them costs."""
    from multikd.cache_command import plan_cache

    cli = _built(config)
    module = cli.model
    checkpoint = folder / CHECKPOINTS / LAST
    save_untrained(cli, checkpoint)
    cli.datamodule.setup("fit")
    plans = plan_cache(module, cli.datamodule, timed=True)
    scores = score(f"student={checkpoint}", tasks, data, out / EVALUATION, with_teachers=True)
    return {
        "scores": {name: scores[name] for name in module.teacher_names},
        "costs": {
            plan.name: {
                "encoder": plan.encoder,
                "parameters": plan.parameters,
                "seconds_per_image": plan.seconds_per_image,
                "bytes": plan.size,
            }
            for plan in plans
        },
    }


def save_untrained(cli: MultikdCLI, path: Path) -> None:
    """A checkpoint of the model as it was built, before any training."""
    import io

    module = cli.model
    if not isinstance(module, DistillationModule):
        raise ValueError("a study trains a DistillationModule")
    text = cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=False)
    checkpoint = {
        "state_dict": module.state_dict(),
        "teachers": module.teacher_facts(),
        "epoch": 0,
        "global_step": 0,
        CHECKPOINT_KEY: {"version": multikd.__version__, "config": text},
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def diagnostics(logs: Path) -> dict[str, float]:
    """Mean over the run of each teacher's share of the gradient and of the cosines."""
    import csv

    sums: dict[str, list[float]] = {}
    for metrics in sorted(logs.glob("version_*/metrics.csv")):
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if value and key.startswith(("gradient/share/", "gradient/cosine/")):
                        sums.setdefault(key, []).append(float(value))
    return {key: sum(values) / len(values) for key, values in sums.items()}


def _built(config: Path) -> MultikdCLI:
    with without_known_noise():
        return build_cli([f"--config={config}"], run=False, typed=False)
