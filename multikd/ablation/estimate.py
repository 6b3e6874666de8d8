"""What a study will take, before anything of it runs: jobs, time and disk."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from multikd.ablation.plan import Planner, Run
from multikd.ablation.stages import planned_runs
from multikd.fit import build_cli, parse_config, without_known_noise
from multikd.modules.distillation import DistillationModule, to_float
from multikd.runs.overrides import get

_STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """Figures of a plan.

    Attributes:
        runs: trained students.
        combinations: of teachers and levels.
        cache_bytes: of the shared feature cache; 0 without one.
        cache_seconds: to fill it.
        step_seconds: of one training step of all teachers, read from the cache (or live).
        steps: of one run.
        checkpoint_bytes: of one run.
    """

    runs: int
    combinations: int
    cache_bytes: int
    cache_seconds: float
    step_seconds: float
    steps: int
    checkpoint_bytes: int

    @property
    def seconds(self) -> float:
        """Of training and cache, one run after another; scoring comes on top."""
        return self.cache_seconds + self.runs * self.steps * self.step_seconds

    def figures(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "runs": self.runs,
            "combinations": self.combinations,
            "cache_bytes": self.cache_bytes,
            "cache_seconds": self.cache_seconds,
            "step_seconds": self.step_seconds,
            "steps_per_run": self.steps,
            "seconds": self.seconds,
            "disk_bytes": self.cache_bytes + self.runs * self.checkpoint_bytes,
        }

    def text(self, planner: Planner) -> str:
        """For people."""
        seeds = len(planner.study.seeds)
        disk = self.cache_bytes + self.runs * self.checkpoint_bytes
        lines = [
            f"teachers: {', '.join(planner.pool)}; {len(planner.subsets)} subsets"
            + "".join(f" × {len(v)} {axis}" for axis, v in planner.study.axes.items())
            + f" × {seeds} seed{'s' * (seeds != 1)}",
            f"{self.runs} runs of {self.steps} steps ({self.combinations} combinations)"
            + (", and the untrained student" if planner.study.empty else ""),
            f"shared cache: {self.cache_bytes / 1e6:,.1f} MB, filled in {self.cache_seconds:,.0f} s"
            if planner.study.cache is not None
            else "no cache: every run runs its teachers in every step",
            f"a step takes {1000 * self.step_seconds:.0f} ms, measured with all teachers",
            f"in all about {self.seconds / 60:,.1f} min of training, one run after another "
            f"(scoring comes on top), and {disk / 1e9:,.2f} GB on disk; nothing was written",
        ]
        return "\n".join(lines)


def estimate(planner: Planner, runs: int | None = None) -> Estimate:
    """Measure a few steps of the whole set of teachers, and the teachers themselves.

    Raises:
        ValueError: the config can't be built.
    """
    from multikd.cache_command import plan_cache

    everything = planner.shared()[-1]
    config = planner.config(Run("run", everything.combination, planner.study.seeds[0]))
    parse_config(config)
    with without_known_noise():
        arguments = [f"--config={json.dumps(config, default=str)}"]
        cli = build_cli(arguments, run=False, typed=False)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule):
        raise ValueError("a study trains a DistillationModule")
    data.setup("fit")
    plans = []
    if planner.study.cache is not None:
        plans = plan_cache(module, data)
    epochs = int(get(config, "trainer.max_epochs") or 1)
    limit = get(config, "trainer.limit_train_batches")
    per_epoch = data.steps_per_epoch()
    if isinstance(limit, int):
        per_epoch = min(per_epoch, limit)
    seconds = _step_seconds(cli, module, data, bool(plans))
    parameters = sum(p.numel() for n, p in module.named_parameters() if not n.startswith("teach"))
    data.teardown()
    return Estimate(
        planned_runs(planner) if runs is None else runs,
        len(planner.combinations()),
        sum(plan.size for plan in plans),
        math.fsum((plan.seconds_per_image or 0.0) * plan.missing for plan in plans),
        seconds,
        epochs * per_epoch,
        12 * parameters,  # weights and two moments in float32
    )


def _step_seconds(cli: Any, module: DistillationModule, data: Any, cached: bool) -> float:
    """Median of a few steps; with a cache the teachers' features are taken beforehand."""
    data.cache = None  # measured without one: it need not be there yet
    taken = []
    loader = data.train_dataloader()
    begun = time.perf_counter()
    for number, batch in enumerate(loader):
        loading = time.perf_counter() - begun
        if cached:
            images = to_float(batch.views[0])
            batch.cached = {n: module.run_teacher(n, images) for n in module.teacher_names}
        begun = time.perf_counter()
        with cli.trainer.precision_plugin.forward_context():
            loss, _ = module.step(batch, 0, number, training=True)
        torch.autograd.backward(loss)
        module.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - begun + loading)
        if number >= _STEPS:
            break
        begun = time.perf_counter()
    return float(torch.tensor(taken[1:] or taken).median())
