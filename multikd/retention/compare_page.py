"""The page of a comparison: runs side by side, in one HTML file."""

from __future__ import annotations

from html import escape

from multikd.pages import charts
from multikd.pages.canvas import BAD, GOOD, OTHER
from multikd.pages.charts import Bar, BarGroup
from multikd.pages.html import cell, document, header, picture, row, section, table
from multikd.retention.compare import Comparison, mean_rows, shown_difference
from multikd.retention.page import percent


def render(found: Comparison) -> str:
    """The page as a string."""
    parts = [
        ("Scores", _scores(found)),
        ("Change of the students", _changes(found)),
        ("What only some runs have", _alone(found)),
        ("How they were made", _making(found)),
    ]
    title = "multikd: " + " and ".join(found.names)
    head = (
        f"<h1>{escape(', '.join(found.names))}</h1>\n"
        f"<p>Differences are against {escape(found.names[0])}.</p>"
        + "".join(f"<p>Note: {escape(note)}.</p>" for note in found.notes)
    )
    sections = [head] + [section(name, markup) for name, markup in parts if markup]
    return document(title, sections, broad=True)


def _scores(found: Comparison) -> str:
    head = [header("task"), *(header(name) for name in found.names)]
    rows = []
    for line in found.rows:
        task = line.task
        kind = "student" if line.ours else ""
        cells = []
        for value, change in zip(line.cells, line.differences, strict=True):
            if value is None or value.value is None:
                cells.append(cell("–", kind=kind))
                continue
            notes = []
            if value.low is not None and value.high is not None:
                notes.append(f"[{task.shown(value.low)}, {task.shown(value.high)}]")
            if change is not None:
                notes.append(shown_difference(task, change))
            cells.append(cell(task.shown(value.value), notes, kind))
        arrow = "" if task.higher_is_better else ", lower is better"
        unit = f"{task.metric} {task.unit}".strip() + arrow
        rows.append(row(task.name, cells, f"{line.encoder}; {unit}"))
    for key, shares in mean_rows(found).items():
        cells = [cell("–" if share is None else percent(share)) for share in shares]
        rows.append(row("mean share kept", cells, key))
    return table(head, rows, "stuck") + (
        '<p class="small">Signed: the difference from the first run with a 95 % interval as of '
        "independent images, which is wider than a paired one; a star where it leaves 0 out.</p>"
    )


def _changes(found: Comparison) -> str:
    """Bars of the differences of shares, a group a task."""
    charts_shown = []
    for number, name in enumerate(found.names):
        groups = []
        for line in found.rows:
            change = line.differences[number]
            if change is None or not line.ours or not line.task.share:
                continue
            better = change.value > 0 if line.task.higher_is_better else change.value < 0
            colour = OTHER if not change.resolved else GOOD if better else BAD
            title = f"{line.task.name}: {line.encoder}"
            groups.append(
                BarGroup(title, [Bar(line.encoder, change.value, change.low, change.high, colour)])
            )
        if groups:
            # Coloured where the sign is known; a bar to the right is not better for every metric.
            chart = charts.gains(groups, f"{name}: change in points", own_colours=True)
            alt = f"Change from {found.names[0]} to {name} by task, in points"
            charts_shown.append(f"<div>{picture(chart, alt)}</div>")
    if not charts_shown:
        return ""
    return f'<div class="pair">{"".join(charts_shown)}</div>' + (
        '<p class="small">Green is better, red is worse, grey can’t be told from no change.</p>'
    )


def _alone(found: Comparison) -> str:
    lines = [
        f"<li>{escape(name)}: only in {escape(', '.join(runs))}</li>"
        for name, runs in found.alone.items()
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _making(found: Comparison) -> str:
    head = [header(text) for text in ("run", "file", "command", "made", "multikd")]
    rows = [
        row(name, [cell(v or "–") for v in (str(path), run.command, run.created, run.multikd)])
        for name, path, run in zip(found.names, found.paths, found.runs, strict=True)
    ]
    return table(head, rows, "makers")
