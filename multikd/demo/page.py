"""The page of the demo's report."""

from __future__ import annotations

import io
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from multikd.demo.report_data import Pixels, ReportData, Role
from multikd.evaluation.intervals import PairedInterval
from multikd.pages import charts
from multikd.pages.canvas import INK, OTHER, STUDENT
from multikd.pages.charts import Bar, BarGroup, Line, Panel
from multikd.pages.html import (
    cell,
    document,
    facts,
    header,
    interval,
    picture,
    row,
    section,
    signed,
    strip,
    table,
    thumbnail,
)

_ROLE_WORDS: dict[Role, str] = {
    "student": "student of all teachers",
    "untrained": "the same student, untrained",
    "single": "student of one teacher",
    "teacher": "teacher",
    "concatenated": "all teachers' features side by side",
}
_ROLE_COLOURS: dict[Role, str] = {
    "student": STUDENT,
    "untrained": "#c3cad2",
    "single": "#7fb2e5",
    "teacher": OTHER,
    "concatenated": "#5c6672",
}


def render(data: ReportData) -> str:
    """The page as a string."""
    sections = [
        _headline(data),
        section("Scores", _scores(data)),
        section("Learning curve", _curves(data)),
    ]
    if data.neighbours:
        sections.append(section("Nearest neighbours", _neighbours(data)))
    if data.confusion is not None:
        sections.append(section("Which classes it confuses", _confusion(data, data.confusion)))
    sections.append(section("How it was made", _making(data)))
    return document(f"multikd: {data.student}", sections)


def _headline(data: ReportData) -> str:
    student = next(score for score in data.scores if score.role == "student")
    teachers = [score for score in data.scores if score.role == "teacher"]
    cards = ""
    if teachers:
        nearest = max(teachers, key=lambda score: score.knn)
        cards += _card("k-NN", student.knn, nearest.name, nearest.knn, nearest.knn_gap)
        linear = max(teachers, key=lambda score: score.logistic)
        cards += _card(
            "logistic regression",
            student.logistic,
            linear.name,
            linear.logistic,
            linear.logistic_gap,
        )
    return (
        f"<h1>{escape(data.student)}</h1>\n<p>{escape(data.data)}</p>\n"
        f'<div class="cards">{cards}</div>'
    )


def _card(
    probe: str, student: float, other: str, accuracy: float, gap: PairedInterval | None
) -> str:
    points = student - accuracy
    verdict = "above" if points > 0 else "below"
    paired = ""
    if gap is not None:
        # The sign is only claimed where the interval leaves 0 out.
        verdict = verdict if gap.resolved else "level with"
        paired = (
            f", {100 * gap.confidence:.0f} % interval {signed(gap.low)} to {signed(gap.high)}, "
            f"paired over {gap.count:,} images"
        )
    return (
        f'<div class="card"><p class="small">{escape(probe)}</p>'
        f'<p class="big">{100 * student:.1f} %</p>'
        f"<p><b>{verdict}</b> the best teacher, {escape(other)} ({100 * accuracy:.1f} %): "
        f"{signed(points)} points{paired}</p></div>"
    )


def _scores(data: ReportData) -> str:
    best = {
        probe: max(getattr(score, probe) for score in data.scores) for probe in ("knn", "logistic")
    }
    rows = []
    for score in data.scores:
        cells = [
            _cell(value, gap, value == best[probe])
            for probe, value, gap in (
                ("knn", score.knn, score.knn_gap),
                ("logistic", score.logistic, score.logistic_gap),
            )
        ]
        words = _ROLE_WORDS[score.role]
        if score.parameters is not None:
            words += f", {score.parameters / 1e6:.1f} M parameters"
        rows.append(row(score.name, cells, words, score.role))
    groups = [
        BarGroup(
            f"{title}, % right",
            [
                Bar(
                    score.name,
                    getattr(score, probe),
                    *charts.accuracy_whisker(getattr(score, probe), data.test_images),
                    _ROLE_COLOURS[score.role],
                )
                for score in data.scores
            ],
        )
        for probe, title in (("knn", "k-NN"), ("logistic", "logistic regression"))
    ]
    level = next(score.logistic for score in data.scores if score.role == "student")
    error = 100 * float(np.sqrt(level * (1 - level) / data.test_images))
    return (
        table([header(text) for text in ("encoder", "k-NN %", "logistic %")], rows)
        + picture(charts.bars(groups), "Bar chart of the table above")
        + f'<p class="small">{data.test_images:,} held-out images: one standard error of an '
        f"accuracy of {100 * level:.0f} % is {error:.1f} points. Whiskers are 95 %. The small "
        "figures are the student minus that encoder, in points, with a 95 % interval paired over "
        "the images, which is finer than two whiskers.</p>"
    )


def _cell(value: float, gap: PairedInterval | None, best: bool) -> str:
    notes = [] if gap is None else [signed(gap.difference), interval(gap.low, gap.high)]
    return cell(f"{100 * value:.1f}", notes, "best" if best else "")


def _curves(data: ReportData) -> str:
    history = data.history
    teachers = [score for score in data.scores if score.role == "teacher"]
    best = max(teachers, key=lambda score: score.knn, default=None)
    reference = None if best is None else (f"best teacher ({best.name})", best.knn)
    training = Panel("training loss", [Line("", history.epochs, history.loss, INK)], whole=True)
    scored = Panel(
        "k-NN, % right on the held-out images",
        [Line("student", history.epochs, history.knn, STUDENT)],
        "epoch",
        reference=reference,
        whole=True,
        share=True,
    )
    text = picture(charts.lines([training, scored]), "Loss and k-NN accuracy by epoch")
    if history.teacher_losses:
        imitated = [
            Line(name, history.epochs, losses) for name, losses in history.teacher_losses.items()
        ]
        text += "<h3>Loss by teacher</h3>" + picture(
            charts.lines([Panel("", imitated, "epoch", whole=True)]),
            "Loss of each teacher by epoch",
        )
    return text


def _neighbours(data: ReportData) -> str:
    rows = []
    for shown in data.neighbours:
        cells = [_thumbnail(shown.query, data.classes[shown.label], "query")]
        cells += [
            _thumbnail(pixels, data.classes[label], "same" if label == shown.label else "unlike")
            for pixels, label in shown.neighbours
        ]
        rows.append(strip(cells))
    return (
        "<p>Left: a held-out image. Right: the train images that the student finds most like it; "
        "a red frame and ✗ mark another class.</p>" + "".join(rows)
    )


def _thumbnail(pixels: Pixels, name: str, kind: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return thumbnail(buffer.getvalue(), name, kind)


def _confusion(data: ReportData, counts: npt.NDArray[np.int64]) -> str:
    right = np.diag(counts) / np.maximum(counts.sum(axis=1), 1)
    worst = sorted(range(len(right)), key=lambda i: right[i])[:3]
    words = ", ".join(f"{escape(data.classes[i])} ({100 * right[i]:.0f} %)" for i in worst)
    return f"<p>By {escape(data.confusion_probe)}. Hardest: {words}.</p>" + picture(
        charts.confusion_matrix(counts, data.classes), "Confusion matrix"
    )


def _making(data: ReportData) -> str:
    return facts(
        {
            "command": data.command,
            **data.facts,
            **{step: f"{seconds:.1f} s" for step, seconds in data.seconds.items()},
            **data.versions,
        }
    )
