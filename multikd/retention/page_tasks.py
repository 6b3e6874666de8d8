"""What the page says of one task: figures by encoder, class and group, confusions and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from multikd.pages import charts
from multikd.pages.charts import Line, Panel
from multikd.pages.html import cell, header, picture, row, table
from multikd.retention.curves import Curve, curves_of
from multikd.retention.reading import (
    Cell,
    Encoder,
    Results,
    TaskFacts,
    mapping,
    number,
    order,
)

CLASSES_SHOWN = 20
_CONFUSED_SHOWN = 200


def task_section(results: Results, task: TaskFacts, colours: Mapping[str, str]) -> str:
    """Everything that was measured on ``task``, as markup."""
    cells = {
        encoder: found
        for encoder in order(results.encoders)
        if (found := results.cells.get((task.name, encoder.name))) is not None
    }
    if not cells:
        return ""
    charts_shown = _curves(task, cells, colours) + _confusions(results, task, cells)
    return (
        _about(task)
        + "".join(
            f"<p>{escape(encoder.name)}: {escape(found.error)}</p>"
            for encoder, found in cells.items()
            if found.error
        )
        + _metrics(task, cells)
        + _per_class(results, task, cells)
        + _groups(task, cells)
        + (f'<div class="pair">{"".join(charts_shown)}</div>' if charts_shown else "")
    )


def _about(task: TaskFacts) -> str:
    said = [f"{task.protocol or 'a protocol'}{f' ({task.source})' if task.source else ''}"]
    images = ", ".join(f"{count:,} {split}" for split, count in task.images.items())
    said.append(f"{task.metric}{f' in {task.unit}' if task.unit else ''}")
    if task.data:
        said.append(f"data {task.data}" + (f" with {images} images" if images else ""))
    elif images:
        said.append(f"{images} images")
    text = "; ".join(said)
    settings = ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in task.settings.items()
        if value is not None
    )
    return f"<p>{escape(text)}.</p>" + (
        f'<p class="small">{escape(settings)}</p>' if settings else ""
    )


def _metrics(task: TaskFacts, cells: Mapping[Encoder, Cell]) -> str:
    cells = {encoder: found for encoder, found in cells.items() if found.metrics}
    names = list(dict.fromkeys(name for found in cells.values() for name in found.metrics))
    if not names:
        return ""
    head = [header("figure"), *(header(e.name, kind=_kind(e)) for e in cells)]
    rows = [
        row(
            name,
            [cell(_plain(found.metrics.get(name)), kind=_kind(e)) for e, found in cells.items()],
        )
        for name in names
    ]
    figures = table(head, rows, "stuck")
    if len(names) <= 8:
        return figures
    return f"<details><summary>{len(names)} further figures</summary>{figures}</details>"


def _per_class(results: Results, task: TaskFacts, cells: Mapping[Encoder, Cell]) -> str:
    values = {
        encoder: {name: number(v) for name, v in mapping(found.details.get("per_class")).items()}
        for encoder, found in cells.items()
    }
    values = {encoder: found for encoder, found in values.items() if found}
    classes = list(dict.fromkeys(name for found in values.values() for name in found))
    if not classes:
        return ""
    heading = "By class"
    if len(classes) > CLASSES_SHOWN:
        chosen = _losses(results, task, values, classes)
        heading = f"By class: the {CLASSES_SHOWN} of {len(classes)} where most is lost"
        classes = chosen[:CLASSES_SHOWN]
    rows = []
    for name in classes:
        found = {e: v[name] for e, v in values.items() if v.get(name) is not None}
        top = None
        if found:
            ordered = (number(v) or 0.0 for v in found.values())
            top = (max if task.higher_is_better else min)(ordered)
        rows.append(
            row(
                name,
                [
                    cell(task.shown(v.get(name)), kind=_kind(e, v.get(name) == top))
                    for e, v in values.items()
                ],
            )
        )
    head = [header("class"), *(header(e.name, kind=_kind(e)) for e in values)]
    return f"<h3>{escape(heading)}</h3>" + table(head, rows, "stuck")


def _losses(
    results: Results,
    task: TaskFacts,
    values: Mapping[Encoder, Mapping[str, float | None]],
    classes: Sequence[str],
) -> list[str]:
    """Classes ordered by what the student loses of the best teacher; else by its own value."""
    names = {encoder.name: found for encoder, found in values.items()}
    ours = next((found for encoder, found in values.items() if encoder.ours), None)
    first = ours if ours is not None else next(iter(values.values()))
    row_of = results.matrix.get(task.name)
    teacher = names.get(row_of.best_teacher or "") if row_of is not None else None
    sign = 1 if task.higher_is_better else -1

    def loss(name: str) -> float:
        own = first.get(name)
        if own is None:
            return float("-inf")
        reference = 0.0 if teacher is None else teacher.get(name) or 0.0
        return sign * (reference - own)

    return sorted(classes, key=loss, reverse=True)


def _groups(task: TaskFacts, cells: Mapping[Encoder, Cell]) -> str:
    columns = list(
        dict.fromkeys(
            name for found in cells.values() for name in mapping(found.details.get("groups"))
        )
    )
    return "".join(_group_table(task, cells, column) for column in columns)


def _group_table(task: TaskFacts, cells: Mapping[Encoder, Cell], column: str) -> str:
    by = {
        encoder: mapping(mapping(found.details.get("groups")).get(column))
        for encoder, found in cells.items()
    }
    by = {encoder: found for encoder, found in by.items() if mapping(found.get("groups"))}
    groups = list(dict.fromkeys(g for found in by.values() for g in mapping(found["groups"])))
    if not groups:
        return ""
    rows = []
    for group in groups:
        scores = {encoder: mapping(found["groups"].get(group)) for encoder, found in by.items()}
        count = next((number(s.get("count")) for s in scores.values() if s.get("count")), None)
        rows.append(
            row(
                group,
                [
                    cell(
                        task.shown(number(score.get("value"))),
                        _span(task, score.get("low"), score.get("high")),
                        _kind(encoder),
                    )
                    for encoder, score in scores.items()
                ],
                "" if count is None else f"{count:,.0f} images",
            )
        )
    worst = [cell(str(found.get("worst") or "–"), kind=_kind(e)) for e, found in by.items()]
    gaps = [
        cell(
            task.shown(number(found.get("gap"))),
            _span(task, found.get("gap_low"), found.get("gap_high")),
            _kind(encoder),
        )
        for encoder, found in by.items()
    ]
    rows += [row("worst group", worst), row("gap", gaps, "best group minus worst")]
    head = [header(column), *(header(e.name, kind=_kind(e)) for e in by)]
    return f"<h3>By {escape(column)}</h3>" + table(head, rows, "stuck")


def _curves(
    task: TaskFacts, cells: Mapping[Encoder, Cell], colours: Mapping[str, str]
) -> list[str]:
    """Curves of one name of all encoders in one chart."""
    by_name: dict[str, list[tuple[Encoder, Curve]]] = {}
    for encoder, found in cells.items():
        for curve in curves_of(found.details):
            by_name.setdefault(curve.name, []).append((encoder, curve))
    shown = []
    for name, members in by_name.items():
        lines = [
            Line(encoder.name, curve.x, curve.y, colours[encoder.name])
            for encoder, curve in members
        ]
        if len({isinstance(x, str) for line in lines for x in line.x}) != 1:
            continue
        first = members[0][1]
        share = task.share and first.share
        label = first.y_label
        panel = Panel(
            name,
            lines,
            first.x_label,
            f"{label}, %" if share and label and "%" not in label else label,
            share=share,
        )
        alt = f"{name or 'Curve'} of {', '.join(line.name for line in lines)}"
        shown.append(f"<div>{picture(charts.lines([panel]), alt)}</div>")
    return shown


def _confusions(results: Results, task: TaskFacts, cells: Mapping[Encoder, Cell]) -> list[str]:
    """Of the students (not again through each head), and of the best teacher beside them."""
    row_of = results.matrix.get(task.name)
    best = None if row_of is None else row_of.best_teacher
    chosen = [e for e in cells if e.role == "student"] or [e for e in cells if e.ours]
    chosen = chosen[:3] + [e for e in cells if e.name == best]
    shown = []
    for encoder, found in cells.items():
        if chosen and encoder not in chosen:
            continue
        drawn = _confusion(encoder, found)
        if drawn:
            shown.append(drawn)
    return shown[:4]


def _confusion(encoder: Encoder, found: Cell) -> str:
    rows = found.details.get("confusion")
    if not isinstance(rows, list) or not 2 <= len(rows) <= _CONFUSED_SHOWN:
        return ""
    if not all(
        isinstance(r, list) and len(r) == len(rows) and all(number(v) is not None for v in r)
        for r in rows
    ):
        return ""
    counts = np.asarray(rows, dtype=np.float64).astype(np.int64)
    names = found.details.get("classes")
    if not (isinstance(names, list) and len(names) == len(rows)):
        by_class = list(mapping(found.details.get("per_class")))
        names = by_class if len(by_class) == len(rows) else range(len(rows))
    classes = [str(name) for name in names]
    tests = counts.sum(axis=1)
    right = np.diag(counts) / np.maximum(tests, 1)
    worst = sorted((i for i in range(len(rows)) if tests[i] > 0), key=lambda i: right[i])[:3]
    words = ", ".join(f"{classes[i]} ({100 * right[i]:.0f} %)" for i in worst)
    return (
        f"<div><h3>What {escape(encoder.name)} confuses</h3>"
        f"<p>Hardest: {escape(words)}.</p>"
        + picture(charts.confusion_matrix(counts, classes), f"Confusion matrix of {encoder.name}")
        + "</div>"
    )


def _span(task: TaskFacts, low: Any, high: Any) -> list[str]:
    ends = number(low), number(high)
    return [] if None in ends else [f"[{task.shown(ends[0])}, {task.shown(ends[1])}]"]


def _kind(encoder: Encoder, best: bool = False) -> str:
    return " ".join(["student"] * encoder.ours + ["best"] * best)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")
