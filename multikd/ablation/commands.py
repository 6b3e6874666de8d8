"""What ``multikd ablate`` runs."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multikd.ablation.estimate import estimate
from multikd.ablation.execute import Processes, Slurm, parse_slurm
from multikd.ablation.leaderboard import build_leaderboard
from multikd.ablation.plan import Planner, Run
from multikd.ablation.present import terminal, write_all
from multikd.ablation.stages import planned_runs, stages
from multikd.ablation.state import StudyFolder
from multikd.ablation.study import read_study
from multikd.ablation.worker import write_job
from multikd.files import file_lock
from multikd.runs.folder import check_place
from multikd.runs.overrides import get

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblateSettings:
    """What the command line asks for; see ``multikd ablate --help``."""

    out: Path
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    dry_run: bool = False
    yes: bool = False
    processes: int = 1
    slurm: tuple[str, ...] = ()
    cluster: str = "slurm"
    live: bool = False
    progress: bool = True


def run_ablate(name: str, settings: AblateSettings) -> tuple[str, dict[str, Any]]:
    """Plan and run a study; returns (text, content of leaderboard.json).

    Raises:
        ValueError: a mistake in the study or the command, before any work; or a job that all runs
            build on failed.
        KeyboardInterrupt: what is done stays; the same command goes on.
    """
    study = read_study(name, settings.changes)
    if settings.seeds:
        study.seeds = list(settings.seeds)
    if settings.live:
        study.cache = None
    out = settings.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    planner = Planner(study, out)
    folder = StudyFolder(out)
    count = planned_runs(planner)
    check_configs(planner)
    if settings.dry_run:
        found = estimate(planner, count)
        return found.text(planner), found.figures()
    confirm(count, study.limits.runs, settings.yes)
    check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    execute = (
        Slurm(folder, parse_slurm(settings.slurm), settings.cluster)
        if settings.slurm or settings.cluster != "slurm"
        else Processes(folder, settings.processes)
    )
    try:
        with file_lock(out / "lock", wait=False):
            return _run(planner, folder, execute, settings)
    except BlockingIOError:
        raise ValueError(
            f"another `multikd ablate` is working in {out}: wait for it, or name another --out"
        ) from None


def _run(
    planner: Planner, folder: StudyFolder, execute: Any, settings: AblateSettings
) -> tuple[str, dict[str, Any]]:
    study, out = planner.study, settings.out
    begun = time.perf_counter()
    write_job(out, study.tasks, study.data, study.limits.hours)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} jobs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not settings.progress, console=Console(stderr=True)) as bar:
        watch = _Watch(planner, folder, bar)
        for stage in stages(planner, folder):
            folder.write_plan(planner, stage)
            folder.forget_failures(stage)
            watch.runs += [run for run in stage if run not in watch.runs]
            watch()
            if any(not folder.settled(run) for run in stage):
                execute(stage, watch)
            for run in stage:
                reasons = folder.failures(run)
                if run.kind != "run" and folder.result(run) is None and reasons:
                    raise ValueError(
                        f"the study's {run.kind} could not be made, on which all runs build: "
                        f"{reasons[-1]}"
                    )
    runs = watch.runs
    board = build_leaderboard(planner, folder, runs)
    paths = write_all(board, out)
    where = f"{time.perf_counter() - begun:.1f} s; " + ", ".join(str(path) for path in paths)
    return f"{terminal(board)}\n{where}", board


class _Watch:
    """Brings bar and leaderboard up to date whenever a run was settled."""

    def __init__(self, planner: Planner, folder: StudyFolder, bar: Progress) -> None:
        self.planner, self.folder, self.bar = planner, folder, bar
        self.runs: list[Run] = []
        self.task = bar.add_task("study", total=None)
        self.seen = -1

    def __call__(self) -> None:
        """Look."""
        done = sum(self.folder.settled(run) for run in self.runs)
        self.bar.update(self.task, completed=done, total=len(self.runs))
        if done != self.seen:
            self.seen = done
            write_all(build_leaderboard(self.planner, self.folder, self.runs), self.folder.out)


def confirm(count: int, most: int, yes: bool) -> None:
    """Ask before many runs, or refuse where nobody can answer.

    Raises:
        ValueError: nobody said yes.
    """
    if count <= most or yes:
        return
    sentence = f"the study has {count} runs, more than its limit of {most}"
    if sys.stdin is not None and sys.stdin.isatty():
        sys.stderr.write(f"{sentence}. Run them? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ValueError(
        f"{sentence}: add --yes to run them all, or take fewer subsets, levels or seeds "
        "(--dry-run says how long they take)"
    )


def check_configs(planner: Planner) -> None:
    """Parse the config of every setting once, and the task file, before anything is begun.

    Raises:
        ValueError: the first mistake, in one sentence.
    """
    from multikd.fit import parse_config
    from multikd.retention.taskfile import read_task_file

    read_task_file(planner.study.tasks, planner.study.data)
    seen: set[str] = set()
    for combination in planner.combinations():
        if combination.setting in seen or len(combination.subset) == 0:
            continue
        seen.add(combination.setting)
        config = planner.config(Run("run", combination, planner.study.seeds[0]))
        check_views(planner, config)
        try:
            parse_config(config)
        except ValueError as error:
            where = f" ({combination.setting})" if combination.setting else ""
            raise ValueError(f"the study {planner.study.path}{where}: {error}") from error


def check_views(planner: Planner, config: dict[str, Any]) -> None:
    """Refuse a shared cache without views that come back.

    Raises:
        ValueError: ``recorded`` is not set.
    """
    views = get(config, "data.train_views")
    first = views[0] if isinstance(views, list) and views else views
    recorded = get({"views": first}, "views.recorded")
    if planner.study.cache is not None and recorded is None:
        raise ValueError(
            f"the study {planner.study.path} shares a feature cache, which needs views that come "
            "back: add data.train_views.recorded: 2 to its settings, or cache: null"
        )


def split_seeds(text: str | None) -> tuple[int, ...] | None:
    """``0,1,2``.

    Raises:
        ValueError: not numbers.
    """
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--seeds takes numbers such as 0,1,2, received {text!r}") from error
