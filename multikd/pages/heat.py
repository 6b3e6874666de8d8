"""A heat map of shares."""

from __future__ import annotations

from collections.abc import Sequence

from multikd.pages.canvas import INK, heading, new_figure, plain, png


def heat_map(values: Sequence[Sequence[float]], names: Sequence[str], title: str) -> bytes:
    """Shares in 0–1 of every pair of ``names``, written into their squares.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    size = len(names)
    figure = new_figure(1.3 + size * min(0.5, 3.2 / size))
    axes = figure.add_subplot(1, 1, 1)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), [plain(n, 20) for n in names], rotation=60, ha="right")
    axes.set_yticks(range(size), [plain(n, 20) for n in names])
    if size <= 12:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.55 else INK
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
                )
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    heading(axes, title)
    return png(figure)
