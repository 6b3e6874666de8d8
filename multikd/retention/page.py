"""The page of an evaluation: one HTML file that holds everything it shows."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from multikd.files import write_text_atomically
from multikd.pages import charts
from multikd.pages.canvas import OTHER
from multikd.pages.charts import Bar, BarGroup, Point
from multikd.pages.html import cell, document, facts, header, picture, row, section, table
from multikd.retention.gallery import Gallery
from multikd.retention.page_pictures import components, neighbours
from multikd.retention.page_tasks import task_section
from multikd.retention.reading import (
    Encoder,
    Kept,
    Results,
    TaskFacts,
    mapping,
    number,
    order,
    results_of,
)

PAGE = "report.html"
_ROLES = {"head": "student through a head"}


def write_page(content: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` of an evaluation.

    Args:
        content: of ``results.json``.
        folder: where that lies, with ``pictures/`` beside it.

    Returns:
        The path of the page.

    Raises:
        ValueError: the content is not of the format.
        MissingExtraError: matplotlib is not installed.
        OSError: the folder can't be written to.
    """
    path = folder / PAGE
    write_text_atomically(path, render(results_of(content, folder)))
    return path


def render(results: Results) -> str:
    """The page as a string; what was not measured is left out."""
    colours = charts.line_colours(
        [e.name for e in results.encoders], [e.name for e in results.ours]
    )
    gallery = None if results.folder is None else Gallery(results.folder)
    parts = [
        ("", "", _headline(results)),
        ("Retention matrix", "matrix", matrix(results)),
        ("Gain over the best teacher", "gain", _gains(results, colours)),
        ("Score against cost", "cost", _pareto(results, colours) + _cost(results)),
    ]
    parts += [
        (task.name, f"task-{number}", task_section(results, task, colours))
        for number, task in enumerate(results.tasks, start=1)
    ]
    if gallery is not None:
        parts += [
            ("Nearest neighbours", "neighbours", neighbours(results, gallery)),
            ("Patch tokens", "patches", components(results, gallery)),
        ]
    parts.append(("How it was made", "making", _making(results)))
    shown = [(title, name, markup) for title, name, markup in parts if markup]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for title, name, _ in shown if name)
    sections = [
        section(title, markup, name) if name else f"{markup}\n<nav>{links}</nav>"
        for title, name, markup in shown
    ]
    return document(f"multikd: {_title(results)}", sections, broad=True)


def percent(share: float, digits: int = 1) -> str:
    """A share in 0–1 (or above) in per cent."""
    return f"{100 * share:.{digits}f}\u00a0%".replace("-", "−")


def _title(results: Results) -> str:
    ours = results.ours
    if ours and results.matrix:
        return f"what {ours[0].name} retained"
    names = [e.name for e in results.encoders]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _headline(results: Results) -> str:
    title = _title(results)
    text = f"<h1>{escape(title[:1].upper() + title[1:])}</h1>\n"
    scored = len(results.tasks)
    text += (
        f"<p>{len(results.encoders)} encoder{'s' * (len(results.encoders) != 1)} on "
        f"{scored} task{'s' * (scored != 1)}.</p>"
    )
    # A head is one more way to read the same student: its column of the matrix is enough.
    shown = [e for e in results.encoders if e.role == "student"] or results.ours
    cards = [_card(results, encoder) for encoder in shown]
    cards = [card for card in cards if card]
    return text + (f'<div class="cards">{"".join(cards)}</div>' if cards else "")


def _card(results: Results, encoder: Encoder) -> str:
    mean = results.mean.get(encoder.name, {})
    share, low, high = (mean.get(key) for key in ("share", "low", "high"))
    if share is None:
        return ""
    tasks = mean.get("tasks")
    count = f"mean over {int(tasks)} task{'s' * (tasks != 1)}" if tasks else "mean over the tasks"
    span = (
        ""
        if low is None or high is None
        else f", 95\u00a0% interval {percent(low)} to {percent(high)}"
    )
    verdicts: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for task in results.tasks:
        kept = _kept(results, task, encoder)
        if kept is not None and kept.verdict:
            verdicts[kept.verdict].append(task.name)
    words = [
        f"<b>{escape(name)}{' with' if name == 'level' else ''}</b> "
        f"{'it' if number else 'the best teacher'} on {escape(', '.join(tasks))}"
        for number, (name, tasks) in enumerate((n, t) for n, t in verdicts.items() if t)
    ]
    return (
        f'<div class="card"><p class="small">{escape(encoder.name)}</p>'
        f'<p class="big">{percent(share)}</p>'
        f"<p>of the best teacher’s score is kept: {count}{span}.</p>"
        + (f'<p class="small">{"; ".join(words)}.</p>' if words else "")
        + "</div>"
    )


def _kept(results: Results, task: TaskFacts, encoder: Encoder) -> Kept | None:
    found = results.matrix.get(task.name)
    return None if found is None else found.kept.get(encoder.name)


def matrix(results: Results) -> str:
    """Tasks × encoders: score with interval, and what is kept of the best teacher's."""
    if not results.tasks or not results.encoders:
        return ""
    encoders = order(results.encoders)
    head = [header("task")] + [
        header(e.name, _ROLES.get(e.role, e.role), "student" if e.ours else "") for e in encoders
    ]
    rows = []
    for task in results.tasks:
        best = results.best(task)
        cells = []
        for encoder in encoders:
            found = results.cells.get((task.name, encoder.name))
            kind = " ".join(["student"] * encoder.ours + ["best"] * (encoder.name in best))
            if found is None or found.value is None:
                cells.append(cell("–", kind=kind))
                continue
            notes = []
            if found.low is not None and found.high is not None:
                notes.append(f"[{task.shown(found.low)}, {task.shown(found.high)}]")
            kept = _kept(results, task, encoder)
            if kept is not None and kept.share is not None:
                notes += _kept_words(kept)
            cells.append(cell(task.shown(found.value), notes, kind))
        arrow = "" if task.higher_is_better else ", lower is better"
        unit = f" {task.unit}" if task.unit else ""
        rows.append(row(task.name, cells, f"{task.metric}{unit}{arrow}"))
    if results.mean:
        cells = []
        for encoder in encoders:
            mean = results.mean.get(encoder.name, {})
            share, low, high = (mean.get(key) for key in ("share", "low", "high"))
            span = [] if low is None or high is None else [f"[{_bare(low)}, {_bare(high)}]"]
            cells.append(
                cell("", kind="student" if encoder.ours else "")
                if share is None
                else cell(percent(share), span, "student" if encoder.ours else "")
            )
        rows.append(row("mean share kept", cells, "of the best teacher’s"))
    kept_shown = any(r.kept for r in results.matrix.values())
    return (
        table(head, rows, "stuck")
        + '<p class="small">Bold: the best of a task. In brackets: 95 % intervals over the test '
        "images."
        + (
            " “kept” is the share of the best teacher’s score, paired over the same images; where "
            "its interval holds 100 %, student and teacher can’t be told apart."
            if kept_shown
            else ""
        )
        + "</p>"
    )


def _kept_words(kept: Kept) -> list[str]:
    words = [] if kept.share is None else [f"kept {percent(kept.share)}"]
    if kept.low is not None and kept.high is not None:
        words.append(f"[{_bare(kept.low)}, {_bare(kept.high)}]")
    return words


def _bare(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "−")


def _gains(results: Results, colours: Mapping[str, str]) -> str:
    groups, words = [], []
    for task in results.tasks:
        found = results.matrix.get(task.name)
        bars = []
        for encoder in order(results.ours):
            kept = None if found is None else found.kept.get(encoder.name)
            if kept is None or kept.share is None:
                continue
            low = None if kept.low is None else kept.low - 1
            high = None if kept.high is None else kept.high - 1
            bars.append(Bar(encoder.name, kept.share - 1, low, high, colours[encoder.name]))
        if bars and found is not None:
            groups.append(BarGroup(task.name, bars))
            gain = f"{100 * bars[0].value:+.1f}".replace("-", "−")
            words.append(f"{task.name} {gain} % against {found.best_teacher or 'the best teacher'}")
    if not groups:
        return ""
    chart = charts.gains(groups, "% gain over the best teacher")
    return picture(chart, "Bars of the relative gain by task: " + "; ".join(words)) + (
        f'<p class="small">{escape("; ".join(words))}. Whiskers: 95 % intervals.</p>'
    )


def _pareto(results: Results, colours: Mapping[str, str]) -> str:
    points = []
    for entry in results.pareto:
        name, score, cost = entry.get("encoder"), number(entry.get("score")), entry.get("cost")
        cost = number(cost)
        if isinstance(name, str) and score is not None and cost is not None and cost > 0:
            on_front = entry.get("on_front") is True
            points.append(Point(name, cost, score, on_front, colours.get(name, OTHER)))
    if len(points) < 2:
        return ""
    front_names = ", ".join(p.name for p in points if p.on_front)
    chart = charts.scatter(points, results.cost_label, "share of the best teacher, %")
    front = (
        f" On the front, where nothing cheaper is as good: {front_names}." if front_names else ""
    )
    text = (
        "The score is the mean share of the best teacher’s (without teachers, of the best) over "
        f"the tasks that all of these were scored on.{front}"
    )
    return (
        picture(chart, f"Score against {results.cost_label} of each encoder")
        + f'<p class="small">{escape(text)}</p>'
    )


def _cost(results: Results) -> str:
    rows = []
    for encoder in order(results.encoders):
        cost = mapping(encoder.facts.get("cost"))
        if not cost:
            continue
        kind = "student" if encoder.ours else ""
        rows.append(_cost_row(encoder.name, str(cost.get("device") or ""), cost, kind))
        deployed = cost.get("deployed")
        for form in deployed if isinstance(deployed, list) else []:
            form = mapping(form)
            name = f"{encoder.name}, {form.get('format') or 'deployed'}"
            rows.append(_cost_row(name, str(form.get("device") or ""), {**form}, kind))
    heads = (
        *(("parameters", "M"), ("multiply-adds", "G"), ("memory", "MB, peak")),
        *(("latency", "ms, batch 1, p50 / p95"), ("images/s", "batch 32")),
    )
    if not rows:
        return ""
    return table([header("encoder"), *(header(*names) for names in heads)], rows)


def _cost_row(name: str, note: str, cost: Mapping[str, Any], kind: str) -> str:
    def scaled(key: str, unit: float, digits: int) -> str:
        value = number(cost.get(key))
        return "–" if value is None else f"{value / unit:,.{digits}f}"

    latency = mapping(mapping(cost.get("latency_ms")).get("1"))
    ends = [number(latency.get(key)) for key in ("p50", "p95")]
    speed = number(mapping(cost.get("images_per_second")).get("32"))
    return row(
        name,
        [
            cell(scaled("parameters", 1e6, 2)),
            cell(scaled("macs", 1e9, 2)),
            cell(scaled("peak_memory_mb", 1, 0)),
            cell(" / ".join("–" if v is None else f"{v:.2f}" for v in ends)),
            cell("–" if speed is None else f"{speed:,.0f}"),
        ],
        note,
        kind,
    )


def _making(results: Results) -> str:
    lines = {"command": results.command, "made": results.created, "multikd": results.multikd}
    text = facts({key: value for key, value in lines.items() if value})
    rows = []
    for encoder in order(results.encoders):
        size = encoder.facts.get("image_size")
        pixels = (
            f"{size[0]} × {size[1]} px"
            if isinstance(size, list) and len(size) == 2 and all(number(s) for s in size)
            else "–"
        )
        values = (encoder.source, encoder.licence, pixels, encoder.fingerprint[:16])
        rows.append(
            row(
                encoder.name,
                [cell(v or "–") for v in values],
                _ROLES.get(encoder.role, encoder.role),
            )
        )
    names = ("encoder", "source", "licence", "images", "fingerprint")
    return text + table([header(name) for name in names], rows, "makers")
