"""What ``multikd teachers list`` and ``multikd teachers inspect`` run: text and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multikd.teachers.inspection import inspect_encoder
from multikd.teachers.registry import list_encoders

_HEADER = ("encoder", "image", "licence", "weights")


def run_list(pattern: str | None = None) -> tuple[str, dict[str, Any]]:
    """Encoders that have a name, as a table; returns (text, figures)."""
    rows = list_encoders(pattern)
    figures = {"teachers": [row.as_dict() for row in rows]}
    if not rows:
        return f"no encoder matches {pattern!r}: try a part of a name, such as 'dino'", figures
    cells = [_HEADER] + [
        (r.name, "any" if r.image_size is None else str(r.image_size), r.licence, r.weights)
        for r in rows
    ]
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(_HEADER))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(c, widths, strict=True)).rstrip() for c in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*lines, f"{len(rows)} encoders"]), figures


def run_inspect(
    name: str, checkpoint: str | Path | None = None, image: str | Path | None = None
) -> tuple[str, dict[str, Any]]:
    """Load an encoder, run one image, and say what was found; returns (text, figures)."""
    report = inspect_encoder(name, None if checkpoint is None else str(checkpoint), image)
    return report.text(), report.as_dict()
