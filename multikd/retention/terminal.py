"""The retention matrix for a terminal: rows are tasks, columns encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_OURS = ("student", "head")
_ORDER = {"student": 0, "head": 1, "encoder": 2, "teacher": 3}
# Widest column of tasks, and of a name; longer ones are folded.
_TASK = 28
_NAME = 15
# "(95.3 … 101.2)"
_INTERVAL = 15


def results_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """Scores of every task and encoder, and of the student the share kept of the best teacher.

    Encoders are columns where all of them fit into the width, else lines below each task.

    Args:
        results: content of ``results.json``.
        width: columns of the terminal; None: as many as it has.

    Returns:
        Lines of text. In per cent where a task's unit says so; the best of each row in bold where
        the terminal can show that.
    """
    console = Console(width=width)
    encoders = sorted(results["encoders"], key=lambda e: _ORDER.get(e["role"], 9))
    make = _wide if _width(results, encoders) <= console.width else _long
    with console.capture() as capture:
        console.print(make(results, encoders))
    return capture.get()


def _wide(results: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]]) -> Table:
    """A column for every encoder."""
    cells = {(c["task"], c["encoder"]): c for c in results["cells"]}
    rows = {row["task"]: row for row in results["matrix"]}
    table = Table(title="scores, and the share of the best teacher kept", title_justify="left")
    table.add_column("task", overflow="fold", max_width=_TASK)
    for encoder in encoders:
        name = escape(encoder["name"])
        table.add_column(name, justify="right", overflow="fold", max_width=_NAME)
    for task in results["tasks"]:
        kept = rows.get(task["name"], {}).get("kept", {})
        best = _best(task, results["cells"])
        words = []
        for encoder in encoders:
            text = _cell(task, cells.get((task["name"], encoder["name"])), best)
            share = _kept(kept.get(encoder["name"])) if _ours(encoder) else ()
            words.append("\n".join((text, *share)))
        table.add_row(_title(task), *words)
    mean = results.get("mean", {})
    if any(_ours(e) and e["name"] in mean for e in encoders):
        table.add_section()
        words = ["\n".join(_kept(mean.get(e["name"])) if _ours(e) else ()) for e in encoders]
        table.add_row("mean share kept", *words)
    return table


def _long(results: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]]) -> Table:
    """A line for every encoder, below its task."""
    cells = {(c["task"], c["encoder"]): c for c in results["cells"]}
    rows = {row["task"]: row for row in results["matrix"]}
    table = Table()
    table.add_column("task, encoder", overflow="fold")
    for name in ("score", "kept of the best teacher", "95 % interval"):
        table.add_column(name, justify="right")
    for task in results["tasks"]:
        row = rows.get(task["name"], {})
        best = _best(task, results["cells"])
        table.add_section()
        table.add_row(_title(task))
        for encoder in encoders:
            name = encoder["name"]
            share = _kept(row.get("kept", {}).get(name)) if _ours(encoder) else ()
            if name == row.get("best_teacher"):
                share = ("best teacher",)
            cell = _cell(task, cells.get((task["name"], name)), best)
            table.add_row(f"  {escape(name)}", cell, *share)
    mean = results.get("mean", {})
    ours = [e["name"] for e in encoders if _ours(e) and e["name"] in mean]
    if ours:
        table.add_section()
        table.add_row("mean over tasks")
        for name in ours:
            table.add_row(f"  {escape(name)}", "", *_kept(mean[name]))
    return table


def _width(results: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]]) -> int:
    """Columns that the wide table takes, borders and padding included."""
    columns = [min(_TASK, max((len(_title(t)) for t in results["tasks"]), default=4))]
    for encoder in encoders:
        name = min(_NAME, max(6, len(encoder["name"])))
        columns.append(max(name, _INTERVAL) if _ours(encoder) else name)
    return 1 + sum(width + 3 for width in columns)


def _title(task: Mapping[str, Any]) -> str:
    unit = f" {task['unit']}" if task["unit"] else ""
    less = "" if task["higher_is_better"] else ", less is better"
    return escape(f"{task['name']} ({task['metric']}{unit}{less})")


def _best(task: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> float | None:
    known = [c["value"] for c in cells if c["task"] == task["name"] and c["value"] is not None]
    return (max if task["higher_is_better"] else min)(known, default=None)


def _ours(encoder: Mapping[str, Any]) -> bool:
    return encoder["role"] in _OURS


def _shown(task: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if task["unit"] == "%" else f"{value:.3g}"


def _cell(task: Mapping[str, Any], cell: Mapping[str, Any] | None, best: float | None) -> str:
    if cell is None:
        return "–"
    if cell["value"] is None:
        return "failed" if cell.get("error") else "–"
    text = _shown(task, cell["value"])
    return f"[bold]{text}[/bold]" if cell["value"] == best else text


def _kept(kept: Mapping[str, Any] | None) -> tuple[str, ...]:
    """``98.2 %`` and ``(97.0 … 99.3)``, as far as they are known."""
    share, low, high = ((kept or {}).get(key) for key in ("share", "low", "high"))
    if share is None:
        return ()
    if low is None or high is None:
        return (f"{100 * share:.1f} %",)
    return f"{100 * share:.1f} %", f"({100 * low:.1f} … {100 * high:.1f})"
