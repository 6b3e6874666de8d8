"""What ``multikd sizes`` runs."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from multikd.errors import unknown_name
from multikd.files import file_lock, write_text_atomically
from multikd.retention.taskfile import read_task_file
from multikd.runs.folder import RunsFolder, check_place
from multikd.runs.overrides import get
from multikd.runs.tables import text_table
from multikd.sizes.rule import levelled_off, smallest_good
from multikd.sizes.run import (
    SizeRun,
    build_student,
    do_size,
    over_budget,
    size_config,
    student_cost,
)
from multikd.sizes.search import Search, read_search
from multikd.untrusted import read_json

COSTS = "costs.json"


@dataclass(frozen=True)
class SizesSettings:
    """What the command line asks for; see ``multikd sizes --help``."""

    out: Path
    changes: tuple[str, ...] = ()
    dry_run: bool = False
    progress: bool = True


def run_sizes(name: str, settings: SizesSettings) -> tuple[str, dict[str, Any]]:
    """Measure all sizes, and train them from the smallest up; returns (table, figures).

    Raises:
        ValueError: a mistake in the search or the command, before any work; no size is within the
            budget; or a run failed.
        KeyboardInterrupt: what is done stays; the same command goes on.
    """
    search, out = read_search(name, settings.changes), settings.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    tasks = read_task_file(search.tasks, tuple(search.data)).tasks
    if search.score not in tasks:
        raise unknown_name("task", search.score, tasks, f"(score of the search {search.path})")
    if not tasks[search.score].higher_is_better:
        raise ValueError(
            f"score {search.score!r} of {search.path} is better the lower: name another"
        )
    if settings.dry_run:
        costs = _measure(search, out, {})
        return _told(search, out, costs, dry=True)
    check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(out / "lock", wait=False):
            # Measured once: a second measurement could change which sizes are within the budget.
            students = _students(search, out)
            costs = _measure(search, out, _kept_costs(search, out, students))
            content = {"budget": repr(search.budget), "students": students, "costs": costs}
            write_text_atomically(out / COSTS, json.dumps(content, indent=1))
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            bar = Progress(*columns, disable=not settings.progress, console=Console(stderr=True))
            with bar:
                _train(search, out, costs, bar)
    except BlockingIOError:
        raise ValueError(
            f"another `multikd sizes` is working in {out}: wait for it, or name another --out"
        ) from None
    return _told(search, out, costs)


def _students(search: Search, out: Path) -> dict[str, str]:
    """Size → the student's part of its config: what its cost depends on, beside the budget."""
    configs = {n: size_config(search, SizeRun(n, search.seeds[0]), out) for n in search.sizes}
    return {n: json.dumps(get(c, "model.student"), default=str) for n, c in configs.items()}


def _kept_costs(search: Search, out: Path, students: dict[str, str]) -> dict[str, Any]:
    """Costs measured before, of sizes whose student is still the same."""
    try:
        content = read_json(out / COSTS)
        if content["budget"] != repr(search.budget):
            return {}
        had = content["students"]
        return {n: content["costs"][n] for n in students if had.get(n) == students[n]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measure(search: Search, out: Path, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Size → cost, from the fewest parameters up."""
    costs: dict[str, dict[str, Any]] = {}
    # All are built before any is measured, so that a mistake in the last one is said at once.
    students = {
        size: build_student(search, SizeRun(size, search.seeds[0]), out)
        for size in search.sizes
        if size not in known
    }
    for size in search.sizes:
        costs[size] = known.get(size) or student_cost(students[size], search.budget)
    return dict(sorted(costs.items(), key=lambda item: item[1]["parameters"]))


def _train(search: Search, out: Path, costs: dict[str, dict[str, Any]], bar: Progress) -> None:
    folders = RunsFolder(out, what="search")
    within = [size for size in costs if not over_budget(costs[size], search.budget)]
    if not within:
        size = next(iter(costs))
        raise ValueError(
            f"no size of {search.path} is within the budget; the smallest, {size!r}, takes "
            f"{over_budget(costs[size], search.budget)}: raise it, or add smaller sizes"
        )
    for size in within:
        for seed in search.seeds:
            run = SizeRun(size, seed)
            if folders.result(run) is not None:
                # Refuses where it was made with other settings than these.
                folders.put_config(run, size_config(search, run, out))
                continue
            task = bar.add_task(f"{run.name}: training and scoring", total=None)
            try:
                folders.write_result(run, do_size(search, run, out))
            except ValueError as error:
                raise ValueError(
                    f"the size {size!r} failed: {error}; the same command tries it again"
                ) from error
            bar.update(task, description=f"{run.name}: done", total=1, completed=1)
        scores = [value for _, value in _scores(search, out, costs)]
        if levelled_off(scores, search.tolerance, search.patience):
            return


def _scores(search: Search, out: Path, costs: dict[str, Any]) -> list[tuple[str, float]]:
    """(size, mean score) of the sizes that are done, up to the first that is not."""
    folders, found = RunsFolder(out), []
    for size in costs:
        if over_budget(costs[size], search.budget):
            continue
        results = [folders.result(SizeRun(size, seed)) for seed in search.seeds]
        values = [_value(search, size, r) for r in results if r is not None]
        if len(values) < len(results):
            break
        found.append((size, statistics.fmean(values)))
    return found


def _value(search: Search, size: str, result: dict[str, Any]) -> float:
    scores = result["scores"]
    if search.score not in scores:
        raise ValueError(
            f"the size {size!r} was scored on {', '.join(scores)}, and {search.path} decides by "
            f"{search.score!r}: name another --out, or remove the size's result.json to score it "
            "again"
        )
    return float(scores[search.score]["value"])


def _told(
    search: Search, out: Path, costs: dict[str, dict[str, Any]], dry: bool = False
) -> tuple[str, dict[str, Any]]:
    """The table of all sizes, and what ``--json`` writes."""
    folders = RunsFolder(out)
    scores = dict(_scores(search, out, costs))
    chosen = None
    if scores and not dry:
        chosen = list(scores)[smallest_good(list(scores.values()), search.tolerance)]
    rows, entries = [], []
    for size, cost in costs.items():
        why = over_budget(cost, search.budget)
        results = [folders.result(SizeRun(size, seed)) for seed in search.seeds]
        state = f"over budget: {why}" if why else ("" if size in scores else "not trained")
        entries.append(
            {"size": size, **cost, "over_budget": why, "score": scores.get(size)}
            | {"seeds": [None if r is None else r["scores"] for r in results]}
        )
        memory = cost["memory_mb"]
        rows.append(
            {
                "size": size + (" ←" if size == chosen else ""),
                "parameters": f"{cost['parameters'] / 1e6:.2f} M",
                "GMAC": "–" if cost["macs"] is None else f"{cost['macs'] / 1e9:.3f}",
                f"ms (batch {search.budget.batch})": f"{cost['latency_ms']:.2f}",
                "MB": "–" if memory is None else f"{memory:.0f}",
                search.score: f"{scores[size]:.4f}" if size in scores else state,
            }
        )
    first = next(iter(costs.values()))
    lines = [text_table(rows, f"sizes of {search.path.stem}")]
    lines.append(
        f"measured on {first['device']}"
        + ("" if first["threads"] is None else f", {first['threads']} threads")
    )
    rule = (
        f"the search ends after {search.patience} size(s) that gain less than {search.tolerance}; "
        "the answer is the smallest size less than that below the best"
    )
    lines.append(rule)
    lines.append("nothing was written" if dry else f"the answer: {chosen}")
    level = levelled_off(list(scores.values()), search.tolerance, search.patience)
    if not dry and not level:
        lines.append("the score had not levelled off at the largest size within the budget")
    figures = {"sizes": entries, "chosen": chosen, "levelled_off": level, "rule": rule}
    return "\n".join(lines), figures
