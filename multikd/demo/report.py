"""The demo's report: one HTML file with everything in it, light enough to mail."""

from __future__ import annotations

from pathlib import Path

from multikd.demo.page import render
from multikd.demo.report_data import History, NeighbourRow, ReportData, Role, Score
from multikd.files import write_text_atomically

__all__ = ["History", "NeighbourRow", "ReportData", "Role", "Score", "write_report"]


def write_report(out: Path, data: ReportData) -> Path:
    """Write ``report.html``, self-contained: no script, no link that is needed.

    Args:
        out: folder (``report.html`` inside it) or a path that ends in ``.html``.
        data: what to say.

    Returns:
        The path of the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    path = out if out.suffix == ".html" else out / "report.html"
    write_text_atomically(path, render(data))
    return path
