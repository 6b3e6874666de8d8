"""Curves out of a cell's details: each protocol notes them as suits it, the page draws one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multikd.retention.reading import mapping, number


@dataclass(frozen=True)
class Curve:
    """Points of one encoder; x all numbers or all text, y None where nothing was measured."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    x_label: str = ""
    y_label: str = ""
    share: bool = True


def curves_of(details: Mapping[str, Any]) -> list[Curve]:
    """What can be drawn of ``details``; what is of no known shape is left out.

    Known are ``curves`` (a list as ``TaskResult.details`` says), ``curve`` (columns of equal
    length, the first of them x), ``reliability`` (bins of confidence) and ``errors`` with
    ``severities`` (of corruptions: their mean is drawn).
    """
    found = [
        _curve(
            item.get("name"), item.get("x"), item.get("y"), item.get("x_label"),
            item.get("y_label"), item.get("share") is not False,
        )
        for item in _rows(details.get("curves"))
    ]  # fmt: skip
    found += _columns(mapping(details.get("curve")))
    bins = [row for row in _rows(details.get("reliability")) if number(row.get("images"))]
    found.append(
        _curve(
            "reliability",
            [row.get("confidence") for row in bins],
            [row.get("accuracy") for row in bins],
            "mean confidence of a bin",
            "share of right answers",
        )
    )
    found.append(_severities(details))
    return [curve for curve in found if curve is not None]


def _columns(columns: Mapping[str, Any]) -> list[Curve | None]:
    if not columns:
        return []
    across, *others = columns
    if {"coverage", "risk"} <= set(columns):
        # The threshold beside them belongs to the point, and is no curve of its own.
        return [_curve("risk-coverage", columns["coverage"], columns["risk"], "coverage", "errors")]
    return [
        _curve(f"{key} by {across}", columns[across], columns[key], across, key) for key in others
    ]


def _severities(details: Mapping[str, Any]) -> Curve | None:
    severities = details.get("severities")
    rows = [row for row in mapping(details.get("errors")).values() if isinstance(row, list)]
    if not isinstance(severities, list) or not rows:
        return None
    if any(len(row) != len(severities) or None in map(number, row) for row in rows):
        return None
    right = [1 - sum(float(row[i]) for row in rows) / len(rows) for i in range(len(severities))]
    name = f"top-1 by severity, mean of {len(rows)} corruptions"
    return _curve(name, severities, right, "severity", "top-1")


def _curve(
    name: Any, x: Any, y: Any, x_label: Any = "", y_label: Any = "", share: bool = True
) -> Curve | None:
    if not isinstance(x, list) or not isinstance(y, list) or not len(x) == len(y) > 0:
        return None
    heights = [number(value) for value in y]
    places: list[float | str] = []
    for value in x:
        place = value if isinstance(value, str) else number(value)
        if place is None:
            return None
        places.append(place)
    if len({isinstance(place, str) for place in places}) != 1 or not any(
        height is not None for height in heights
    ):
        return None
    return Curve(
        name if isinstance(name, str) else "",
        places,
        heights,
        x_label if isinstance(x_label, str) else "",
        y_label if isinstance(y_label, str) else "",
        share,
    )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [mapping(item) for item in value] if isinstance(value, list) else []
