"""A CSV or Parquet file of paths and labels as an origin."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from dataclasses import dataclass

from multikd.data.decode import SampleFault
from multikd.data.origins.base import Listing, numbered, read_file
from multikd.errors import MissingExtraError


@dataclass
class TableOrigin:
    """A CSV or Parquet file with a column ``path`` and, where there are classes, ``label``.

    Relative paths start at the table's folder. Labels that are all whole numbers are class
    numbers; anything else is a class name. An empty label is none.
    """

    table: str
    classes: tuple[str, ...] = ()

    def list_items(self) -> Listing:
        """Rows in the table's order."""
        columns = self._columns()
        if "path" not in columns:
            raise ValueError(
                f"the table {self.table!r} needs a column 'path' (and 'label' for classes), "
                f"received the columns: {', '.join(map(repr, columns)) or 'none'}"
            )
        names = columns["path"]
        if not names:
            raise ValueError(f"the table {self.table!r} has no rows")
        sizes = [self._size(name) for name in names]
        if "label" not in columns:
            notes = ["no column 'label': the shards carry no labels"]
            return Listing(names, [-1] * len(names), sizes, list(self.classes), notes)
        labels, classes = self._numbers(columns["label"])
        return Listing(names, labels, sizes, classes)

    def _numbers(self, texts: list[str]) -> tuple[list[int], list[str]]:
        given = [text for text in texts if text]
        if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in given):
            return numbered(texts, self.classes, self.table)
        numbers = [int(text) if text else -1 for text in texts]
        count = max(numbers, default=-1) + 1
        if self.classes and count > len(self.classes):
            raise ValueError(
                f"the table {self.table!r} has the class number {count - 1}, "
                f"but {len(self.classes)} class names were given"
            )
        # A class name a number is only worth it where numbers are dense.
        known = [str(n) for n in range(count)] if count <= 10 * len(given) + 1000 else []
        return numbers, list(self.classes) or known

    def _size(self, name: str) -> int:
        path = self._path(name)
        return os.path.getsize(path) if os.path.isfile(path) else 0

    def _path(self, name: str) -> str:
        return os.path.join(os.path.dirname(self.table), os.path.expanduser(name))

    def _columns(self) -> dict[str, list[str]]:
        return read_table(self.table, ("path", "label"))

    def read(self, item: int, name: str) -> bytes:
        """The file's bytes."""
        if not name:
            raise SampleFault("missing", f"row {item} has an empty path")
        return read_file(self._path(name))


def read_table(table: str, wanted: Collection[str] | None = None) -> dict[str, list[str]]:
    """The columns of a CSV, TSV or Parquet file, as text without surrounding blanks.

    Args:
        table: the file.
        wanted: of a Parquet file, read these columns alone (the others come back empty).

    Raises:
        ValueError: it can't be read, or has rows of unequal length.
        MissingExtraError: a Parquet file without pyarrow.
    """
    if table.lower().endswith((".parquet", ".pq")):
        return _parquet_columns(table, wanted)
    delimiter = "\t" if table.lower().endswith(".tsv") else ","
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            head = [name.strip() for name in next(reader, [])]
            columns: dict[str, list[str]] = {name: [] for name in head}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(head):
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} fields, expected {len(head)}"
                    )
                for name, value in zip(head, row, strict=True):
                    columns[name].append(value.strip())
    except (OSError, UnicodeError, csv.Error, ValueError) as error:
        raise ValueError(f"cannot read the table {table!r}: {error}") from error
    return columns


def _parquet_columns(table: str, wanted: Collection[str] | None) -> dict[str, list[str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "tables", "reading a Parquet file") from error
    try:
        with pq.ParquetFile(table) as file:
            everything = list(file.schema_arrow.names)
            present = [name for name in everything if wanted is None or name in wanted]
            data = file.read(columns=present)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read the table {table!r}: {error}") from error
    columns: dict[str, list[str]] = {name: [] for name in everything}
    for name in present:
        columns[name] = ["" if v is None else str(v).strip() for v in data[name].to_pylist()]
    return columns
