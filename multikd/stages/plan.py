"""From a chain to configs: what each stage's ``fit`` is given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multikd.config_files import load_config
from multikd.runs.folder import CHECKPOINTS, LAST, RunsFolder
from multikd.runs.overrides import get, put
from multikd.runs.trainer import own_folder
from multikd.stages.chain import PLACEHOLDER, Chain, Stage, filled

EXPORT = "export"
Places = Mapping[tuple[str, str], str]


def stage_folders(out: Path) -> RunsFolder:
    """The chain's folder: each stage has one in it."""
    return RunsFolder(out, inside="", what="chain", part="stage")


def places_in(chain: Chain, root: Path) -> dict[tuple[str, str], str]:
    """(stage, kind) → where that stage leaves it below ``root``."""
    found: dict[tuple[str, str], str] = {}
    for stage in chain.stages:
        found[stage.name, "export"] = str(root / stage.name / EXPORT)
        found[stage.name, "checkpoint"] = str(root / stage.name / CHECKPOINTS / LAST)
    return found


def stage_config(chain: Chain, stage: Stage, out: Path, places: Places | None = None) -> Any:
    """The whole config of a stage, for ``multikd fit --config``.

    Args:
        chain: all of them.
        stage: the one.
        out: folder of the chain.
        places: what placeholders stand for; None: what the stages leave in ``out``.

    Raises:
        ValueError: a base that is not found, or a dotted key that leads nowhere.
    """
    try:
        config = copy.deepcopy(load_config(stage.base))
        known = places_in(chain, out) if places is None else dict(places)
        for key, value in stage.settings.items():
            put(config, key, copy.deepcopy(filled(value, known, str(out))))
    except ValueError as error:
        raise ValueError(f"the stage {stage.name!r} of {chain.path}: {error}") from error
    own_folder(config, stage_folders(out).folder(stage), save_every=chain.save_every)
    return config


def starts_from(chain: Chain, stage: Stage) -> str | None:
    """The stage whose student this one's begins with; None where it begins otherwise."""
    config: dict[str, Any] = copy.deepcopy(load_config(stage.base))
    for key, value in stage.settings.items():
        put(config, key, copy.deepcopy(value))
    checkpoint = get(config, "model.student.checkpoint")
    found = PLACEHOLDER.search(checkpoint) if isinstance(checkpoint, str) else None
    return None if found is None else found[1]
