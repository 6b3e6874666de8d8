"""What an evaluation leaves behind: results.json, CSV, the page, and the words on the terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multikd.errors import MissingExtraError
from multikd.evaluation.cost import measure_cost, measure_deployed
from multikd.files import write_text_atomically
from multikd.retention.digest import combined
from multikd.retention.encoders import Column
from multikd.retention.gallery import Gallery, neighbours, patch_components
from multikd.retention.page import write_page
from multikd.retention.results import build_results, encoder_entry, task_entry, write_results
from multikd.retention.run import Evaluation
from multikd.retention.terminal import results_table
from multikd.types import Grid

if TYPE_CHECKING:
    from multikd.retention.commands import EvaluateSettings

log = logging.getLogger(__name__)

_MOST_NAMED = 5


def present(
    found: Evaluation, settings: EvaluateSettings, seconds: float
) -> tuple[str, dict[str, Any]]:
    """Write everything into ``settings.out``; returns (text, content of results.json)."""
    from multikd.retention.commands import command_line, device_of

    out = settings.out
    device = device_of(settings.device)
    if settings.pictures:
        _add_pictures(found, Gallery(out))
    costs = _costs(found, settings, device) if settings.cost else {}
    encoders = [
        encoder_entry(
            column.name,
            column.role,
            column.spec,
            fingerprint=column.fingerprint,
            source=column.source,
            head=column.head,
            cost=costs.get(column.name),
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
    total = seconds + sum(v for k, v in found.seconds.items() if k == "cost")
    lines = [
        results_table(results).rstrip(),
        *_failures(found),
        *_unreadable(found),
        *_where(found, settings, [*paths, *([page] if page else [])]),
        _times(found, total),
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


def _costs(found: Evaluation, settings: EvaluateSettings, device: str) -> dict[str, dict[str, Any]]:
    """Name → figures, each measured once a (weights, size, device) and kept beside the features."""
    sizes = {c.name: c.spec.image_size for c in found.columns}
    for data in found.data.values():
        if data.spec.size is not None:
            sizes = dict.fromkeys(sizes, (data.spec.size, data.spec.size))
            break
    costs = {}
    for column in found.columns:
        key = combined(
            encoder=column.fingerprint,
            size=sizes[column.name],
            device=device,
            threads=torch.get_num_threads(),
        )
        path = settings.cache.expanduser() / "costs" / f"{key[:32]}.json"
        try:
            costs[column.name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            costs[column.name] = _measure(column, sizes[column.name], device)
            write_text_atomically(path, json.dumps(costs[column.name]))
    return costs


def _measure(column: Column, size: Grid, device: str) -> dict[str, Any]:
    network = column.network.only(column.member)
    try:
        found = measure_cost(network, size, device=device).to_json()
    finally:
        network.cpu()
    folder = Path(column.source)
    if column.role == "student" and folder.is_dir():
        try:
            found["deployed"] = [cost.to_json() for cost in measure_deployed(folder, size)]
        except MissingExtraError as error:
            log.warning("%s", error)
    return found


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
    return f"{seconds:.1f} s in all ({parts}; {run})"
