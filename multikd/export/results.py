"""What ``multikd evaluate`` measured of a student, as the tables of its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multikd.backbones.digest import fingerprint
from multikd.students import StudentEncoder

FORMAT = 1
Row = dict[str, Any]
_PLAIN = ("scores", "retention", "groups")


@dataclass(frozen=True)
class CardResults:
    """Tables for a card; every row is column → value, numbers already worded.

    Attributes:
        scores: what was measured without a teacher beside it → share in 0–1.
        retention: a row a task, with what is kept of the best teacher; the mean at the end.
        costs: a row an encoder and deployed file.
        gaps: worst group and gap, a row a task and column of metadata.
        groups: every group's score.
        source: command and version that measured it.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    retention: Sequence[Row] = ()
    costs: Sequence[Row] = ()
    gaps: Sequence[Row] = ()
    groups: Sequence[Row] = ()
    source: str = ""


def read_results(path: Path | None) -> dict[str, Any]:
    """The content of a ``results.json``, or of a hand-made file with the tables alone.

    Raises:
        ValueError: no such file, another format, or nothing for a card in it.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the results {path} can't be read ({error})") from error
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"the results {path} have the format {content['format']!r}, expected {FORMAT}: measure "
            "again with this version's `multikd evaluate`"
        )
    names = ("encoders", "tasks", "cells", "matrix") if _measured(content) else _PLAIN[1:]
    right = isinstance(content, dict) and all(_rows(content.get(name, [])) for name in names)
    right = right and isinstance(content.get("scores", {}), dict)
    if not right or not (_measured(content) or set(_PLAIN) & set(content)):
        raise ValueError(
            f"{path} holds no results for a card: expected what `multikd evaluate` writes, or a "
            "JSON object with 'scores' (name → value), 'retention' or 'groups' (lists of rows)"
        )
    return dict(content)


def card_results(content: Mapping[str, Any], student: StudentEncoder, path: Path) -> CardResults:
    """The tables of a card from the content of a results file.

    Args:
        content: of :func:`read_results`.
        student: as it is exported; results of other weights are refused.
        path: the file, for messages.

    Raises:
        ValueError: they were measured on another student, or lack a part.
    """
    if not _measured(content):
        return CardResults(
            content.get("scores", {}),
            content.get("retention", ()),
            groups=content.get("groups", ()),
        )
    own = _own_columns(content, student, path)
    try:
        return _tables(content, own)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the results {path} are damaged ({type(error).__name__}: {error}): measure again with "
            "`multikd evaluate`"
        ) from error


def _measured(content: Any) -> bool:
    return isinstance(content, dict) and "encoders" in content


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _own_columns(
    content: Mapping[str, Any], student: StudentEncoder, path: Path
) -> list[Mapping[str, Any]]:
    """The student's column, and those of its heads."""
    own = fingerprint([student], student.spec)
    students = [e for e in content["encoders"] if e.get("role") in ("student", "encoder")]
    found = [e for e in students if e.get("fingerprint") == own]
    if not found:
        others = ", ".join(
            f"{e.get('name')} ({e.get('source')}, {str(e.get('fingerprint'))[:12]})"
            for e in students
        )
        raise ValueError(
            f"the results {path}, written by multikd {content.get('multikd', 'unknown')}, are of "
            f"{others or 'no student'}, and this student is {own[:12]}: evaluate this checkpoint "
            "with the same weights (EMA or raw), or leave out --results"
        )
    name = str(found[0]["name"])
    heads = [
        e
        for e in content["encoders"]
        if e.get("role") == "head" and e.get("source") == found[0].get("source")
    ]
    return [found[0], *(h for h in heads if str(h["name"]).startswith(f"{name}+"))]


def _tables(content: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> CardResults:
    tasks = {str(task["name"]): task for task in content["tasks"]}
    cells = {(cell["task"], cell["encoder"]): cell for cell in content["cells"]}
    matrix = {row["task"]: row for row in content.get("matrix", [])}
    scores: dict[str, float] = {}
    retention: list[Row] = []
    groups: list[Row] = []
    gaps: list[Row] = []
    for task_name, task in tasks.items():
        row = matrix.get(task_name) or {}
        for encoder in own:
            cell = cells.get((task_name, encoder["name"]))
            if cell is None or cell["value"] is None:
                continue
            title = f"{task_name} ({encoder['name']})" if len(own) > 1 else task_name
            if row.get("best_teacher") is None and task["unit"] == "%":
                scores[title] = cell["value"]
            else:
                retention.append({"task": title} | _kept_row(task, row, encoder["name"], cell))
            for column, found in ((cell.get("details") or {}).get("groups") or {}).items():
                rows = _group_rows(task, title, column, found["groups"])
                groups += rows
                gaps += _gap(task, title, column, found)
    for encoder in own:
        mean = (content.get("mean") or {}).get(encoder["name"])
        if mean and mean.get("share") is not None:
            retention.append(
                {
                    "task": f"**mean of {mean['tasks']} tasks** ({encoder['name']})",
                    "kept of the best teacher": _interval(mean, "share", "%"),
                }
            )
    command, version = content.get("command"), content.get("multikd", "unknown")
    source = f"Measured by multikd {version}" + (f" with `{command}`." if command else ".")
    return CardResults(scores, retention, _costs(content["encoders"], own), gaps, groups, source)


def _kept_row(
    task: Mapping[str, Any], row: Mapping[str, Any], name: str, cell: Mapping[str, Any]
) -> Row:
    unit = task["unit"]
    kept = (row.get("kept") or {}).get(name) or {}
    teacher = row.get("best_teacher")
    best = "" if teacher is None else f"{teacher}, {_worded(row.get('best_value'), unit)}"
    return {
        "measured": task["metric"] + ("" if task["higher_is_better"] else " (less is better)"),
        "this student [95 %]": _interval(cell, "value", unit),
        "best teacher": best,
        "kept of the best teacher": _interval(kept, "share", "%"),
    }


def _group_rows(
    task: Mapping[str, Any], title: str, column: str, found: Mapping[str, Any]
) -> list[Row]:
    return [
        {
            "task": title,
            "by": column,
            "group": f"{group} (few images)" if score.get("small") else group,
            f"{task['metric']} [95 %]": _interval(score, "value", task["unit"]),
            "images": score.get("count"),
        }
        for group, score in found.items()
    ]


def _gap(task: Mapping[str, Any], title: str, column: str, found: Mapping[str, Any]) -> list[Row]:
    """The row of one column; none where fewer than two groups have images enough."""
    worst, best, gap = (found.get(key) for key in ("worst", "best", "gap"))
    if worst is None or best is None or gap is None:
        return []
    unit = task["unit"]
    ends = {"gap": gap, "low": found.get("gap_low"), "high": found.get("gap_high")}
    groups = found["groups"]
    return [
        {
            "task": title,
            "by": column,
            "worst group": f"{worst}: {_interval(groups[worst], 'value', unit)}",
            "best group": f"{best}: {_interval(groups[best], 'value', unit)}",
            "gap [95 %]": _interval(ends, "gap", unit),
        }
    ]


def _costs(encoders: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    names = {encoder["name"] for encoder in own}
    for encoder in encoders:
        cost = encoder.get("cost")
        if not cost or (encoder["name"] not in names and encoder.get("role") != "teacher"):
            continue
        rows.append(_cost(str(encoder["name"]), cost))
        rows += [_cost(f"{encoder['name']}, {d['format']}", d) for d in cost.get("deployed") or []]
    return rows


def _cost(name: str, cost: Mapping[str, Any]) -> Row:
    latency, speed = cost.get("latency_ms") or {}, cost.get("images_per_second") or {}
    one = latency.get("1") or {}
    figures = {
        "parameters": (cost.get("parameters"), 1e-6, "{:,.1f} M"),
        "multiply-adds": (cost.get("macs"), 1e-6, "{:,.0f} M"),
        "ms, batch 1 (p50)": (one.get("p50"), 1, "{:.2f}"),
        "(p95)": (one.get("p95"), 1, "{:.2f}"),
        "images/s, batch 32": (speed.get("32"), 1, "{:,.0f}"),
        "peak memory": (cost.get("peak_memory_mb"), 1, "{:,.0f} MB"),
    }
    worded = {k: None if v is None else form.format(v * f) for k, (v, f, form) in figures.items()}
    return {"encoder": name, **worded, "on": cost.get("device")}


def _interval(row: Mapping[str, Any], key: str, unit: str) -> str:
    value, low, high = row.get(key), row.get("low"), row.get("high")
    text = _worded(value, unit)
    if value is None or low is None or high is None:
        return text
    if unit == "%":
        return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} [{low:.4g}, {high:.4g}]"


def _worded(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.4g} {unit}".strip()
