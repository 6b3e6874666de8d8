"""Columns of values that scores are broken down by: from a table, or from the samples' own JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from multikd.data.origins.table import read_table
from multikd.retention.images import ImageSource

_MOST_COLUMNS = 64


def read_metadata(
    where: str, source: ImageSource, rows: npt.NDArray[np.int64], table: str | None
) -> dict[str, list[str]]:
    """Column → the value of each image, as text; '' where there is none.

    Args:
        where: the split, for messages.
        source: of the images.
        rows: which of them.
        table: ``.csv``, ``.tsv`` or ``.parquet`` with a ``key`` column; None: the samples' ``json``
            members, where they have some.

    Raises:
        ValueError: the table can't be read, has no ``key``, a key twice, or none of these images.
    """
    if table is None:
        return _from_records(source, rows)
    path = Path(table).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no table {path}: give a .csv or .parquet with a 'key' column")
    columns = read_table(str(path))
    if "key" not in columns:
        raise ValueError(
            f"the table {table!r} needs a column 'key' that names the images, received the columns "
            f"{', '.join(map(repr, columns)) or 'none'}"
        )
    place: dict[str, int] = {}
    for row, key in enumerate(columns["key"]):
        if place.setdefault(key, row) != row:
            raise ValueError(f"the table {table!r} has the key {key!r} twice: one row an image")
    found = [_place(place, source.keys[row]) for row in rows.tolist()]
    missing = [source.keys[row] for row, at in zip(rows.tolist(), found, strict=True) if at is None]
    if len(missing) == len(found):
        raise ValueError(
            f"the table {table!r} has none of the images of {where} (such as {missing[0]!r}): its "
            "'key' must be the sample's key, or the image's path in its folder"
        )
    return {
        name: ["" if at is None else values[at] for at in found]
        for name, values in columns.items()
        if name != "key"
    }


def _place(place: Mapping[str, int], key: str) -> int | None:
    """Of an image called so, or by its base name with or without extension."""
    base = os.path.basename(key)
    names = (key, os.path.splitext(key)[0], base, os.path.splitext(base)[0])
    return next((place[name] for name in names if name in place), None)


def _from_records(source: ImageSource, rows: npt.NDArray[np.int64]) -> dict[str, list[str]]:
    """Plain values (text, numbers, true/false) of the samples' JSON, but for the label."""
    if not source.record(int(rows[0])):
        return {}
    records = [source.record(row) for row in rows.tolist()]
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if isinstance(value, str | int | float | bool) and name not in ("label", "labels")
    )
    return {
        name: [str(record.get(name, "")) for record in records]
        for name in list(names)[:_MOST_COLUMNS]
    }
