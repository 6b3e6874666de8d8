"""What ``multikd shards write`` and ``multikd shards inspect`` call: progress to stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from multikd.data.decode import DEFAULT_MAX_PIXELS
from multikd.data.encode import ImageFormat
from multikd.data.inspection import inspect_shards
from multikd.data.manifest import read_manifest
from multikd.data.workers import usable_cores
from multikd.data.writer import write_shards


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, so that stdout holds nothing but the summary."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run_write(
    source: str,
    out: str,
    samples_per_shard: int = 10_000,
    size_mb: float = 256.0,
    workers: int | None = None,
    resize: int | None = None,
    format: ImageFormat | None = None,
    quality: int = 90,
    limit: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    classes_from: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Write tar shards from images; run again after an interruption, it goes on.

    Args:
        source: folder of images (class = folder), torchvision:NAME:ROOT[:SPLIT],
            idx:IMAGES:LABELS, or a .csv or .parquet with the columns path and label.
        out: folder for the shards, their indexes and dataset.json.
        samples_per_shard: most samples in a shard.
        size_mb: most megabytes in a shard.
        workers: processes that read and encode; default: one per core, 8 at most.
        resize: shrink images to this short side in pixels.
        format: re-encode as jpeg, png or webp; default: keep the bytes as they are.
        quality: of jpeg and webp, 1 to 100.
        limit: write so many images only.
        shuffle: shuffle the images; false keeps the source's order.
        seed: of the shuffle.
        classes_from: folder of shards whose class numbers these must share (a training set's).
        max_pixels: skip images of more pixels.
        overwrite: replace shards that are in the folder.

    Returns:
        A summary for people, and the same figures for machines.
    """
    if workers is None:
        workers = min(8, usable_cores())
    classes: list[str] | None = None
    if classes_from is not None:
        manifest = read_manifest(classes_from)
        if manifest is None or not manifest.get("classes"):
            raise ValueError(
                f"classes_from must be a folder of shards whose dataset.json names classes, "
                f"received {classes_from!r}"
            )
        classes = [str(name) for name in manifest["classes"]]
    with _progress_bar("writing shards") as progress:
        report = write_shards(
            source,
            out,
            samples_per_shard=samples_per_shard,
            size_mb=size_mb,
            workers=workers,
            resize=resize,
            format=format,
            quality=quality,
            limit=limit,
            shuffle=shuffle,
            seed=seed,
            classes=classes,
            max_pixels=max_pixels,
            overwrite=overwrite,
            progress=progress,
        )
    return report.text(), report.as_dict()


def run_inspect(
    urls: Sequence[str],
    limit: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    cache_dir: str | None = None,
    cache_gb: float = 50.0,
) -> tuple[str, dict[str, Any]]:
    """Say what is in shards: samples, classes, sizes, formats, what is broken, and the speed.

    Args:
        urls: paths, folders, brace ranges, globs or http(s) addresses.
        limit: look at so many samples, evenly spaced; default: all.
        max_pixels: count larger images as broken.
        cache_dir: where remote shards are kept.
        cache_gb: bound of that cache, in gigabytes.

    Returns:
        A summary for people, and the same figures for machines.
    """
    with _progress_bar("reading samples") as progress:
        report = inspect_shards(
            list(urls),
            limit=limit,
            max_pixels=max_pixels,
            cache_dir=cache_dir,
            cache_gb=cache_gb,
            progress=progress,
        )
    return report.text(), report.as_dict()
