"""The page of a study: one HTML file that holds everything it shows."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from multikd.ablation.leaderboard import RETENTION
from multikd.ablation.present import (
    behind,
    columns_of,
    interaction_rows,
    remarks,
    shown,
    worth_table,
)
from multikd.pages import charts
from multikd.pages.canvas import LINES, OTHER, STUDENT
from multikd.pages.charts import Bar, BarGroup, Point
from multikd.pages.html import cell, document, facts, header, picture, row, section, table


def render(board: Mapping[str, Any]) -> str:
    """The page as a string; what is not there yet is left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    parts = [
        ("Leaderboard", leaderboard(board)),
        ("What each teacher adds", _worth(board)),
        ("Retention against the teachers' cost", _pareto(board)),
        ("Interaction of pairs", _interactions(board)),
        ("Gradients on the encoder", _gradients(board)),
        ("Teachers", _teachers(board)),
        ("How it was made", _making(board)),
    ]
    sections = [_headline(board)]
    sections += [section(title, markup) for title, markup in parts if markup]
    return document("multikd: which teachers are worth it", sections, broad=True)


def _headline(board: Mapping[str, Any]) -> str:
    progress = board["progress"]
    text = "<h1>Which teachers are worth it</h1>\n"
    text += f"<p>{escape(board['study'])}: {progress['done']} of {progress['runs']} runs"
    text += "</p>" if progress["done"] == progress["runs"] else " so far.</p>"
    ranked = [r for r in board["rows"] if r["rank"] is not None]
    if not ranked:
        return text
    best = ranked[0]
    kept = best["scores"][RETENTION]
    level = [r for r in ranked[1:] if r["behind_best"] and r["behind_best"]["says"] != "below 0"]
    cheapest = min([best, *level], key=lambda r: r["teacher_seconds_per_image"] or float("inf"))
    words = (
        f"of the best teacher’s score, mean over {len(board['tasks'])} tasks and {kept['n']} seeds."
    )
    text += '<div class="cards">'
    text += _card("best combination", f"{100 * kept['mean']:.1f} %", f"{best['label']}: {words}")
    if level:
        pace = cheapest["teacher_seconds_per_image"]
        cost = "" if pace is None else f" ({1000 * pace:.1f} ms an image)"
        text += _card(
            "not resolved from it", str(len(level)),
            f"of {len(ranked) - 1} others can’t be told from the best by these seeds; the cheapest "
            f"among them and the best is {cheapest['label']}{cost}.",
        )  # fmt: skip
    return text + "</div>"


def _card(title: str, big: str, words: str) -> str:
    return (
        f'<div class="card"><p class="small">{escape(title)}</p><p class="big">{escape(big)}</p>'
        f"<p>{escape(words)}</p></div>"
    )


def leaderboard(board: Mapping[str, Any]) -> str:
    """Combinations × tasks."""
    if not board["rows"]:
        return "<p>No run is done yet.</p>"
    tasks = {task["name"]: task for task in board["tasks"]}
    best = {
        name: (max if task["higher_is_better"] else min)(
            (r["scores"][name]["mean"] for r in board["rows"] if name in r["scores"]),
            default=None,
        )
        for name, task in tasks.items()
    }
    head = [header("teachers"), header("retention %", "mean ± deviation"), header("− best, points")]
    head += [header(name, str(task["metric"])) for name, task in tasks.items()]
    head += [header("cost", "teachers’ ms an image"), header("seeds")]
    rows = []
    for entry in board["rows"]:
        kept = entry["scores"].get(RETENTION)
        cells = [cell("–") if kept is None else cell(*_mean(None, kept))]
        cells.append(cell(behind(entry["behind_best"]) or "–"))
        for name, task in tasks.items():
            found = entry["scores"].get(name)
            kind = "best" if found is not None and found["mean"] == best[name] else ""
            cells.append(cell("–") if found is None else cell(*_mean(task, found), kind))
        pace = entry["teacher_seconds_per_image"]
        cells.append(cell("–" if pace is None or not entry["teachers"] else f"{1000 * pace:.1f}"))
        cells.append(cell(str(len(entry["seeds"]))))
        name = " + ".join(entry["teachers"]) or "untrained student"
        place = "" if entry["rank"] is None else f"{entry['rank']}. "
        note = ", ".join(
            part for part in (entry["setting"], "on the Pareto front" * entry["pareto"]) if part
        )
        rows.append(row(place + name, cells, note, "student" if entry["rank"] == 1 else ""))
    return table(head, rows, "stuck") + (
        '<p class="small">Retention is the mean over tasks of the student’s score divided by the '
        "best teacher’s. Differences are paired over seeds, with 95 % intervals; a ? marks those "
        "that the seeds don’t resolve.</p>"
    )


def _mean(task: Mapping[str, Any] | None, found: Mapping[str, Any]) -> tuple[str, list[str]]:
    notes = [] if found["deviation"] is None else [f"± {shown(task, found['deviation'])}"]
    return shown(task, found["mean"]), notes


def _worth(board: Mapping[str, Any]) -> str:
    text = ""
    tasks = {task["name"]: task for task in board["tasks"]}
    for setting in board["worth"]:
        made = worth_table(board, setting)
        if made is None:
            continue
        title, heads, rows = made
        measures = [m for m in (RETENTION, *columns_of(board)) if m in setting["measures"]]
        groups = []
        for name, colour in zip(board["teachers"], LINES * 9, strict=False):
            bars = []
            for measure in measures:
                found = setting["measures"][measure]["values"].get(name)
                if found is not None and _is_share(tasks.get(measure)):
                    low, high = found["low"], found["high"]
                    bars.append(Bar(measure, found["value"], low, high, colour))
            if bars:
                groups.append(BarGroup(name, bars))
        text += (
            f"<h3>{escape(title)}</h3>" if len(board["worth"]) > 1 else f"<p>{escape(title)}.</p>"
        )
        text += table(
            [header(h) for h in heads], [row(r[0], [cell(c) for c in r[1:]]) for r in rows], "stuck"
        )
        if groups:
            chart = charts.gains(groups, "points added, with 95 % intervals over seeds", True)
            text += picture(chart, title)
    if text:
        text += (
            '<p class="small">Shapley values share the gain of all teachers over the untrained '
            "student fairly among them: what each adds, averaged over all orders in which they "
            "could join.</p>"
        )
    return text


def _is_share(task: Mapping[str, Any] | None) -> bool:
    return task is None or task.get("unit") == "%"


def _pareto(board: Mapping[str, Any]) -> str:
    found = [
        Point(
            name=r["label"],
            cost=1000 * r["teacher_seconds_per_image"],
            score=r["scores"][RETENTION]["mean"],
            on_front=r["pareto"],
            colour=STUDENT if r["pareto"] else OTHER,
        )
        for r in board["rows"]
        if r["teacher_seconds_per_image"] and r["rank"] is not None
    ]
    if len(found) < 2 or len(found) > 24:
        return ""
    chart = charts.scatter(found, "teachers’ ms an image", "retention, %")
    return picture(chart, "Retention against the cost of running the teachers")


def _interactions(board: Mapping[str, Any]) -> str:
    rows = interaction_rows(board)
    if not rows:
        return ""
    return (
        "<p>Above 0, two teachers add more together than each by itself; below 0 they overlap.</p>"
        + table([header("pair"), header("points")], [row(r[0], [cell(r[1])]) for r in rows])
    )


def _gradients(board: Mapping[str, Any]) -> str:
    rows = []
    for entry in board["rows"]:
        told = entry["diagnostics"]
        shares = {k.rpartition("/")[2]: v for k, v in told.items() if "/share/" in k}
        cosines = {k.split("/cosine/")[1]: v for k, v in told.items() if "/cosine/" in k}
        if len(shares) < 2:
            continue
        words = ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items())
        angles = ", ".join(f"{k.replace('/', ' × ')} {v:+.2f}" for k, v in cosines.items())
        rows.append(row(entry["label"], [cell(words), cell(angles.replace("-", "−"))]))
    if not rows:
        return ""
    head = [header("combination"), header("share of the gradient"), header("cosine")]
    return (
        "<p>Sampled during training: how much of the gradient on the encoder each teacher’s loss "
        "gives, and whether two of them pull the same way (1) or against each other (below 0).</p>"
        + table(head, rows, "makers")
    )


def _teachers(board: Mapping[str, Any]) -> str:
    tasks = {task["name"]: task for task in board["tasks"]}
    rows = []
    for name, teacher in board["teachers"].items():
        cost = teacher["cost"] or {}
        cells = [
            cell(
                "–"
                if task not in teacher["scores"]
                else shown(tasks[task], teacher["scores"][task])
            )
            for task in tasks
        ]
        pace = cost.get("seconds_per_image")
        cells.append(cell("–" if pace is None else f"{1000 * pace:.1f}"))
        count = cost.get("parameters")
        cells.append(cell("–" if count is None else f"{count / 1e6:.1f} M"))
        rows.append(row(name, cells, str(cost.get("encoder", ""))))
    head = [header("teacher"), *(header(t) for t in tasks), header("ms an image"),
            header("parameters")]  # fmt: skip
    return table(head, rows, "stuck")


def _making(board: Mapping[str, Any]) -> str:
    progress = board["progress"]
    told = {
        "study": board["study"],
        "base config": board["base"],
        "seeds": ", ".join(map(str, board["seeds"])),
        "tasks": ", ".join(t["name"] for t in board["tasks"]),
        "time of all jobs": f"{progress['seconds']:.0f} s",
        "multikd": board["multikd"],
        "written": board["created"],
    }
    if progress["cache_bytes"]:
        told["feature cache"] = f"{progress['cache_bytes'] / 1e6:.1f} MB"
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(board)[1:])
    return facts(told) + (f"<ul>{notes}</ul>" if notes else "")
