"""``results.json`` read back: whatever wrote it, a page or a comparison gets checked values.

Strict about what every part must have; loose about ``details``, which each protocol fills as it
needs to: what is not of a shape that can be shown is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Encoder:
    """A column of the matrix."""

    name: str
    role: str
    source: str = ""
    fingerprint: str = ""
    licence: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is what was distilled: the student, with or without a teacher's head."""
        return self.role in ("student", "head")


@dataclass(frozen=True)
class TaskFacts:
    """A row of the matrix."""

    name: str
    protocol: str
    source: str
    metric: str
    unit: str
    higher_is_better: bool
    data: str
    images: Mapping[str, int]
    settings: Mapping[str, Any]

    @property
    def share(self) -> bool:
        """Whether values are shares in 0–1, to be shown in per cent."""
        return self.unit == "%"

    def shown(self, value: float | None) -> str:
        """A value as a table shows it; a dash for none."""
        if value is None:
            return "–"
        text = f"{100 * value:.1f}" if self.share else f"{value:.3g}"
        return text.replace("-", "−")

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``."""
        return a > b if self.higher_is_better else a < b


@dataclass(frozen=True)
class Cell:
    """One encoder on one task."""

    value: float | None
    low: float | None
    high: float | None
    metrics: Mapping[str, float]
    details: Mapping[str, Any]
    seconds: float | None
    error: str | None


@dataclass(frozen=True)
class Kept:
    """Share of the best teacher's score that an encoder kept, and the difference of the scores."""

    share: float | None
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None

    @property
    def verdict(self) -> str:
        """``above``, ``below`` or ``level``: a sign only where the interval of the share has one.

        Without an interval, the sign of the share itself.
        """
        low = self.share if self.low is None else self.low
        high = self.share if self.high is None else self.high
        if low is None or high is None:
            return ""
        return "above" if low > 1 else "below" if high < 1 else "level"


@dataclass(frozen=True)
class MatrixRow:
    """The best teacher of a task, and what the others kept of it."""

    best_teacher: str | None
    best_value: float | None
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class Results:
    """An evaluation, checked.

    Attributes:
        folder: where its pictures lie; None where there are none.
        multikd: version that wrote it.
        created: when.
        command: what was typed.
        encoders: columns.
        tasks: rows.
        cells: (task, encoder) → cell.
        matrix: task → row.
        mean: encoder → its mean share kept over the tasks.
        pareto: encoder, score, cost and whether it lies on the front.
        cost_label: what that cost is.
    """

    folder: Path | None
    multikd: str
    created: str
    command: str
    encoders: Sequence[Encoder]
    tasks: Sequence[TaskFacts]
    cells: Mapping[tuple[str, str], Cell]
    matrix: Mapping[str, MatrixRow]
    mean: Mapping[str, Mapping[str, float | None]]
    pareto: Sequence[Mapping[str, Any]]
    cost_label: str

    def encoder(self, name: str) -> Encoder | None:
        """By name."""
        return next((e for e in self.encoders if e.name == name), None)

    @property
    def ours(self) -> list[Encoder]:
        """Students and their heads, in order."""
        return [e for e in self.encoders if e.ours]

    def best(self, task: TaskFacts) -> set[str]:
        """Encoders with the best value of a task."""
        values = {
            e.name: cell.value
            for e in self.encoders
            if (cell := self.cells.get((task.name, e.name))) and cell.value is not None
        }
        if not values:
            return set()
        top = (max if task.higher_is_better else min)(values.values())
        return {name for name, value in values.items() if value == top}


ROLES = ("student", "head", "teacher", "encoder")


def order(encoders: Sequence[Encoder]) -> list[Encoder]:
    """Students first, then their heads, teachers, and the others."""
    return sorted(encoders, key=lambda e: ROLES.index(e.role) if e.role in ROLES else len(ROLES))


def read_results(path: Path) -> Results:
    """Read and check a ``results.json`` (or the folder that holds one).

    Raises:
        ValueError: it can't be read, is no JSON, is of another format, or lacks what it must have.
    """
    if path.is_dir():
        path = path / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the results {path} can't be read ({error.strerror}): give the results.json that "
            "`multikd evaluate --out` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON ({str(error) or 'nested too deeply'}): run `multikd evaluate` again"
        ) from error
    return results_of(content, path.parent, str(path))


def results_of(content: Any, folder: Path | None = None, where: str = "the results") -> Results:
    """Check the content of a ``results.json``.

    Args:
        content: what ``json`` made of it.
        folder: where ``pictures/`` lies.
        where: for messages.

    Raises:
        ValueError: another format, or something missing or of the wrong kind.
    """
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(
            f"{where} holds no evaluation: expected the results.json of `multikd evaluate`"
        )
    if content["format"] != FORMAT:
        raise ValueError(
            f"{where} is of format {content['format']!r}, and this version reads format {FORMAT}: "
            f"evaluate again, or use the version that wrote it ({content.get('multikd')!s:.20})"
        )
    check = _Check(where)
    encoders = [_encoder(check, entry) for entry in check.rows(content, "encoders")]
    tasks = [_task(check, entry) for entry in check.rows(content, "tasks")]
    check.unique("encoders", [e.name for e in encoders])
    check.unique("tasks", [t.name for t in tasks])
    cells = {}
    for entry in check.rows(content, "cells"):
        place = check.text(entry, "task", "cells"), check.text(entry, "encoder", "cells")
        cells[place] = Cell(
            value=number(entry.get("value")),
            low=number(entry.get("low")),
            high=number(entry.get("high")),
            metrics=_numbers(entry.get("metrics")),
            details=mapping(entry.get("details")),
            seconds=number(entry.get("seconds")),
            error=str(entry["error"]) if entry.get("error") else None,
        )
    matrix = {}
    for entry in check.rows(content, "matrix", optional=True):
        best = entry.get("best_teacher")
        matrix[check.text(entry, "task", "matrix")] = MatrixRow(
            best_teacher=best if isinstance(best, str) else None,
            best_value=number(entry.get("best_value")),
            kept={
                name: Kept(*(number(mapping(kept).get(key)) for key in _KEPT))
                for name, kept in mapping(entry.get("kept")).items()
            },
        )
    label = content.get("pareto_cost")
    return Results(
        folder=folder,
        multikd=str(content.get("multikd", "")),
        created=str(content.get("created", "")),
        command=str(content.get("command", "")),
        encoders=encoders,
        tasks=tasks,
        cells=cells,
        matrix=matrix,
        mean={
            name: {key: number(value) for key, value in mapping(entry).items()}
            for name, entry in mapping(content.get("mean")).items()
        },
        pareto=check.rows(content, "pareto", optional=True),
        cost_label=label if isinstance(label, str) else "cost",
    )


_KEPT = ("share", "low", "high", "difference", "difference_low", "difference_high")


class _Check:
    """Reads what must be there, or says what is not."""

    def __init__(self, where: str) -> None:
        self.where = where

    def rows(
        self, content: Mapping[str, Any], key: str, optional: bool = False
    ) -> list[Mapping[str, Any]]:
        rows = content.get(key, [] if optional else None)
        if optional and rows is None:
            return []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            kind = "nothing" if rows is None else type(rows).__name__
            raise ValueError(
                f"{self.where} is damaged: {key!r} must be a list of objects, found {kind}"
            )
        return rows

    def text(self, entry: Mapping[str, Any], key: str, part: str) -> str:
        value = entry.get(key)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{self.where} is damaged: an entry of {part!r} needs a text {key!r}, "
                f"found {value!r:.60}"
            )
        return value

    def unique(self, part: str, names: Sequence[str]) -> None:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.where} is damaged: {part!r} names {twice[0]!r} twice")


def _encoder(check: _Check, entry: Mapping[str, Any]) -> Encoder:
    return Encoder(
        name=check.text(entry, "name", "encoders"),
        role=str(entry.get("role") or "encoder"),
        source=str(entry.get("source") or ""),
        fingerprint=str(entry.get("fingerprint") or ""),
        licence=str(entry.get("licence") or ""),
        facts=entry,
    )


def _task(check: _Check, entry: Mapping[str, Any]) -> TaskFacts:
    return TaskFacts(
        name=check.text(entry, "name", "tasks"),
        protocol=str(entry.get("protocol") or ""),
        source=str(entry.get("source") or ""),
        metric=str(entry.get("metric") or "score"),
        unit=str(entry.get("unit") or ""),
        higher_is_better=entry.get("higher_is_better") is not False,
        data=str(entry.get("data") or ""),
        images={k: int(v) for k, v in _numbers(entry.get("images")).items()},
        settings=mapping(entry.get("settings")),
    )


def number(value: Any) -> float | None:
    """A finite number; None of anything else (a results file has null for what is missing)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; an empty one of anything else."""
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    found = {key: number(item) for key, item in mapping(value).items()}
    return {key: item for key, item in found.items() if item is not None}
