"""Rows as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 130


def text_table(rows: Sequence[Mapping[str, str]], title: str, width: int | None = None) -> str:
    """A table with a column for every key of any row, in the order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    grid = Table(title=title)
    for place, name in enumerate(names):
        grid.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(row.get(name, "") for name in names))
    console = Console(width=width)
    if width is None and not console.is_terminal:
        console = Console(width=_WIDTH)  # into a file or a pipe, which has no width
    with console.capture() as capture:
        console.print(grid)
    return capture.get().rstrip("\n")
