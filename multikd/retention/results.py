"""``results.json`` and its CSV: everything that was measured, for machines.

Values are shares in 0–1 where the unit is %; what is missing is null, and nothing is NaN.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from multikd import __version__
from multikd.evaluation.task import Task, TaskResult
from multikd.files import write_text_atomically
from multikd.retention.matrix import (
    CONFIDENCE,
    RESAMPLES,
    MatrixRow,
    Measured,
    matrix_row,
    mean_kept,
    pareto,
)
from multikd.retention.reading import FORMAT
from multikd.types import EncoderSpec

OURS = ("student", "head")
# A cost that every encoder has, the first of these: (its place in `cost`, what the page calls it).
_COSTS = (
    (("latency_ms", "1", "p50"), "latency of one image, ms (p50)"),
    (("macs",), "multiply-adds of one image"),
    (("parameters",), "parameters"),
)
CSV_COLUMNS = (
    *("task", "protocol", "data", "metric", "unit", "higher_is_better", "encoder", "role"),
    *("value", "low", "high", "best_teacher", "best_value", "share", "share_low", "share_high"),
    *("difference", "difference_low", "difference_high", "seconds", "error"),
)


class ScoredCell(Protocol):
    """One task on one encoder, as the run made it."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def encoder(self) -> str:
        """Its name."""

    @property
    def result(self) -> TaskResult | None:
        """None where the task failed, or does not apply."""

    @property
    def error(self) -> str | None:
        """Why it failed."""

    @property
    def seconds(self) -> float:
        """Of scoring."""


def encoder_entry(
    name: str,
    role: str,
    spec: EncoderSpec,
    *,
    fingerprint: str = "",
    source: str = "",
    head: str | None = None,
    cost: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``encoders`` says of one column."""
    return {
        "name": name,
        "role": role,
        "head": head,
        "source": source or spec.source,
        "fingerprint": fingerprint,
        "licence": spec.licence,
        "image_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "widths": {"summary": spec.widths.summary, "patches": spec.widths.patches},
        "cost": None if cost is None else jsonable(cost),
    }


def task_entry(name: str, task: Task, images: Mapping[str, int]) -> dict[str, Any]:
    """What ``tasks`` says of one row: the protocol, its source, its settings."""
    kind = type(task)
    hidden = {
        "data",
        "teachers",
        "metric",
        "unit",
        "higher_is_better",
        "in_mean",
        "tokens",
        "splits",
    }
    settings = {k: v for k, v in vars(task).items() if k not in hidden and not k.startswith("_")}
    lines = (kind.__doc__ or "").strip().splitlines()
    return {
        "name": name,
        "protocol": kind.__name__,
        "source": str(getattr(kind, "source", "") or (lines[0] if lines else "")),
        "metric": task.metric,
        "unit": task.unit,
        "higher_is_better": task.higher_is_better,
        "in_mean": task.in_mean,
        "data": task.data,
        "images": {split: int(count) for split, count in images.items()},
        "settings": jsonable(settings),
    }


def build_results(
    encoders: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    cells: Sequence[ScoredCell],
    *,
    command: str = "",
    created: str | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything of ``results.json``, ready for JSON.

    Args:
        encoders: of :func:`encoder_entry`, in the order of the columns.
        tasks: of :func:`task_entry`, in the order of the rows.
        cells: at most one for every task and encoder.
        command: what was typed.
        created: ISO time; now by default.
        resamples: bootstrap draws.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        ValueError: a cell of an encoder or task that is not listed, or two of one place.
    """
    by_place = _places(encoders, tasks, cells)
    roles = {str(e["name"]): str(e["role"]) for e in encoders}
    teachers = [name for name, role in roles.items() if role == "teacher"]
    rows: dict[str, MatrixRow] = {}
    for task in tasks:
        name = str(task["name"])
        measured = {
            encoder: Measured(cell.result.value, cell.result.per_sample, cell.result.statistic)
            for encoder in roles
            if (cell := by_place.get((name, encoder))) is not None
            and cell.result is not None
            and math.isfinite(cell.result.value)
        }
        rows[name] = matrix_row(
            measured,
            teachers,
            higher_is_better=bool(task["higher_is_better"]),
            data=str(task["data"]),
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
    counted = [rows[str(t["name"])] for t in tasks if t.get("in_mean", True)]
    points, label = _pareto(encoders, tasks, by_place, teachers)
    ours = [n for n, role in roles.items() if role in OURS] or [
        n for n, role in roles.items() if role == "encoder"
    ]
    others = [n for n in roles if n not in teachers]
    return {
        "format": FORMAT,
        "multikd": __version__,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "bootstrap": {"resamples": resamples, "confidence": confidence, "seed": seed},
        "encoders": [dict(jsonable(e)) for e in encoders],
        "tasks": [dict(jsonable(t)) for t in tasks],
        "cells": [
            _cell(cell, rows[task].values.get(encoder))
            for task in rows
            for encoder in roles
            if (cell := by_place.get((task, encoder))) is not None
        ],
        "matrix": [
            {
                "task": name,
                "best_teacher": row.best_teacher,
                "best_value": row.best_value,
                "kept": {n: dataclasses.asdict(k) for n, k in row.kept.items()},
            }
            for name, row in rows.items()
        ],
        "mean": {
            n: dataclasses.asdict(mean)
            for n in others
            if (mean := mean_kept(counted, n, confidence)).tasks
        },
        "pareto": points,
        "pareto_cost": label,
        "scores": _scores(tasks, by_place, ours),
        "retention": _retention(tasks, rows, by_place, ours),
        "groups": _groups(tasks, by_place, ours),
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json`` and ``results.csv`` into ``folder``; each is whole or not there.

    Raises:
        ValueError: a value that JSON has no number for.
        OSError: the folder can't be written to.
    """
    paths = [folder / "results.json", folder / "results.csv"]
    # allow_nan: what slipped through would be no JSON, and no reader's fault.
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomically(paths[0], text + "\n")
    write_text_atomically(paths[1], results_csv(results))
    return paths


def results_csv(results: Mapping[str, Any]) -> str:
    """One line for every cell, the student's with what it kept of the best teacher."""
    tasks = {t["name"]: t for t in results["tasks"]}
    roles = {e["name"]: e["role"] for e in results["encoders"]}
    rows = {row["task"]: row for row in results["matrix"]}
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for cell in results["cells"]:
        row = rows[cell["task"]]
        kept = row["kept"].get(cell["encoder"]) or {}
        writer.writerow(
            {
                **kept,  # its low and high are of the share, and give way to the cell's
                **tasks[cell["task"]],
                **cell,
                "task": cell["task"],
                "role": roles[cell["encoder"]],
                "best_teacher": row["best_teacher"],
                "best_value": row["best_value"],
                "share_low": kept.get("low"),
                "share_high": kept.get("high"),
            }
        )
    return out.getvalue()


def jsonable(value: Any) -> Any:
    """``value`` out of plain JSON types: arrays become lists, what is not finite becomes None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, torch.Tensor):
        return jsonable(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        entries = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [jsonable(entry) for entry in entries]
    return str(value)


def _places(
    encoders: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    cells: Sequence[ScoredCell],
) -> dict[tuple[str, str], ScoredCell]:
    known = {str(t["name"]) for t in tasks}, {str(e["name"]) for e in encoders}
    if len(known[0]) != len(tasks) or len(known[1]) != len(encoders):
        raise ValueError("names of tasks and of encoders must each be unique: rename one")
    found: dict[tuple[str, str], ScoredCell] = {}
    for cell in cells:
        place = cell.task, cell.encoder
        if cell.task not in known[0] or cell.encoder not in known[1] or place in found:
            raise ValueError(
                f"the results need one cell for a listed task and encoder, received {place} "
                + ("twice" if place in found else "which are not listed")
            )
        found[place] = cell
    return found


def _cell(cell: ScoredCell, ends: tuple[float, float] | None) -> dict[str, Any]:
    result = cell.result
    low, high = ends or (None, None)
    value = None if result is None else jsonable(float(result.value))
    error = cell.error
    if result is not None and value is None and error is None:
        error = "the score is not a finite number"
    return {
        "task": cell.task,
        "encoder": cell.encoder,
        "value": value,
        "low": low,
        "high": high,
        "metrics": {} if result is None else jsonable(result.metrics),
        "details": {} if result is None else jsonable(result.details),
        "seconds": jsonable(float(cell.seconds)),
        "error": error,
    }


def _value(places: Mapping[tuple[str, str], ScoredCell], task: str, encoder: str) -> float | None:
    cell = places.get((task, encoder))
    if cell is None or cell.result is None or not math.isfinite(cell.result.value):
        return None
    return float(cell.result.value)


def _pareto(
    encoders: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[str, str], ScoredCell],
    teachers: Sequence[str],
) -> tuple[list[dict[str, Any]], str | None]:
    """Mean share of the best teacher's score (without teachers: of the best score) against cost.

    Over the tasks that all encoders with a cost were scored on, so that means are comparable.
    """
    for path, label in _COSTS:
        costs = {str(e["name"]): c for e in encoders if (c := _at(e.get("cost"), path)) is not None}
        if len(costs) < 2:
            continue
        shares: dict[str, list[float]] = {name: [] for name in costs}
        for task in tasks:
            if not task.get("in_mean", True):
                continue
            values = {
                name: Measured(value)
                for name in costs
                if (value := _value(places, task["name"], name)) is not None
            }
            if len(values) < len(costs):
                continue
            references = [n for n in teachers if n in values] or list(values)
            higher = bool(task["higher_is_better"])
            best = (max if higher else min)(values[n].value for n in references)
            row = matrix_row(
                {**values, "": Measured(best)}, [""], higher_is_better=higher, resamples=1
            )
            if all(row.kept[n].share is not None for n in values):
                for name in values:
                    shares[name].append(row.kept[name].share or 0.0)
        if not all(shares.values()):
            return [], None
        scores = {name: math.fsum(found) / len(found) for name, found in shares.items()}
        return [dataclasses.asdict(point) for point in pareto(scores, costs)], label
    return [], None


def _at(cost: Any, path: Sequence[str]) -> float | None:
    for key in path:
        cost = cost.get(key) if isinstance(cost, Mapping) else None
    number = jsonable(cost)
    return float(number) if isinstance(number, int | float) and number > 0 else None


def _scores(
    tasks: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[str, str], ScoredCell],
    ours: Sequence[str],
) -> dict[str, float]:
    """For the model card, which shows shares as per cent: other units are left to the matrix."""
    return {
        f"{task['name']} ({name})": value
        for task in tasks
        if task["unit"] == "%"
        for name in ours
        if (value := _value(places, task["name"], name)) is not None
    }


def _retention(
    tasks: Sequence[Mapping[str, Any]],
    rows: Mapping[str, MatrixRow],
    places: Mapping[tuple[str, str], ScoredCell],
    ours: Sequence[str],
) -> list[dict[str, Any]]:
    """Rows of the card: score, best teacher, share kept; for every task that was scored."""
    table = []
    for task in tasks:
        row = rows[task["name"]]
        if row.best_teacher is None:
            continue
        entry: dict[str, Any] = {"task": task["name"], "metric": task["metric"]}
        for name in ours:
            entry[name] = _value(places, task["name"], name)
            entry[f"{name} kept"] = _kept_text(row, name)
        table.append(
            {**entry, "best teacher": row.best_teacher, "best teacher's score": row.best_value}
        )
    return table


def _kept_text(row: MatrixRow, name: str) -> str | None:
    kept = row.kept.get(name)
    if kept is None or kept.share is None:
        return None
    text = f"{100 * kept.share:.1f} %"
    if kept.low is None or kept.high is None:
        return text
    return f"{text} [{100 * kept.low:.1f}, {100 * kept.high:.1f}]"


def _groups(
    tasks: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[str, str], ScoredCell],
    ours: Sequence[str],
) -> list[dict[str, Any]]:
    """Rows of the card: a metric for every group of every column of metadata."""
    table = []
    for task in tasks:
        for name in ours:
            cell = places.get((task["name"], name))
            columns = {} if cell is None or cell.result is None else cell.result.details
            for column, scores in (columns.get("groups") or {}).items():
                for group, score in scores["groups"].items():
                    table.append(
                        {
                            "task": task["name"],
                            "encoder": name,
                            "column": str(column),
                            "group": str(group),
                            "value": jsonable(score["value"]),
                            "low": jsonable(score["low"]),
                            "high": jsonable(score["high"]),
                            "images": int(score["count"]),
                        }
                    )
    return table
