"""The retention matrix for a terminal: rows are tasks, columns encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_OURS = ("student", "head")
_ORDER = {"student": 0, "head": 1, "encoder": 2, "teacher": 3}


def results_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """Scores of every task and encoder, and of the student the share kept of the best teacher.

    Args:
        results: content of ``results.json``.
        width: columns of the terminal; None: as many as it has.

    Returns:
        Lines of text. In per cent where a task's unit says so; the best of each row in bold where
        the terminal can show that.
    """
    encoders = sorted(results["encoders"], key=lambda e: _ORDER.get(e["role"], 9))
    cells = {(c["task"], c["encoder"]): c for c in results["cells"]}
    rows = {row["task"]: row for row in results["matrix"]}
    table = Table(title="scores [and share of the best teacher kept]", title_justify="left")
    table.add_column("task", overflow="fold")
    for encoder in encoders:
        table.add_column(encoder["name"], justify="right", overflow="fold")
    for task in results["tasks"]:
        values = {e["name"]: _value(cells.get((task["name"], e["name"]))) for e in encoders}
        known = [value for value in values.values() if value is not None]
        best = (max if task["higher_is_better"] else min)(known, default=None)
        kept = rows.get(task["name"], {}).get("kept", {})
        words = [
            _cell(task, values[e["name"]], best, kept.get(e["name"]) if _ours(e) else None)
            for e in encoders
        ]
        unit = f" {task['unit']}" if task["unit"] else ""
        table.add_row(f"{task['name']} ({task['metric']}{unit})", *words)
    shares = results.get("mean", {})
    if any(_ours(e) and e["name"] in shares for e in encoders):
        table.add_section()
        table.add_row("mean share kept", *[_mean(shares.get(e["name"]), e) for e in encoders])
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _value(cell: Mapping[str, Any] | None) -> float | None:
    return None if cell is None else cell.get("value")


def _ours(encoder: Mapping[str, Any]) -> bool:
    return encoder["role"] in _OURS


def _cell(
    task: Mapping[str, Any],
    value: float | None,
    best: float | None,
    kept: Mapping[str, Any] | None,
) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:.1f}" if task["unit"] == "%" else f"{value:.3g}"
    if value == best:
        text = f"[bold]{text}[/bold]"
    return text if kept is None else f"{text}\n{_kept(kept)}"


def _mean(mean: Mapping[str, Any] | None, encoder: Mapping[str, Any]) -> str:
    return "" if mean is None or not _ours(encoder) else _kept(mean)


def _kept(kept: Mapping[str, Any]) -> str:
    """``98.2 % (97.0 … 99.3)``; empty where there is no share."""
    share, low, high = (kept.get(key) for key in ("share", "low", "high"))
    if share is None:
        return ""
    ends = "" if low is None or high is None else f"\n({100 * low:.1f} … {100 * high:.1f})"
    return f"{100 * share:.1f} %{ends}"
