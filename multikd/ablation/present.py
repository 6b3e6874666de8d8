"""The leaderboard for people and machines: terminal, JSON, CSV, Markdown, LaTeX."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from multikd.ablation.leaderboard import RETENTION
from multikd.errors import MissingExtraError
from multikd.files import write_text_atomically

STEM = "leaderboard"
_WORDS = ("teachers", "setting", "teacher", "pair")


def write_all(board: Mapping[str, Any], out: Path) -> list[Path]:
    """Write every form of the leaderboard; each file is whole or not there.

    Raises:
        OSError: the folder can't be written to.
    """
    from multikd.ablation.page import render

    forms = {
        "json": json.dumps(board, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "csv": as_csv(board),
        "md": as_markdown(board),
        "tex": as_latex(board),
    }
    with contextlib.suppress(MissingExtraError):  # without matplotlib all but the page
        forms["html"] = render(board)
    paths = []
    for form, text in forms.items():
        paths.append(out / f"{STEM}.{form}")
        write_text_atomically(paths[-1], text)
    return paths


def columns_of(board: Mapping[str, Any]) -> list[str]:
    """Tasks, in the order of the task file."""
    return [task["name"] for task in board["tasks"]]


def shown(task: Mapping[str, Any] | None, value: float, digits: int = 1) -> str:
    """A score as the task's unit has it."""
    percent = task is None or task.get("unit") == "%"
    return f"{100 * value:.{digits}f}" if percent else f"{value:.3f}"


def cells_of(board: Mapping[str, Any], row: Mapping[str, Any], plus: str = " ± ") -> list[str]:
    """Text of a row, as :func:`heads_of` names its cells."""
    tasks = {task["name"]: task for task in board["tasks"]}

    def score(measure: str) -> str:
        found = row["scores"].get(measure)
        if found is None:
            return "–"
        task = None if measure == RETENTION else tasks[measure]
        text = shown(task, found["mean"])
        if found["deviation"] is not None:
            text += f"{plus}{shown(task, found['deviation'])}"
        return text

    pace = row["teacher_seconds_per_image"]
    return [
        "" if row["rank"] is None else str(row["rank"]),
        " + ".join(row["teachers"]) or "untrained student",
        row["setting"],
        score(RETENTION),
        behind(row["behind_best"]),
        *(score(name) for name in tasks),
        "–" if pace is None or not row["teachers"] else f"{1000 * pace:.1f}",
    ]


def behind(gap: Mapping[str, Any] | None) -> str:
    """The paired difference to the best combination, or that seeds are too few to say."""
    if gap is None or gap["difference"] is None:
        return ""
    text = f"{100 * gap['difference']:+.1f}".replace("-", "−")
    if gap["low"] is None:
        return f"{text} (one seed)"
    ends = f"[{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]".replace("-", "−")
    return f"{text} {ends}" + (" ?" if gap["says"] == "unresolved" else "")


def heads_of(board: Mapping[str, Any]) -> list[str]:
    """Titles of the columns."""
    return [
        "#", "teachers", "setting", "retention %", "− best, points (95 %)", *columns_of(board),
        "teachers' ms/image",
    ]  # fmt: skip


def terminal(board: Mapping[str, Any], width: int | None = None) -> str:
    """Leaderboard, worth of the teachers, and what failed."""
    console = Console(width=width or 140, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(_table("Leaderboard (mean ± deviation over seeds)", *_kept(board)))
        for setting in board["worth"]:
            table = worth_table(board, setting)
            if table is not None:
                console.print(_table(*table))
        pairs = interaction_rows(board)
        if pairs:
            console.print(
                _table("Interaction of pairs (above 0: together more)", ["pair", "points"], pairs)
            )
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*lines, *remarks(board)])


def worth_table(
    board: Mapping[str, Any], setting: Mapping[str, Any]
) -> tuple[str, list[str], list[list[str]]] | None:
    """Teachers × measures: what each adds, with its interval."""
    told = setting["measures"]
    measures = [m for m in (RETENTION, *columns_of(board)) if told.get(m, {}).get("values")]
    if not measures:
        return None
    method = setting["measures"][measures[0]]["method"]
    words = "Shapley value" if method == "shapley" else "all teachers − all but this one"
    title = f"What each teacher adds, in points: {words}"
    if setting["setting"]:
        title += f" ({setting['setting']})"
    tasks = {task["name"]: task for task in board["tasks"]}
    rows = []
    for name in board["teachers"]:
        cells = [name]
        for measure in measures:
            found = setting["measures"][measure]["values"].get(name)
            cells.append("–" if found is None else points(tasks.get(measure), found))
        rows.append(cells)
    if method == "shapley":
        cells = ["sum (= all − none)"]
        for measure in measures:
            cells.append(_signed(tasks.get(measure), setting["measures"][measure].get("sum")))
        rows.append(cells)
    return title, ["teacher", *measures], rows


def points(task: Mapping[str, Any] | None, found: Mapping[str, Any]) -> str:
    """A gain with its interval; ``?`` where the interval holds 0."""
    text = _signed(task, found["value"])
    if found["low"] is None:
        return f"{text} (one seed)"
    ends = f" [{_signed(task, found['low'])}, {_signed(task, found['high'])}]"
    return text + ends + (" ?" if found["says"] == "unresolved" else "")


def _signed(task: Mapping[str, Any] | None, value: float | None) -> str:
    if value is None:
        return "–"
    percent = task is None or task.get("unit") == "%"
    return (f"{100 * value:+.2f}" if percent else f"{value:+.4f}").replace("-", "−")


def interaction_rows(board: Mapping[str, Any]) -> list[list[str]]:
    """Pairs with their interaction in retention, of every setting."""
    rows = []
    for setting in board["worth"]:
        for pair in setting["measures"].get(RETENTION, {}).get("interactions", []):
            name = " × ".join(pair["pair"])
            rows.append(
                [f"{name} ({setting['setting']})" if setting["setting"] else name,
                 points(None, pair)]
            )  # fmt: skip
    return rows


def remarks(board: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides the figures."""
    progress = board["progress"]
    lines = [f"{progress['done']} of {progress['runs']} runs are done"]
    seeds = len(board["seeds"])
    if seeds < 2:
        lines.append("one seed: no interval, and no difference is resolved; give more seeds")
    elif seeds < 5:
        lines.append(
            f"{seeds} seeds: intervals are wide (Student's t with {seeds - 1} degrees of freedom); "
            "? marks what they don't resolve"
        )
    best = [row["label"] for row in board["rows"] if row["pareto"]]
    if best:
        lines.append(f"Pareto front (retention against teachers' cost): {', '.join(best)}")
    lines += [f"failed: {name}: {reason}" for name, reason in progress["failed"].items()]
    return lines


def as_csv(board: Mapping[str, Any]) -> str:
    """One line a combination and seed."""
    tasks = columns_of(board)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["label", "teachers", "setting", "seed", RETENTION, *tasks, "rank",
         "teacher_seconds_per_image", "pareto"]
    )  # fmt: skip
    for row in board["rows"]:
        for seed, values in row["by_seed"].items():
            writer.writerow(
                [row["label"], "+".join(row["teachers"]), row["setting"], seed,
                 values.get(RETENTION, ""), *(values.get(t, "") for t in tasks), row["rank"] or "",
                 row["teacher_seconds_per_image"] or "", int(row["pareto"])]
            )  # fmt: skip
    return out.getvalue()


def as_markdown(board: Mapping[str, Any]) -> str:
    """Tables for a README."""
    parts = [_markdown(*_kept(board))]
    for setting in board["worth"]:
        table = worth_table(board, setting)
        if table is not None:
            parts.append(f"{table[0]}\n\n{_markdown(*table[1:])}")
    pairs = interaction_rows(board)
    if pairs:
        parts.append(f"Interaction of pairs, in points\n\n{_markdown(['pair', 'points'], pairs)}")
    parts.append("\n".join(f"- {line}" for line in remarks(board)))
    return "\n\n".join(parts) + "\n"


def as_latex(board: Mapping[str, Any]) -> str:
    """A ``tabular`` for a paper (booktabs)."""
    heads, rows = _kept(board, r" $\pm$ ")
    lines = [
        r"\begin{tabular}{"
        + "rll"[: 3 if "setting" in heads else 2]
        + "r" * (len(heads) - 3)
        + "r}",
        r"\toprule",
        " & ".join(_tex(head) for head in heads) + r" \\",
        r"\midrule",
        *(" & ".join(_tex(c) for c in cells) + r" \\" for cells in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    keep = r" $\pm$ "
    parts = []
    for part in text.split(keep):
        for sign, written in (
            ("\\", r"\textbackslash "), ("%", r"\%"), ("&", r"\&"), ("#", r"\#"), ("_", r"\_"),
            ("$", r"\$"), ("{", r"\{"), ("}", r"\}"), ("−", "$-$"), ("–", "--"),
        ):  # fmt: skip
            part = part.replace(sign, written)
        parts.append(part)
    return keep.join(parts)


def _kept(board: Mapping[str, Any], plus: str = " ± ") -> tuple[list[str], list[list[str]]]:
    """Titles and rows without a column that is empty throughout (settings, mostly)."""
    heads = heads_of(board)
    rows = [cells_of(board, row, plus) for row in board["rows"]]
    columns = [i for i, _ in enumerate(heads) if i != 2 or any(row[2] for row in rows)]
    return [heads[i] for i in columns], [[row[i] for i in columns] for row in rows]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)])


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        left = head in _WORDS
        table.add_column(head, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
