"""What every chart is drawn on: colours, axes, and the PNG that comes out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from multikd.errors import MissingExtraError

INK, FAINT, PAPER = "#1f2933", "#d9dee4", "#ffffff"
STUDENT, OTHER, GOOD, BAD = "#1565c0", "#8a94a0", "#2e7d32", "#c62828"
# Distinct to colour-blind readers as well, and each line has its own marker (after Okabe and Ito).
LINES = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
MARKERS = "osD^vP"
WIDTH = 4.5  # inches; on a phone 362 px wide, so that 9 points are 10 px


def new_figure(height: float) -> Any:
    """A matplotlib figure ``WIDTH`` × ``height`` inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "evaluate", "a page with charts") from error
    # Without pyplot: no global state, no window, no warning of too many open figures.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG, the same bytes for the same drawing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def tidy(axes: Any, grid: str) -> None:
    """Two quiet spines and a grid along ``x``, ``y`` or ``both``."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)


def heading(axes: Any, text: str) -> None:
    """A small title at the left."""
    axes.set_title(plain(text, 64), loc="left", fontsize=10, color=INK)


def plain(name: str, length: int = 32) -> str:
    """A name as it is: matplotlib would set what stands between two dollars as mathematics.

    Past ``length`` letters the middle is left out, for a long name would push the chart aside.
    """
    if len(name) > length:
        half = (length - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return printable.replace("$", r"\$")


def legend(axes: Any, labels: Sequence[str]) -> None:
    """A legend where there is something to tell apart; above the axes when it is long."""
    if len([label for label in labels if label]) < 1:
        return
    if len(labels) <= 3:
        axes.legend(fontsize=9, frameon=False)
    else:
        axes.legend(
            fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.08),
            borderaxespad=0,
        )  # fmt: skip
