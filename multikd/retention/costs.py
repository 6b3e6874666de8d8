"""What each encoder costs, measured once and kept beside the features."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multikd.errors import MissingExtraError
from multikd.evaluation.cost import measure_cost
from multikd.evaluation.deployed_cost import measure_deployed
from multikd.files import write_text_atomically
from multikd.retention.digest import combined
from multikd.retention.encoders import Column
from multikd.retention.run import Evaluation
from multikd.types import Grid

log = logging.getLogger(__name__)


def measure_costs(found: Evaluation, cache: Path, device: str, progress: bool) -> None:
    """Fill ``found.costs``: encoder → the entry ``cost`` of results.json.

    Each is measured once for its weights, image size, device and threads. One that can't be
    measured (too little memory, say) is left out with a warning.
    """
    begun = time.perf_counter()
    size = next((d.spec.size for d in found.data.values() if d.spec.size is not None), None)
    columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        shown = bar.add_task("cost", total=len(found.columns))
        for column in found.columns:
            bar.update(shown, description=f"cost of {column.name}")
            seen = column.spec.image_size if size is None else (size, size)
            try:
                found.costs[column.name] = _kept(column, seen, cache / "costs", device)
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:160]
                log.warning("the cost of %s is not measured: %s", column.name, reason)
            bar.advance(shown)
        bar.update(shown, description="cost measured")
    found.seconds["measuring cost"] = time.perf_counter() - begun


def _kept(column: Column, size: Grid, folder: Path, device: str) -> dict[str, Any]:
    key = combined(
        encoder=column.fingerprint,
        source=column.source,
        size=size,
        device=device,
        threads=torch.get_num_threads(),
    )
    path = folder / f"{key[:32]}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        measured = _measure(column, size, device)
        write_text_atomically(path, json.dumps(measured))
        return measured


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
