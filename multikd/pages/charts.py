"""The charts of the pages, each a PNG in bytes, drawn for a column 360 to 550 px wide.

Values are plain numbers; where a chart says ``share``, they lie in 0–1 and are shown in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from multikd.pages.canvas import (
    BAD,
    FAINT,
    GOOD,
    INK,
    LINES,
    MARKERS,
    OTHER,
    PAPER,
    STUDENT,
    heading,
    legend,
    new_figure,
    plain,
    png,
    tidy,
)


@dataclass(frozen=True)
class Line:
    """One line of a panel; x may be text (categories), y None where nothing was measured."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    colour: str | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes.

    Attributes:
        title: above it.
        lines: without names there is no legend.
        x_label: below it.
        y_label: beside it.
        reference: name and height of a dashed line.
        whole: x are counts, so that only whole numbers are marked.
        share: y is a share, shown in per cent.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    reference: tuple[str, float] | None = None
    whole: bool = False
    share: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar with an interval, all in the chart's unit."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = OTHER


@dataclass(frozen=True)
class Point:
    """One encoder before its cost."""

    name: str
    cost: float
    score: float
    on_front: bool = False
    colour: str = OTHER


@dataclass(frozen=True)
class BarGroup:
    """Bars that belong together, beneath one title."""

    title: str
    bars: Sequence[Bar] = field(default_factory=tuple)


def lines(panels: Sequence[Panel]) -> bytes:
    """Panels below one another, over one x axis where they share it."""
    named = max(len([line for line in panel.lines if line.name]) for panel in panels)
    height = 2.2 if len(panels) > 1 else 2.8
    figure = new_figure(height * len(panels) + (0.12 * named if named > 3 else 0))
    above = None
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, number, sharex=above)
        above = axes
        unit = 100 if panel.share else 1
        for index, line in enumerate(panel.lines):
            known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
            axes.plot(
                [plain(x) if isinstance(x, str) else x for x, _ in known],
                [unit * y for _, y in known],
                color=line.colour or LINES[index % len(LINES)],
                marker=MARKERS[index % len(MARKERS)] if len(known) <= 40 else None,
                markersize=3.5,
                label=plain(line.name) if line.name else None,
            )
        labels = [line.name for line in panel.lines if line.name]
        if panel.reference is not None:
            name, value = panel.reference
            axes.axhline(unit * value, color=OTHER, linestyle="--", label=plain(name))
            labels.append(name)
        legend(axes, labels)
        if panel.title:
            heading(axes, panel.title)
        if panel.x_label:
            axes.set_xlabel(plain(panel.x_label, 48), fontsize=9, color=INK)
        if panel.y_label:
            axes.set_ylabel(plain(panel.y_label, 48), fontsize=9, color=INK)
        tidy(axes, grid="y")
        if panel.whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def bars(groups: Sequence[BarGroup], *, share: bool = True, digits: int = 1) -> bytes:
    """Horizontal bars from 0 with whiskers and figures, one panel a group."""
    rows = max(len(group.bars) for group in groups)
    figure = new_figure(len(groups) * (0.5 + 0.3 * rows))
    unit = 100 if share else 1
    for number, group in enumerate(groups, start=1):
        axes = figure.add_subplot(len(groups), 1, number)
        values = [unit * bar.value for bar in group.bars]
        tops = [max(unit * (bar.value if bar.high is None else bar.high), 0) for bar in group.bars]
        largest = max([*tops, *values, 1e-12])
        limit = 112 if share and largest <= 100 else 1.15 * largest
        axes.barh(range(len(values)), values, color=[bar.colour for bar in group.bars], height=0.68)
        for row, (bar, value, top) in enumerate(zip(group.bars, values, tops, strict=True)):
            _whisker(axes, row, bar, unit)
            axes.text(
                max(top, value, 0) + limit / 112, row, f"{value:.{digits}f}", va="center",
                color=INK, fontsize=9,
            )  # fmt: skip
        axes.set_yticks(range(len(values)), [plain(bar.name) for bar in group.bars])
        axes.invert_yaxis()
        axes.set_xlim(min([0.0, *(1.1 * v for v in values)]), limit)
        if share and limit == 112:
            axes.set_xticks(range(0, 101, 20))
        heading(axes, group.title)
        tidy(axes, grid="x")
    return png(figure)


def gains(groups: Sequence[BarGroup], title: str, own_colours: bool = False) -> bytes:
    """Gains and losses × 100 to both sides of 0, one label a group (a task).

    Green and red where each group has one bar, unless the bars are to keep their own colours.
    """
    rows = sum(len(group.bars) for group in groups)
    figure = new_figure(0.8 + 0.3 * rows + 0.12 * len(groups))
    axes = figure.add_subplot(1, 1, 1)
    several = any(len(group.bars) > 1 for group in groups)
    ends = [0.0]
    places, names, row = [], [], 0.0
    for group in groups:
        for bar in group.bars:
            kept = several or own_colours
            colour = bar.colour if kept else GOOD if bar.value >= 0 else BAD
            axes.barh(row, 100 * bar.value, color=colour, height=0.68)
            _whisker(axes, row, bar, 100)
            ends += [100 * v for v in (bar.value, bar.low, bar.high) if v is not None]
            places.append(row)
            names.append(f"{group.title}: {bar.name}" if several else group.title)
            row += 1
        row += 0.4
    span = max(max(ends) - min(ends), 1.0)
    axes.set_xlim(min(ends) - 0.22 * span, max(ends) + 0.22 * span)
    for place, bar in zip(places, (b for g in groups for b in g.bars), strict=True):
        right = bar.value >= 0
        outer = [100 * v for v in (bar.value, bar.low, bar.high) if v is not None]
        axes.text(
            (max(outer) if right else min(outer)) + (0.015 if right else -0.015) * span, place,
            f"{100 * bar.value:+.1f}".replace("-", "−"), va="center",
            ha="left" if right else "right", color=INK, fontsize=9,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(places, [plain(name, 28) for name in names])
    axes.invert_yaxis()
    heading(axes, title)
    tidy(axes, grid="x")
    return png(figure)


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> bytes:
    """Score (a share) against cost on a logarithmic axis; the front is joined by a line."""
    figure = new_figure(3.2)
    axes = figure.add_subplot(1, 1, 1)
    front = sorted((p for p in points if p.on_front), key=lambda p: p.cost)
    axes.plot(
        [p.cost for p in front], [100 * p.score for p in front], color=FAINT, linewidth=2, zorder=1,
        drawstyle="steps-post",
    )  # fmt: skip
    for index, point in enumerate(points):
        axes.scatter(
            [point.cost], [100 * point.score], color=point.colour, s=42, zorder=2,
            marker=MARKERS[index % len(MARKERS)],
            edgecolors=INK if point.on_front else "none",
        )  # fmt: skip
    costs = [p.cost for p in points]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    ticks = _round_ticks(min(costs) / 1.5, max(costs) * 1.5)
    axes.set_xticks(ticks, [_short(t) for t in ticks])
    axes.minorticks_off()
    for point, place in zip(points, _label_places(points), strict=True):
        axes.annotate(
            plain(point.name, 24), (point.cost, 100 * point.score), xytext=place[:2],
            textcoords="offset points", fontsize=9, color=INK, ha=place[2], va="center",
            bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    axes.margins(y=0.25)
    axes.set_xlabel(plain(x_label, 60), fontsize=9, color=INK)
    axes.set_ylabel(plain(y_label, 60), fontsize=9, color=INK)
    tidy(axes, grid="both")
    return png(figure)


def confusion_matrix(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Rows are the truth, columns the answer; shaded by the share of the row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(classes)
    figure = new_figure(1.2 + size * min(0.35, 3.4 / size))
    axes = figure.add_subplot(1, 1, 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("answered")
    axes.set_ylabel("is")
    if size <= 40:
        axes.set_xticks(range(size), [plain(c, 20) for c in classes], rotation=60, ha="right")
        axes.set_yticks(range(size), [plain(c, 20) for c in classes])
    if size <= 20:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.55 else INK
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                color=colour,
                fontsize=8 if size <= 12 else 5.5,
            )
    axes.tick_params(length=0, labelsize=9 if size <= 12 else 7 if size <= 20 else 5, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return png(figure)


def accuracy_whisker(value: float, images: int) -> tuple[float, float]:
    """95 % of ``images`` answers around an accuracy in 0–1, by the normal approximation."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.0) / images)
    return value - half, value + half


def line_colours(names: Sequence[str], students: Sequence[str]) -> Mapping[str, str]:
    """One colour an encoder, the same in all charts of a page; the students' is the page's own."""
    colours: dict[str, str] = {}
    others = 0
    for name in names:
        if name in students and STUDENT not in colours.values():
            colours[name] = STUDENT
        else:
            colours[name] = LINES[others % len(LINES)]
            others += 1
    return colours


def _whisker(axes: object, row: float, bar: Bar, unit: float) -> None:
    if bar.low is None or bar.high is None:
        return
    # An interval need not hold its value when both were rounded: no negative lengths.
    sides = [[max(unit * (bar.value - bar.low), 0)], [max(unit * (bar.high - bar.value), 0)]]
    axes.errorbar(  # type: ignore[attr-defined]
        [unit * bar.value], [row], xerr=sides, fmt="none", ecolor=INK, elinewidth=1
    )


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 1.5, 2, 3, 5, 7 and their tenfolds between two numbers above 0; few of them."""
    found = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 1.5, 2, 3, 5, 7)
        if low <= m * 10.0**e <= high
    ]
    return found if len(found) <= 7 else [t for t in found if f"{t:e}"[0] == "1"] or found


def _short(value: float) -> str:
    """``5 M`` for five million."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _label_places(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """Offset and alignment of each label, so that it lies on no other label and on no point.

    Worked out in points of type on a plane of about the size of the axes: the first free one of
    a few places around the point, or above it, as high as it takes.
    """
    wide, high = 250.0, 120.0
    logs, scores = [math.log(p.cost) for p in points], [p.score for p in points]
    margin = 2 * math.log(1.5)
    across, up = max(logs) - min(logs) + margin, max(max(scores) - min(scores), 1e-9)
    spots = [
        (wide * (x - min(logs) + margin / 2) / across, high * (y - min(scores)) / up)
        for x, y in zip(logs, scores, strict=True)
    ]
    taken = [(x - 5, x + 5, y - 5, y + 5) for x, y in spots]
    found: list[tuple[float, float, str]] = []
    for (x, y), point in zip(spots, points, strict=True):
        length = 5.2 * min(len(point.name), 24)
        lifts = [0.0, 9.0, -9.0, *(18.0 + 9 * step for step in range(2 * len(points)))]
        for lift, (side, align) in ((v, s) for v in lifts for s in ((8, "left"), (-8, "right"))):
            left = x + side if align == "left" else x + side - length
            box = (left, left + length, y + lift - 5, y + lift + 5)
            outside = left < -10 or left + length > wide + 10
            if not outside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        found.append((side, lift, align))
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
