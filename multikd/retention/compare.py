"""``multikd evaluate --compare A/results.json B/results.json``: runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multikd.files import write_text_atomically
from multikd.retention.reading import Cell, Encoder, Results, TaskFacts, order, read_results

PAGE = "comparison.html"


@dataclass(frozen=True)
class Difference:
    """A later run's value minus the first's, with an interval where both values have one.

    The interval joins the two by square and add (Zou and Donner 2008, "MOVER"; for two shares
    Newcombe 1998, method 10), as of independent samples. Of the same test images the truth is
    narrower: the images' own answers, which a paired interval needs, are not in results.json.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Row:
    """One task and encoder over all runs; None where a run lacks it.

    Attributes:
        task: as the first run that has it describes it.
        encoder: the name the rows are matched by.
        ours: whether it is a student.
        cells: one a run.
        differences: one a run; None for the first, and where it can't be said.
    """

    task: TaskFacts
    encoder: str
    ours: bool
    cells: Sequence[Cell | None]
    differences: Sequence[Difference | None]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, each different.
        paths: of their files.
        runs: what is in them.
        rows: tasks × encoders.
        alone: task → names of the runs that have it, where not all do.
        notes: what makes rows hard to compare, one sentence each.
    """

    names: Sequence[str]
    paths: Sequence[Path]
    runs: Sequence[Results]
    rows: Sequence[Row]
    alone: Mapping[str, Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


def compare(paths: Sequence[str | Path], out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Compare the results of two or more evaluations, the first being the reference.

    Args:
        paths: ``results.json`` files, or the folders that hold them.
        out: folder for ``comparison.html``; None writes no page.

    Returns:
        The text for the terminal and the figures for ``--json``.

    Raises:
        ValueError: fewer than two files, one that can't be read or is of another format, or
            nothing that two of them have in common.
        MissingExtraError: a page is asked for and matplotlib is not installed.
        OSError: ``out`` can't be written to.
    """
    found = compare_runs([Path(path) for path in paths])
    figures = figures_of(found)
    text = text_of(found)
    if out is not None:
        from multikd.retention.compare_page import render

        write_text_atomically(out / PAGE, render(found))
        figures["page"] = str(out / PAGE)
        text += f"\npage  {out / PAGE}"
    return text, figures


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read and match; see :func:`compare`."""
    if len(paths) < 2:
        raise ValueError(
            f"--compare needs two or more results.json files, received {len(paths)}: "
            "multikd evaluate --compare A/results.json B/results.json"
        )
    runs = [read_results(path) for path in paths]
    names = run_names(paths)
    rows, notes = [], []
    facts = [{task.name: task for task in run.tasks} for run in runs]
    encoders = [_keys(run) for run in runs]
    tasks = list(dict.fromkeys(name for known in facts for name in known))
    for name in tasks:
        seen = [known.get(name) for known in facts]
        reference = next(task for task in seen if task is not None)
        comparable = [task is not None and _same_metric(reference, task) for task in seen]
        notes += _task_notes(names, seen)
        for key in list(dict.fromkeys(key for known in encoders for key in known)):
            members = [known.get(key) for known in encoders]
            cells = [
                None if member is None else run.cells.get((name, member.name))
                for run, member in zip(runs, members, strict=True)
            ]
            if all(cell is None or cell.value is None for cell in cells):
                continue
            differences = [
                difference(cells[0], cell)
                if number and comparable[0] and comparable[number]
                else None
                for number, cell in enumerate(cells)
            ]
            ours = any(member is not None and member.ours for member in members)
            rows.append(Row(reference, key, ours, cells, differences))
    alone = {
        name: [run for run, known in zip(names, facts, strict=True) if name in known]
        for name in tasks
        if not all(name in known for known in facts)
    }
    if all(len(having) == 1 for having in alone.values()) and len(alone) == len(tasks):
        listed = [
            f"{name}: {', '.join(known) or 'none'}"
            for name, known in zip(names, facts, strict=True)
        ]
        raise ValueError(
            f"{' and '.join(str(path) for path in paths)} have no task in common "
            f"({'; '.join(listed)}): evaluate both with the same task file"
        )
    notes += _encoder_notes(names, encoders)
    if alone and any(run.mean for run in runs):
        notes.append("the mean shares kept are over different tasks, so they don't compare")
    return Comparison(names, paths, runs, rows, alone, notes)


def difference(first: Cell | None, other: Cell | None) -> Difference | None:
    """``other − first`` of two values, joined by square and add where both have intervals."""
    if first is None or other is None or first.value is None or other.value is None:
        return None
    value = other.value - first.value
    ends = (first.low, first.high, other.low, other.high)
    if None in ends:
        return Difference(value)
    a_low, a_high, b_low, b_high = (float(end) for end in ends if end is not None)
    return Difference(
        value,
        value - math.hypot(other.value - b_low, a_high - first.value),
        value + math.hypot(b_high - other.value, first.value - a_low),
    )


def run_names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart: the file's folder, or more of the path."""
    folders = [path.absolute() if path.is_dir() else path.absolute().parent for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    names = [str(path) for path in paths]
    return names if len(set(names)) == len(names) else [f"{n} {i + 1}" for i, n in enumerate(names)]


def figures_of(found: Comparison) -> dict[str, Any]:
    """JSON values: shares in 0–1, None for what is missing."""

    def cell(value: Cell | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {"value": value.value, "low": value.low, "high": value.high}

    def change(value: Difference | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {"difference": value.value, "low": value.low, "high": value.high}

    return {
        "runs": [
            {
                "name": name,
                "path": str(path),
                "multikd": run.multikd,
                "created": run.created,
                "command": run.command,
                "mean": {key: dict(value) for key, value in run.mean.items()},
            }
            for name, path, run in zip(found.names, found.paths, found.runs, strict=True)
        ],
        "rows": [
            {
                "task": row.task.name,
                "encoder": row.encoder,
                "metric": row.task.metric,
                "unit": row.task.unit,
                "higher_is_better": row.task.higher_is_better,
                "values": [cell(value) for value in row.cells],
                "differences": [change(value) for value in row.differences],
            }
            for row in found.rows
        ],
        "alone": {name: list(runs) for name, runs in found.alone.items()},
        "notes": list(found.notes),
    }


def text_of(found: Comparison) -> str:
    """A table for the terminal: task, encoder, and the runs beside one another."""
    table = [["task", "encoder", *found.names]]
    for row in found.rows:
        unit = f" {row.task.unit}" if row.task.unit else ""
        cells = [
            shown_cell(row.task, cell, change)
            for cell, change in zip(row.cells, row.differences, strict=True)
        ]
        table.append([f"{row.task.name} ({row.task.metric}{unit})", row.encoder, *cells])
    for key, shares in mean_rows(found).items():
        cells = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
        table.append(["mean share kept", key, *cells])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        f"differences against {found.names[0]}, 95 % intervals as of independent images; * = the "
        "interval leaves 0 out"
    )
    lines += [f"only in {', '.join(runs)}: {name}" for name, runs in found.alone.items()]
    lines += [f"note: {note}" for note in found.notes]
    # Names come from files: none of them is to move the cursor of the terminal.
    return "\n".join(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in lines
    )


def shown_cell(task: TaskFacts, cell: Cell | None, change: Difference | None) -> str:
    """``85.6 (+1.3 [−0.4, +3.0])``."""
    if cell is None or cell.value is None:
        return "–"
    text = task.shown(cell.value)
    return text if change is None else f"{text} ({shown_difference(task, change)})"


def shown_difference(task: TaskFacts, change: Difference) -> str:
    """``+1.3 [−0.4, +3.0]``, with a star where the interval leaves 0 out."""

    def signed(value: float) -> str:
        text = f"{100 * value:+.1f}" if task.share else f"{value:+.3g}"
        return text.replace("-", "−")

    text = signed(change.value)
    if change.low is not None and change.high is not None:
        text += f" [{signed(change.low)}, {signed(change.high)}]" + "*" * change.resolved
    return text


def mean_rows(found: Comparison) -> dict[str, list[float | None]]:
    """Encoder → its mean share kept in each run."""
    keys = [_keys(run) for run in found.runs]
    names = dict.fromkeys(key for known in keys for key in known)
    rows = {
        key: [
            run.mean.get(known[key].name, {}).get("share") if key in known else None
            for run, known in zip(found.runs, keys, strict=True)
        ]
        for key in names
    }
    return {key: shares for key, shares in rows.items() if any(s is not None for s in shares)}


def _keys(run: Results) -> dict[str, Encoder]:
    """What encoders are matched by over the runs: a run's only student, whatever its name."""
    students = [e for e in run.encoders if e.role == "student"]
    keys: dict[str, Encoder] = {}
    for encoder in order(run.encoders):
        name = encoder.name
        head = encoder.facts.get("head")
        if len(students) == 1 and encoder.role == "student":
            name = "student"
        elif len(students) <= 1 and encoder.role == "head" and isinstance(head, str):
            name = f"student, head {head}"
        keys[encoder.name if name in keys else name] = encoder
    return keys


def _same_metric(a: TaskFacts, b: TaskFacts) -> bool:
    """Whether values may be subtracted at all."""
    same = (a.metric, a.unit, a.higher_is_better) == (b.metric, b.unit, b.higher_is_better)
    return same and a.images.get("test") == b.images.get("test") and a.protocol == b.protocol


def _task_notes(names: Sequence[str], seen: Sequence[TaskFacts | None]) -> list[str]:
    known = [(name, task) for name, task in zip(names, seen, strict=True) if task is not None]
    first_name, first = known[0]
    notes = []
    for name, task in known[1:]:
        changed = [
            f"{what} {before!r} and {after!r}"
            for what, before, after in (
                ("protocol", first.protocol, task.protocol),
                ("metric", first.metric, task.metric),
                ("data", first.data, task.data),
                ("images", dict(first.images), dict(task.images)),
                *(
                    (key, first.settings.get(key), task.settings.get(key))
                    for key in dict.fromkeys([*first.settings, *task.settings])
                ),
            )
            if before != after
        ]
        if changed:
            end = "" if _same_metric(first, task) else ", so no difference is given"
            notes.append(
                f"{first.name} is not the same in {first_name} and {name} "
                f"({'; '.join(changed[:4])}){end}"
            )
    return notes


def _encoder_notes(names: Sequence[str], encoders: Sequence[Mapping[str, Encoder]]) -> list[str]:
    """Teachers of one name with other weights or preprocessing."""
    notes = []
    for key in dict.fromkeys(key for known in encoders for key in known):
        prints = {
            name: known[key].fingerprint
            for name, known in zip(names, encoders, strict=True)
            if key in known and not known[key].ours and known[key].fingerprint
        }
        if len(set(prints.values())) > 1:
            notes.append(f"{key} has other weights or another input in {' and '.join(prints)}")
    return notes
