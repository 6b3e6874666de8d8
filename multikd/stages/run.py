"""Doing one stage: an ordinary ``fit``, then an export, then scores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multikd.export.commands import ExportSettings, run_export
from multikd.export.timm_folder import TimmOptions
from multikd.imports import allowed_by_user
from multikd.runs.folder import CHECKPOINTS, LAST
from multikd.runs.overrides import get
from multikd.runs.process import fit_in_process
from multikd.runs.scoring import score
from multikd.stages.chain import Chain, Stage
from multikd.stages.inputs import made, note_inputs
from multikd.stages.plan import EXPORT, stage_config, stage_folders

Told = Callable[[str], None]


def do_stage(chain: Chain, stage: Stage, out: Path, tell: Told) -> dict[str, Any]:
    """Train, export and score a stage, or go on where an earlier attempt was stopped.

    Args:
        chain: all of them.
        stage: the one; those that it builds on are done.
        out: folder of the chain.
        tell: is given what is done at the moment.

    Returns:
        What its ``result.json`` holds.

    Raises:
        ValueError and others: it failed.
    """
    folders = stage_folders(out)
    folder = folders.folder(stage)
    config = stage_config(chain, stage, out)
    folders.put_config(stage, config)
    note_inputs(stage, out)
    begun = time.perf_counter()
    tell(f"training ({folder}/fit.log)")
    fit_in_process(folder, sorted(allowed_by_user()))
    trained = time.perf_counter()
    checkpoint = folder / CHECKPOINTS / LAST
    tell("exporting")
    keep = stage.export.classifier
    classes = int(get(config, "model.student.num_classes") or 0)
    settings = ExportSettings(
        heads=tuple(stage.export.heads),
        weights=stage.export.weights,
        timm=TimmOptions(classifier=bool(classes) if keep is None else keep),
        cost=False,
        overwrite=True,  # of an attempt that ended before its result was written
    )
    figures = run_export(checkpoint, folder / EXPORT, settings)[1]
    scores: dict[str, Any] = {}
    if chain.tasks is not None:
        tell("scoring")
        place = folder / "evaluation"
        scores = score(f"student={checkpoint}", chain.tasks, tuple(chain.data), place, False)
        scores = scores["student"]
        shutil.rmtree(place, ignore_errors=True)  # of this student alone, and scored now
    return {
        "export": str(folder / EXPORT),
        "checkpoint": str(checkpoint),
        "parameters": figures.get("parameters"),
        "seconds_training": trained - begun,
        "seconds": time.perf_counter() - begun,
        "scores": scores,
        **made(stage, folder / EXPORT),
    }
