"""The page of the demo's report: HTML and inline style, no script, nothing fetched."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from multikd.demo import plots
from multikd.demo.report_data import Pixels, ReportData, Role
from multikd.evaluation.intervals import PairedInterval

_ROLE_WORDS: dict[Role, str] = {
    "student": "student of all teachers",
    "untrained": "the same student, untrained",
    "single": "student of one teacher",
    "teacher": "teacher",
    "concatenated": "all teachers' features side by side",
}
_ROLE_COLOURS: dict[Role, str] = {
    "student": plots.STUDENT,
    "untrained": "#c3cad2",
    "single": "#7fb2e5",
    "teacher": plots.OTHER,
    "concatenated": "#5c6672",
}


def render(data: ReportData) -> str:
    """The page as a string."""
    sections = [
        _headline(data),
        _section("Scores", _scores(data)),
        _section("Learning curve", _curves(data)),
    ]
    if data.neighbours:
        sections.append(_section("Nearest neighbours", _neighbours(data)))
    if data.confusion is not None:
        sections.append(_section("Which classes it confuses", _confusion(data, data.confusion)))
    sections.append(_section("How it was made", _making(data)))
    title = escape(f"multikd: {data.student}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


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
            f", {100 * gap.confidence:.0f} % interval {_signed(gap.low)} to {_signed(gap.high)}, "
            f"paired over {gap.count:,} images"
        )
    return (
        f'<div class="card"><p class="small">{escape(probe)}</p>'
        f'<p class="big">{100 * student:.1f} %</p>'
        f"<p><b>{verdict}</b> the best teacher, {escape(other)} ({100 * accuracy:.1f} %): "
        f"{_signed(points)} points{paired}</p></div>"
    )


def _scores(data: ReportData) -> str:
    best = {
        probe: max(getattr(score, probe) for score in data.scores) for probe in ("knn", "logistic")
    }
    rows = []
    for score in data.scores:
        cells = "".join(
            _cell(value, gap, value == best[probe])
            for probe, value, gap in (
                ("knn", score.knn, score.knn_gap),
                ("logistic", score.logistic, score.logistic_gap),
            )
        )
        words = _ROLE_WORDS[score.role]
        if score.parameters is not None:
            words += f", {score.parameters / 1e6:.1f} M parameters"
        rows.append(
            f'<tr class="{score.role}"><th scope="row">{escape(score.name)}'
            f'<br><span class="small">{words}</span></th>'
            f"{cells}</tr>"
        )
    picture = plots.bars(
        {
            "k-NN": [score.knn for score in data.scores],
            "logistic regression": [score.logistic for score in data.scores],
        },
        [score.name for score in data.scores],
        [_ROLE_COLOURS[score.role] for score in data.scores],
        data.test_images,
    )
    level = next(score.logistic for score in data.scores if score.role == "student")
    error = 100 * float(np.sqrt(level * (1 - level) / data.test_images))
    return (
        '<div class="wide"><table><thead><tr><th scope="col">encoder</th>'
        '<th scope="col">k-NN %</th><th scope="col">logistic %</th></tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div>"
        + _picture(picture, "Bar chart of the table above")
        + f'<p class="small">{data.test_images:,} held-out images: one standard error of an '
        f"accuracy of {100 * level:.0f} % is {error:.1f} points. Whiskers are 95 %. The small "
        "figures are the student minus that encoder, in points, with a 95 % interval paired over "
        "the images, which is finer than two whiskers.</p>"
    )


def _cell(value: float, gap: PairedInterval | None, best: bool) -> str:
    number = f"<b>{100 * value:.1f}</b>" if best else f"{100 * value:.1f}"
    if gap is None:
        return f"<td>{number}</td>"
    span = f"[{_signed(gap.low)}, {_signed(gap.high)}]"
    return f'<td>{number}<br><span class="small">{_signed(gap.difference)}<br>{span}</span></td>'


def _curves(data: ReportData) -> str:
    history = data.history
    teachers = [score for score in data.scores if score.role == "teacher"]
    best = max(teachers, key=lambda score: score.knn, default=None)
    reference = None if best is None else (f"best teacher ({best.name})", best.knn)
    text = _picture(
        plots.learning_curve(history.epochs, history.loss, history.knn, reference),
        "Loss and k-NN accuracy by epoch",
    )
    if history.teacher_losses:
        text += "<h3>Loss by teacher</h3>" + _picture(
            plots.teacher_losses(history.epochs, history.teacher_losses),
            "Loss of each teacher by epoch",
        )
    return text


def _neighbours(data: ReportData) -> str:
    rows = []
    for row in data.neighbours:
        cells = [_thumbnail(row.query, data.classes[row.label], "query")]
        cells += [
            _thumbnail(pixels, data.classes[label], "same" if label == row.label else "unlike")
            for pixels, label in row.neighbours
        ]
        rows.append(f'<div class="strip">{"".join(cells)}</div>')
    return (
        "<p>Left: a held-out image. Right: the train images that the student finds most like it; "
        "a red frame and ✗ mark another class.</p>" + "".join(rows)
    )


def _thumbnail(pixels: Pixels, name: str, kind: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    mark = "✗ " if kind == "unlike" else ""
    return (
        f'<figure class="{kind}"><img alt="{escape(name)}" src="{_uri(buffer.getvalue())}">'
        f"<figcaption>{mark}{escape(name)}</figcaption></figure>"
    )


def _confusion(data: ReportData, counts: npt.NDArray[np.int64]) -> str:
    right = np.diag(counts) / np.maximum(counts.sum(axis=1), 1)
    worst = sorted(range(len(right)), key=lambda i: right[i])[:3]
    words = ", ".join(f"{escape(data.classes[i])} ({100 * right[i]:.0f} %)" for i in worst)
    return f"<p>By {escape(data.confusion_probe)}. Hardest: {words}.</p>" + _picture(
        plots.confusion_matrix(counts, data.classes), "Confusion matrix"
    )


def _making(data: ReportData) -> str:
    lines = [("command", f"<code>{escape(data.command)}</code>")]
    lines += [(escape(key), escape(value)) for key, value in data.facts.items()]
    lines += [(escape(key), f"{value:.1f} s") for key, value in data.seconds.items()]
    lines += [(escape(key), escape(value)) for key, value in data.versions.items()]
    rows = "".join(f'<tr><th scope="row">{k}</th><td>{v}</td></tr>' for k, v in lines)
    return f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _picture(png: bytes, alt: str) -> str:
    return f'<img class="plot" alt="{escape(alt)}" src="{_uri(png)}">'


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _signed(difference: float) -> str:
    """A difference of accuracies in 0–1 as points with a sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:16px/1.5 system-ui,sans-serif}
main{max-width:44rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-top:1px solid #d9dee4;padding-top:1rem}
h3{font-size:1rem;margin:1rem 0 .25rem}p{margin:.4rem 0}.small{font-size:.82rem;color:#52606d}
.cards{display:flex;flex-wrap:wrap;gap:.75rem;margin-top:1rem}
.card{flex:1 1 16rem;border:1px solid #d9dee4;border-radius:.5rem;padding:.75rem 1rem}
.big{font-size:2rem;line-height:1.1;font-weight:650;color:#1565c0}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.35rem .5rem;border-bottom:1px solid #e8ecf0;text-align:right;vertical-align:top}
th:first-child{text-align:left;font-weight:500}thead th{font-weight:600;white-space:nowrap}
tr.student{background:#eef5fc}tr.student th{font-weight:650}
td .small{white-space:nowrap}th .small{font-weight:400}tbody th{overflow-wrap:anywhere}
.facts td{text-align:left;overflow-wrap:anywhere}.facts th{white-space:nowrap}
.plot{width:100%;height:auto;margin:.75rem 0}
.strip{display:flex;gap:.3rem;margin:.4rem 0}
figure{margin:0;flex:1 1 0;min-width:0;max-width:5.5rem}
figure img{width:100%;display:block;image-rendering:pixelated;border:3px solid #d9dee4}
figure.query{margin-right:.5rem}figure.query img{border-color:#1565c0}
figure.unlike img{border-color:#c62828}
figcaption{font-size:.7rem;line-height:1.2;text-align:center;overflow-wrap:anywhere}
"""
