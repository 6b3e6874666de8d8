"""What is written down about a set of shards: ``dataset.json``, and the log of a running write."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from multikd.files import write_atomically
from multikd.untrusted import MOST_TEXT, parse_json, read_bytes, read_json

MANIFEST = "dataset.json"
LOG = ".multikd-write.jsonl"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True)
class Skipped:
    """A source image that could not be used."""

    item: int
    name: str
    cause: str
    detail: str


@dataclass
class ShardRecord:
    """A finished shard: it took the items at the places ``start`` to ``stop`` of the order."""

    name: str
    samples: int
    bytes: int
    start: int
    stop: int
    skipped: list[Skipped] = field(default_factory=list)
    sha256: str = ""  # of the tar's bytes; empty in what earlier versions wrote

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ShardRecord:
        """From what ``dataclasses.asdict`` gave; TypeError or KeyError where it is another."""
        skipped = [Skipped(**entry) for entry in data["skipped"]]
        record = ShardRecord(**(data | {"skipped": skipped}))
        numbers = (record.samples, record.bytes, record.start, record.stop)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("a shard's numbers must be whole")
        if not _PLAIN_NAME.match(record.name) or not isinstance(record.sha256, str):
            raise TypeError("a shard's name must be a plain one")
        return record


class WriteLog:
    """The log of an unfinished write: its configuration, and one line per finished shard."""

    def __init__(self, out: Path) -> None:
        self.path = out / LOG

    def read(self) -> tuple[dict[str, Any], list[ShardRecord]] | None:
        """Configuration and the shards that are whole, of an unfinished or a finished write.

        None where ``out`` has neither a log nor a ``dataset.json``.
        """
        try:
            lines = read_bytes(self.path, MOST_TEXT).decode("utf-8").splitlines()
            config = parse_json(lines[0], self.path)
            if isinstance(config, dict):
                return config, self._whole(_parsed(lines[1:]))
        except (OSError, ValueError, IndexError):
            pass
        manifest = read_manifest(self.path.parent)
        if manifest is None or not isinstance(manifest.get("config"), dict):
            return None
        shards = manifest.get("shards")
        return manifest["config"], self._whole(shards if isinstance(shards, list) else [])

    def _whole(self, entries: Iterable[dict[str, Any]]) -> list[ShardRecord]:
        """The records up to the first whose shard is not there in full."""
        records: list[ShardRecord] = []
        for entry in entries:
            try:
                record = ShardRecord.from_dict(entry)
                size = (self.path.parent / record.name).stat().st_size
            except (OSError, TypeError, KeyError, ValueError):
                break
            if size != record.bytes or record.start != (records[-1].stop if records else 0):
                break
            records.append(record)
        return records

    def begin(self, config: dict[str, Any], records: list[ShardRecord]) -> None:
        """Start the log, or start it again after ``records``."""
        lines = [json.dumps(config)] + [json.dumps(asdict(record)) for record in records]
        write_atomically(self.path, ("\n".join(lines) + "\n").encode())

    def append(self, record: ShardRecord) -> None:
        """Note a shard as finished; on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the log: the write is complete."""
        self.path.unlink(missing_ok=True)


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield parse_json(line, "a line of the log")
        except ValueError:  # the last line, if a kill cut it
            return


@dataclass
class WriteReport:
    """What ``write_shards`` did.

    ``counts`` goes with ``classes`` by number; ``unlabelled`` samples are in neither.
    """

    out: str
    source: str
    shards: list[ShardRecord]
    classes: list[str]
    counts: list[int]
    unlabelled: int
    notes: list[str]
    config: dict[str, Any]
    kept_shards: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Samples written."""
        return sum(record.samples for record in self.shards)

    @property
    def skipped(self) -> list[Skipped]:
        """Images that were left out."""
        return [entry for record in self.shards for entry in record.skipped]

    def manifest(self) -> dict[str, Any]:
        """The content of ``dataset.json``: the same for the same source and settings."""
        return {
            "format": 1,
            "source": self.source,
            "total": self.total,
            "bytes": sum(record.bytes for record in self.shards),
            "classes": self.classes,
            "counts": self.counts,
            "unlabelled": self.unlabelled,
            "skipped": dict(sorted(Counter(entry.cause for entry in self.skipped).items())),
            "notes": self.notes,
            "shards": [asdict(record) for record in self.shards],
            "config": self.config,
        }

    def as_dict(self) -> dict[str, Any]:
        """For machines: the manifest, and what this run did."""
        run = {"out": self.out, "kept_shards": self.kept_shards, "seconds": round(self.seconds, 3)}
        return self.manifest() | run

    def text(self) -> str:
        """For people, a few lines."""
        size = sum(record.bytes for record in self.shards) / 1e6
        lines = [
            f"{self.total} samples in {len(self.shards)} shards, {size:.1f} MB, in {self.out}",
            f"source   {self.source}",
        ]
        if self.kept_shards:
            lines.append(f"kept     {self.kept_shards} shards that an earlier run had finished")
        if self.total - self.unlabelled:
            least, most = min(self.counts), max(self.counts)
            lines.append(f"classes  {len(self.classes)}, of {least} to {most} samples")
        if self.unlabelled:
            lines.append(f"labels   {self.unlabelled} samples have none")
        skipped = self.skipped
        if skipped:
            causes = Counter(entry.cause for entry in skipped)
            listed = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
            lines.append(f"skipped  {len(skipped)} images ({listed}):")
            lines += [f"         {entry.name}: {entry.cause}" for entry in skipped[:10]]
            if len(skipped) > 10:
                lines.append(f"         … and {len(skipped) - 10} more, see {MANIFEST}")
        lines += [f"note     {note}" for note in self.notes]
        lines.append(f"took     {self.seconds:.1f} s")
        return "\n".join(lines)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The ``dataset.json`` of a folder of shards; None where there is none that can be read."""
    try:
        data = read_json(Path(folder) / MANIFEST)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
