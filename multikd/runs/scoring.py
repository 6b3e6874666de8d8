"""Scores of an encoder on the tasks of ``multikd evaluate``, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def score(
    encoder: str, tasks: str, data: tuple[str, ...], cache: Path, with_teachers: bool
) -> dict[str, dict[str, Any]]:
    """Encoder → task → value, on the tasks of ``multikd evaluate``.

    Raises:
        ValueError: a task that failed.
    """
    from multikd.retention import run
    from multikd.retention.encoders import OpenOptions
    from multikd.retention.extract import ExtractOptions

    options = ExtractOptions(cache=cache, batch_size=64, workers=1)
    opening = OpenOptions(heads=(), with_teachers=with_teachers)
    found = run.prepare([encoder], tasks, data, opening, options, progress=False)
    run.extract_all(found, options, progress=False)
    run.score_all(found, "cpu", progress=False)
    scores: dict[str, dict[str, Any]] = {column.name: {} for column in found.columns}
    for cell in found.cells:
        if cell.error is not None:
            raise ValueError(f"task {cell.task!r} failed: {cell.error}")
        if cell.result is None:
            continue
        task = found.tasks.tasks[cell.task]
        scores[cell.encoder][cell.task] = {
            "value": float(cell.result.value),
            "metric": task.metric,
            "unit": task.unit,
            "higher_is_better": task.higher_is_better,
            "in_mean": task.in_mean,
        }
    return scores
