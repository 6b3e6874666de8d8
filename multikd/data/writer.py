"""Shards written from an origin: in parallel, restartable, the same bytes on every machine load.

Workers read, check and encode chunks of items; the parent alone writes the tars, in the order of
the items, so that the number of workers cannot show in the result. A finished shard is renamed
into place and logged; a run that was killed goes on behind the last logged shard.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from multikd.data.decode import DEFAULT_MAX_PIXELS, SampleFault
from multikd.data.encode import Encoding, ImageFormat
from multikd.data.manifest import (
    MANIFEST,
    ShardRecord,
    Skipped,
    WriteLog,
    WriteReport,
)
from multikd.data.origins import Listing, Origin, open_origin
from multikd.data.shard_file import OpenShard, bytes_in_tar, sample_members
from multikd.files import TEMPORARY_SUFFIX, file_lock, write_atomically

_CHUNK = 16  # items per task: enough to hide the pipe, few enough to stay small in memory
_OURS = re.compile(r"^shard-\d{6,}\.tar(\.index\.npz)?$")
Progress = Callable[[int, int], None]
Prepared = tuple[bytes, str] | SampleFault


def write_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples_per_shard: int = 10_000,
    size_mb: float = 256.0,
    workers: int = 0,
    resize: int | None = None,
    format: ImageFormat | None = None,
    quality: int = 90,
    limit: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> WriteReport:
    """Write tar shards with their indexes and ``dataset.json``.

    The result depends on the source and the settings, not on ``workers`` and not on
    interruptions. A sample's key is its place in the source and its name; its members are the
    image and, where it has a class, ``cls``.

    Args:
        source: what ``open_origin`` takes.
        out: folder of the shards; made if needed.
        samples_per_shard, size_mb: a shard is full when it would exceed either (10⁶ bytes).
        workers: processes that read and encode; 0 does it in this one. A script that asks for
            some needs ``if __name__ == "__main__"``, as they are spawned.
        resize, format, quality, max_pixels: see ``Encoding``.
        limit: write so many items only (a random subset where they are shuffled).
        shuffle: permute the items by ``seed`` (else they stay in the source's order).
        seed: of the permutation.
        classes: class names in the order of their numbers; None takes those that occur, sorted.
        overwrite: delete the shards that an earlier write left in ``out``.
        progress: called with (items done, items).

    Raises:
        ValueError: the source is missing or empty, none of its images can be read, a setting is
            out of range, or ``out`` holds shards of another source or other settings.
        RuntimeError: a worker process died.
    """
    started = time.perf_counter()
    _check_settings(samples_per_shard, size_mb, workers, limit)
    encoding = Encoding(resize, format, quality, max_pixels)
    origin = open_origin(source, classes)
    listing = origin.list_items()
    order = _order(len(listing.names), limit, seed if shuffle else None)
    config: dict[str, Any] = {
        "kind": type(origin).__name__,
        "source digest": listing.digest(),
        "samples_per_shard": samples_per_shard,
        "size_mb": size_mb,
        "resize": resize,
        "format": format,
        "quality": quality,
        "limit": limit,
        "shuffle": shuffle,
        "seed": seed if shuffle else 0,
        "max_pixels": max_pixels,
    }
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write shards into {folder}: {error.strerror}") from error
    with _sole_writer(folder):
        records = _earlier(folder, config, overwrite)
        kept = len(records)
        if records and progress is not None:
            progress(records[-1].stop, len(order))
        if not records or records[-1].stop < len(order):
            WriteLog(folder).begin(config, records)
            start = records[-1].stop if records else 0

            def tell(done: int) -> None:
                if progress is not None:
                    progress(done, len(order))

            prepared = _prepared(origin, listing, order[start:], encoding, workers)
            with contextlib.closing(prepared) as items:  # stops the workers, whatever happens
                _write(folder, listing, items, start, records, samples_per_shard, size_mb, tell)
        report = _report(source, folder, listing, order, records, config)
        report.kept_shards, report.seconds = kept, time.perf_counter() - started
        text = json.dumps(report.manifest(), indent=1, ensure_ascii=False)
        # Names that are no valid UTF-8 exist on Linux; they must not stop the last line of a write.
        write_atomically(folder / MANIFEST, text.encode("utf-8", "backslashreplace"))
        WriteLog(folder).remove()
    return report


def _check_settings(samples: int, size_mb: float, workers: int, limit: int | None) -> None:
    for name, value, least in (
        ("samples_per_shard", samples, 1),
        ("workers", workers, 0),
        ("limit", 1 if limit is None else limit, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, received {value}")
    if not size_mb > 0:
        raise ValueError(f"size_mb must be above 0, received {size_mb}")


def _order(count: int, limit: int | None, seed: int | None) -> list[int]:
    if seed is None:
        order = list(range(count))
    else:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    return order[:limit]


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    lock = folder / ".multikd-write.lock"
    try:
        with file_lock(lock, wait=False):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing shards into {folder}: wait for it") from error


def _earlier(folder: Path, config: dict[str, Any], overwrite: bool) -> list[ShardRecord]:
    """Shards of an earlier run that this one goes on from; half-written files are deleted."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        path.unlink(missing_ok=True)
    if overwrite:
        for path in folder.iterdir():
            if _OURS.match(path.name) or path.name in (MANIFEST, WriteLog(folder).path.name):
                path.unlink()
    earlier = WriteLog(folder).read()
    if earlier is None:
        if any(folder.glob("*.tar")):
            raise ValueError(
                f"{folder} holds .tar files but no {MANIFEST}: expected an empty folder or one "
                "that an earlier run of this write left; choose another"
            )
        return []
    known, records = earlier
    different = [
        f"{name} was {known.get(name)!r} and is now {config.get(name)!r}"
        for name in config | known
        if name != "source digest" and known.get(name) != config.get(name)
    ]
    if known.get("source digest") != config["source digest"]:
        different.append("the source has other images, sizes, labels or classes")
    if not records and not any(folder.glob("*.tar")):
        return []  # the earlier run ended before its first shard: nothing to mix with
    if different:
        raise ValueError(
            f"{folder} holds shards of another write ({'; '.join(different)}): "
            "choose another folder, or overwrite them"
        )
    return records


_worker: tuple[Origin, Encoding] | None = None  # what a worker process works with


def _start_worker(origin: Origin, encoding: Encoding) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _worker = (origin, encoding)


def _work(items: list[tuple[int, str]]) -> list[Prepared]:
    if _worker is None:
        raise RuntimeError("_start_worker was not called")
    return [_prepare(*_worker, item, name) for item, name in items]


def _prepare(origin: Origin, encoding: Encoding, item: int, name: str) -> Prepared:
    try:
        return encoding.apply(origin.read(item, name))
    except SampleFault as fault:
        return fault


def _prepared(
    origin: Origin, listing: Listing, order: list[int], encoding: Encoding, workers: int
) -> Generator[tuple[int, Prepared], None, None]:
    """(item, what became of it) in the order given, however many workers there are."""
    if workers == 0:
        for item in order:
            yield item, _prepare(origin, encoding, item, listing.names[item])
        return
    chunks = deque(order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK))
    pending: deque[tuple[list[int], Future[list[Prepared]]]] = deque()
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)) or 1,
        # Forking a process that has threads (torch's, a progress bar's) may hang it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(origin, encoding),
    )
    try:
        while chunks or pending:
            while chunks and len(pending) < 3 * workers:  # bounds what waits in memory
                chunk = chunks.popleft()
                named = [(item, listing.names[item]) for item in chunk]
                pending.append((chunk, pool.submit(_work, named)))
            chunk, future = pending.popleft()
            yield from zip(chunk, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for want of memory: run again with fewer workers; "
            "finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    folder: Path,
    listing: Listing,
    items: Iterator[tuple[int, Prepared]],
    place: int,
    records: list[ShardRecord],
    samples_per_shard: int,
    size_mb: float,
    tell: Callable[[int], None],
) -> None:
    """Write ``items``, the first of which has ``place`` in the order; extends ``records``."""
    shard = OpenShard(folder, len(records), place)
    try:
        for item, result in items:
            name = listing.names[item]
            if isinstance(result, SampleFault):
                shard.skipped.append(Skipped(item, name, result.cause, result.detail))
            else:
                members = sample_members(item, name, listing.labels[item], *result)
                size = bytes_in_tar(members)
                if shard.samples and (
                    shard.samples >= samples_per_shard or shard.size + size > size_mb * 1e6
                ):
                    records.append(shard.finish(place))
                    WriteLog(folder).append(records[-1])
                    shard = OpenShard(folder, len(records), place)
                shard.add(members, size)
            place += 1
            tell(place)
        _finish_last(folder, shard, place, records)
    finally:
        shard.discard()


def _finish_last(folder: Path, shard: OpenShard, place: int, records: list[ShardRecord]) -> None:
    if shard.samples:
        records.append(shard.finish(place))
    elif records:  # only unreadable items came after the last full shard
        records[-1].stop = place
        records[-1].skipped += shard.skipped
    else:
        first = shard.skipped[0]
        raise ValueError(
            f"none of the {len(shard.skipped)} images of the source can be read, so no shard was "
            f"written; the first: {first.name}: {first.cause} ({first.detail})"
        )


def _report(
    source: str | os.PathLike[str],
    folder: Path,
    listing: Listing,
    order: list[int],
    records: list[ShardRecord],
    config: dict[str, Any],
) -> WriteReport:
    skipped = {entry.item for record in records for entry in record.skipped}
    counts = [0] * len(listing.classes)
    unlabelled = 0
    for item in order:
        if item in skipped:
            continue
        label = listing.labels[item]
        if label < 0:
            unlabelled += 1
        elif label < len(counts):
            counts[label] += 1
    return WriteReport(
        out=str(folder),
        source=os.fspath(source),
        shards=records,
        classes=listing.classes,
        counts=counts,
        unlabelled=unlabelled,
        notes=listing.notes,
        config=config,
    )
