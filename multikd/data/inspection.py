"""What is in a list of shards, what is broken, and how fast it reads."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from multikd.data.decode import (
    DEFAULT_MAX_PIXELS,
    SampleFault,
    decode_label,
    decode_with_format,
    find_image,
)
from multikd.data.manifest import read_manifest
from multikd.data.remote import is_remote
from multikd.data.sources import ShardSource
from multikd.data.urls import expand_urls

_MOST_LISTED = 1000
Progress = Callable[[int, int], None]


class Broken(NamedTuple):
    """A sample or a shard that cannot be used (``multikd.types.Fault`` would import torch)."""

    cause: str
    shard: str
    key: str
    detail: str


@dataclass
class InspectReport:
    """What ``inspect_shards`` found. Counts are over the samples that were looked at.

    Attributes:
        shards: shards that could be indexed.
        samples: samples in them.
        looked_at: samples that were read and decoded.
        bytes: size of the shards.
        labels: class number → count, −1 for samples without one.
        class_names: by number, where a ``dataset.json`` beside the shards has them.
        formats: image format → count.
        widths, heights: of the decoded images, upright.
        broken: samples and shards that cannot be used.
        index_faults: members and samples that the indexes left out or doubt, by cause.
        read_bytes, seconds: of reading and decoding, on one core.
    """

    urls: list[str]
    shards: int = 0
    samples: int = 0
    looked_at: int = 0
    bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    class_names: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    index_faults: dict[str, int] = field(default_factory=dict)
    read_bytes: int = 0
    seconds: float = 0.0

    @property
    def causes(self) -> dict[str, int]:
        """Broken samples and shards, counted by cause."""
        return dict(Counter(fault.cause for fault in self.broken).most_common())

    def class_name(self, label: int) -> str:
        """Name of a class, its number where no name is known."""
        if label < 0:
            return "(no label)"
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        seconds = self.seconds or float("inf")
        return {
            "urls": self.urls,
            "shards": self.shards,
            "samples": self.samples,
            "looked_at": self.looked_at,
            "bytes": self.bytes,
            "classes": [
                {"label": label, "name": self.class_name(label), "count": count}
                for label, count in sorted(self.labels.items())
            ],
            "formats": dict(self.formats.most_common()),
            "width": _spread(self.widths),
            "height": _spread(self.heights),
            "broken": self.causes,
            "broken_samples": [fault._asdict() for fault in self.broken[:_MOST_LISTED]],
            "index_faults": self.index_faults,
            "seconds": round(self.seconds, 3),
            "mb_per_second": round(self.read_bytes / 1e6 / seconds, 2),
            "images_per_second": round(self.looked_at / seconds, 1),
        }

    def text(self) -> str:
        """For people."""
        facts = self.as_dict()
        part = "" if self.looked_at == self.samples else f", of which {self.looked_at} were read"
        lines = [
            f"{self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB{part}",
            *_class_lines(facts["classes"]),
        ]
        if self.widths:
            width, height = facts["width"], facts["height"]
            lines += [
                f"width    {width['min']} / {width['median']:g} / {width['max']} px"
                "  (least / median / greatest)",
                f"height   {height['min']} / {height['median']:g} / {height['max']} px",
                "formats  " + ", ".join(f"{n} {name}" for name, n in facts["formats"].items()),
            ]
        lines.append(
            f"speed    {facts['mb_per_second']:.1f} MB/s, {facts['images_per_second']:.0f} images/s"
            " read and decoded by one process"
        )
        for cause, count in self.index_faults.items():
            lines.append(f"index    {count} × {cause}")
        if not self.broken:
            return "\n".join([*lines, "broken   none"])
        listed = ", ".join(f"{count} {cause}" for cause, count in self.causes.items())
        lines.append(f"broken   {len(self.broken)}: {listed}")
        for fault in self.broken[:20]:
            lines.append(f"         {fault.shard} {fault.key}: {fault.cause} ({fault.detail})")
        if len(self.broken) > 20:
            lines.append(f"         … and {len(self.broken) - 20} more")
        return "\n".join(lines)


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": median(values), "max": max(values)}


def _class_lines(classes: list[dict[str, Any]]) -> list[str]:
    shown = [f"{entry['name']} {entry['count']}" for entry in classes[:20]]
    if len(classes) > 20:
        shown.append(f"… and {len(classes) - 20} more")
    labelled = sum(entry["label"] >= 0 for entry in classes)
    return [f"classes  {labelled}: {', '.join(shown)}"] if classes else []


def inspect_shards(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    limit: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    index_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_gb: float = 50.0,
    progress: Progress | None = None,
) -> InspectReport:
    """Index shards, then read and decode their samples; what is broken is listed, not raised.

    Args:
        spec: what ``expand_urls`` takes.
        limit: look at so many samples, evenly spaced over all; None looks at all.
        max_pixels: images of more count as broken (``too large``).
        index_dir, cache_dir, cache_gb: see ``ShardSource``.
        progress: called with (samples looked at, samples to look at).

    Raises:
        ValueError: no shard matches, or none of them can be indexed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, received {limit}")
    urls = expand_urls(spec)
    report = InspectReport(urls=urls, class_names=_class_names(urls))
    usable: list[str] = []
    problem = ""
    for url in urls:  # one by one, since one bad shard must not hide the others
        try:
            ShardSource(
                url,
                index_dir=index_dir,
                cache_dir=cache_dir,
                cache_gb=cache_gb,
                allow_truncated=True,
            )
            usable.append(url)
        except (ValueError, OSError) as error:
            problem = str(error)
            report.broken.append(Broken("unusable shard", url, "", problem))
    if not usable:
        raise ValueError(f"none of the {len(urls)} shards can be read; the last: {problem}")
    source = ShardSource(
        usable, index_dir=index_dir, cache_dir=cache_dir, cache_gb=cache_gb, allow_truncated=True
    )
    report.shards, report.samples = len(usable), len(source)
    report.bytes = sum(index.size for index in source.indexes)
    report.index_faults = source.faults
    for shard, index in enumerate(source.indexes):
        if index.truncated:
            fault = Broken("truncated shard", source.name(shard), "", index.truncated)
            report.broken.append(fault)
    _note_shared_keys(source, report)
    _read_samples(source, report, limit, max_pixels, progress)
    source.close()
    return report


def _class_names(urls: list[str]) -> list[str]:
    folders = {str(Path(url).parent) for url in urls if not is_remote(url)}
    if len(folders) != 1:  # several data sets may number their classes differently
        return []
    manifest = read_manifest(folders.pop()) or {}
    classes = manifest.get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _note_shared_keys(source: ShardSource, report: InspectReport) -> None:
    seen: set[str] = set()
    shared = 0
    for index in source.indexes:
        keys = set(index.keys)
        shared += len(keys & seen)
        seen |= keys
    if shared:
        report.index_faults["key in several shards"] = shared


def _read_samples(
    source: ShardSource,
    report: InspectReport,
    limit: int | None,
    max_pixels: int,
    progress: Progress | None,
) -> None:
    count = min(len(source), limit or len(source))
    positions = np.linspace(0, len(source) - 1, count).round().astype(int)
    started = time.perf_counter()
    for done, position in enumerate(positions.tolist(), start=1):
        shard, sample = source.locate(position)
        try:
            members = source.read_members(shard, sample)
            report.read_bytes += sum(map(len, members.values()))
            report.labels[decode_label(members)] += 1
            image, name = decode_with_format(find_image(members), max_pixels)
            report.formats[name] += 1
            report.widths.append(image.width)
            report.heights.append(image.height)
        except SampleFault as fault:
            key = source.key(shard, sample)
            report.broken.append(Broken(fault.cause, source.name(shard), key, fault.detail))
        report.looked_at += 1
        if progress is not None:
            progress(done, count)
    report.seconds = time.perf_counter() - started
