"""What an evaluation leaves behind: results.json, CSV, the page, and the words on the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multikd.errors import MissingExtraError
from multikd.retention.gallery import Gallery, neighbours, patch_components
from multikd.retention.page import write_page
from multikd.retention.results import build_results, encoder_entry, task_entry, write_results
from multikd.retention.run import Evaluation
from multikd.retention.terminal import results_table

if TYPE_CHECKING:
    from multikd.retention.commands import EvaluateSettings

log = logging.getLogger(__name__)

_MOST_NAMED = 5


def present(
    found: Evaluation, settings: EvaluateSettings, begun: float
) -> tuple[str, dict[str, Any]]:
    """Write everything into ``settings.out``; returns (text, content of results.json).

    Args:
        found: what was measured.
        settings: where to and what with.
        begun: ``time.perf_counter()`` at the start of the command.
    """
    from multikd.retention.commands import command_line

    out = settings.out
    if settings.pictures:
        with _timed(found, "pictures"):
            _add_pictures(found, Gallery(out))
    encoders = [
        encoder_entry(
            column.name,
            column.role,
            column.spec,
            fingerprint=column.fingerprint,
            source=column.source,
            head=column.head,
            cost=found.costs.get(column.name),
        )
        for column in found.columns
    ]
    tasks = [
        task_entry(name, task, _images(found, task.data))
        for name, task in found.tasks.tasks.items()
    ]
    results = build_results(encoders, tasks, found.cells, command=command_line())
    results["unreadable"] = found.faults
    paths = write_results(out, results)
    page = _page(results, out)
    lines = [
        results_table(results).rstrip(),
        *_failures(found),
        *_unreadable(found),
        *_where(found, settings, [*paths, *([page] if page else [])]),
        _times(found, time.perf_counter() - begun),
    ]
    return "\n".join(lines), results


def _images(found: Evaluation, data: str) -> dict[str, int]:
    """Images of each split that every encoder could be scored on."""
    splits = found.subjects[found.columns[0].name, data].splits
    return {name: len(split) for name, split in splits.items()}


def _add_pictures(found: Evaluation, gallery: Gallery) -> None:
    """Neighbours and patch components, once an encoder and data set: in its first cell there."""
    done: set[tuple[str, str]] = set()
    for cell in found.cells:
        data = found.tasks.tasks[cell.task].data
        if cell.result is None or (cell.encoder, data) in done:
            continue
        done.add((cell.encoder, data))
        subject = found.subjects[cell.encoder, data]
        details = dict(cell.result.details)
        try:
            if (near := neighbours(subject, gallery)) is not None:
                details["neighbours"] = near
            if (components := patch_components(subject, gallery)) is not None:
                details["pca"] = components
        except (ValueError, RuntimeError) as error:
            log.warning("no pictures of %s: %s", cell.encoder, error)
        cell.result.details = details


@contextmanager
def _timed(found: Evaluation, what: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    found.seconds[what] = time.perf_counter() - begun


def _page(results: Mapping[str, Any], out: Path) -> Path | None:
    try:
        return write_page(results, out)
    except MissingExtraError as error:
        log.warning("no page: %s", error)
        return None


def _failures(found: Evaluation) -> list[str]:
    return [
        f"failed: {cell.task} on {cell.encoder}: {cell.error}"
        for cell in found.cells
        if cell.error is not None
    ]


def _unreadable(found: Evaluation) -> list[str]:
    lines = []
    for split, keys in found.faults.items():
        named = ", ".join(keys[:_MOST_NAMED])
        more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
        lines.append(
            f"{len(keys)} unreadable of {split}, left out for every encoder: {named}{more}"
        )
    return lines


def _where(found: Evaluation, settings: EvaluateSettings, paths: list[Path]) -> list[str]:
    del found
    return [
        f"results: {', '.join(map(str, paths))}",
        f"features: {settings.cache.expanduser()} (may be deleted at any time)",
    ]


def _times(found: Evaluation, seconds: float) -> str:
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in found.seconds.items())
    run = f"{found.extracted} images run" if found.extracted else "all features from the cache"
    kept = sum(cell.kept for cell in found.cells)
    again = f"; {kept} of {len(found.cells)} cells from an earlier run" if kept else ""
    return f"{seconds:.1f} s in all ({parts}; {run}{again})"
