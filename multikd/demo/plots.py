"""The pictures of the demo's report, each a PNG in bytes, drawn for a column 360 to 700 px wide."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from multikd.errors import MissingExtraError

INK, FAINT = "#1f2933", "#d9dee4"
STUDENT, OTHER = "#1565c0", "#8a94a0"
# Distinct to colour-blind readers as well, and each line has its own marker (after Okabe and Ito).
_LINES = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
_MARKERS = "osD^vP"
_WIDTH = 6.0  # inches; at 10 points the letters stay readable on a phone


def bars(
    panels: Mapping[str, Sequence[float]],
    names: Sequence[str],
    colours: Sequence[str],
    images: int,
) -> bytes:
    """Accuracies as horizontal bars, one panel a probe; whiskers are 95 % of ``images`` answers."""
    rows = len(names)
    figure = _figure(len(panels) * (0.5 + 0.3 * rows))
    for number, (probe, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, number)
        percent = 100 * np.asarray(values, dtype=np.float64)
        whisker = [100 * 1.96 * math.sqrt(max(v * (1 - v), 0.0) / images) for v in values]
        axes.barh(range(rows), percent, color=list(colours), height=0.68)
        axes.errorbar(percent, range(rows), xerr=whisker, fmt="none", ecolor=INK, elinewidth=1)
        for row, (value, half) in enumerate(zip(percent, whisker, strict=True)):
            axes.text(value + half + 1, row, f"{value:.1f}", va="center", color=INK, fontsize=9)
        axes.set_yticks(range(rows), [_plain(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_title(f"{probe}, % right", loc="left", fontsize=10, color=INK)
        _tidy(axes, grid="x")
    return _png(figure)


def learning_curve(
    epochs: Sequence[int],
    loss: Sequence[float],
    knn: Sequence[float | None],
    reference: tuple[str, float] | None,
) -> bytes:
    """Training loss above, k-NN accuracy below with the best teacher as a dashed line."""
    figure = _figure(4.4)
    above = figure.add_subplot(2, 1, 1)
    above.plot(epochs, loss, color=INK, marker="o", markersize=3.5)
    above.set_title("training loss", loc="left", fontsize=10, color=INK)
    below = figure.add_subplot(2, 1, 2, sharex=above)
    scored = [(e, 100 * v) for e, v in zip(epochs, knn, strict=True) if v is not None]
    below.plot(
        [e for e, _ in scored],
        [v for _, v in scored],
        color=STUDENT,
        marker="o",
        markersize=3.5,
        label="student",
    )
    if reference is not None:
        below.axhline(100 * reference[1], color=OTHER, linestyle="--", label=_plain(reference[0]))
    below.legend(fontsize=9, frameon=False)
    below.set_title("k-NN, % right on the held-out images", loc="left", fontsize=10, color=INK)
    below.set_xlabel("epoch")
    for axes in (above, below):
        _tidy(axes, grid="y")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def teacher_losses(epochs: Sequence[int], losses: Mapping[str, Sequence[float]]) -> bytes:
    """One line a teacher: how well the student's ladder imitates it."""
    figure = _figure(2.8)
    axes = figure.add_subplot(1, 1, 1)
    for number, (name, values) in enumerate(losses.items()):
        axes.plot(
            epochs,
            values,
            color=_LINES[number % len(_LINES)],
            label=_plain(name),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
        )
    axes.legend(fontsize=9, frameon=False)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes, grid="y")
    return _png(figure)


def confusion_matrix(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Rows are the truth, columns the answer; shaded by the share of the row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(classes)
    figure = _figure(1.4 + 0.4 * size)
    axes = figure.add_subplot(1, 1, 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), [_plain(c) for c in classes], rotation=60, ha="right")
    axes.set_yticks(range(size), [_plain(c) for c in classes])
    axes.set_xlabel("answered")
    axes.set_ylabel("is")
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
                fontsize=8,
            )
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def _figure(height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "demo", "the demo's report") from error
    # Without pyplot: no global state, no window, no warning of too many open figures.
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _tidy(axes: Any, grid: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)


def _plain(name: str) -> str:
    """A name as it is: matplotlib would set what stands between two dollars as mathematics."""
    return name.replace("$", r"\$")
