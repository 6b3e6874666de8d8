"""What a stage was built on: it belongs to those weights of the earlier stages and to no others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multikd.export.folder import sha256
from multikd.export.timm_folder import WEIGHTS
from multikd.files import write_text_atomically
from multikd.stages.chain import Chain, Stage
from multikd.stages.plan import EXPORT, stage_folders
from multikd.untrusted import read_json

BUILT_ON = "built_on.json"


def made(stage: Stage, export: Path) -> dict[str, Any]:
    """What a stage's result says of its export, for the stages that build on it."""
    return {"weights": sha256(export / WEIGHTS), "exported_as": asdict(stage.export)}


def note_inputs(stage: Stage, out: Path) -> None:
    """Note, before a stage is trained, what the earlier ones gave it; once."""
    path = stage_folders(out).folder(stage) / BUILT_ON
    if not path.exists():
        write_text_atomically(path, json.dumps(_inputs(stage, out), indent=1))


def check_stage(chain: Chain, stage: Stage, out: Path) -> None:
    """Refuse a stage that was begun or done with something else than what is there now.

    Raises:
        ValueError: an earlier stage gives other weights than it was built on, or its own export
            was made in another way.
    """
    folder = stage_folders(out).folder(stage)
    other = stale(stage, out)
    if other is not None:
        raise ValueError(
            f"the stage {stage.name!r} of {chain.path} was built on another {other!r} than the one "
            f"in {out}: remove {folder} to make it again, or put the former {other!r} back"
        )
    result = stage_folders(out).result(stage)
    had = None if result is None else result.get("exported_as")
    if had is not None and had != asdict(stage.export):
        raise ValueError(
            f"the stage {stage.name!r} of {chain.path} was exported with {had}, and its export is "
            f"to be {asdict(stage.export)}: remove {folder / 'result.json'} to export it again"
        )


def stale(stage: Stage, out: Path) -> str | None:
    """The earlier stage whose weights are no longer those that a stage was built on; None: none.

    An earlier stage that is not there counts, too.
    """
    try:
        had = read_json(stage_folders(out).folder(stage) / BUILT_ON)
    except (OSError, ValueError):
        return None  # not begun, or by a version that did not note it
    now = _inputs(stage, out)
    had = had if isinstance(had, dict) else {}
    return next((name for name in now if had.get(name) and had[name] != now[name]), None)


def _inputs(stage: Stage, out: Path) -> dict[str, str | None]:
    """Earlier stage → digest of the weights that it exported; None where there are none."""
    folders, found = stage_folders(out), dict[str, str | None]()
    for name in dict.fromkeys(name for name, _ in stage.references()):
        earlier = Stage(name, "")
        there = (folders.folder(earlier) / EXPORT / WEIGHTS).is_file()
        result = folders.result(earlier) if there else None
        found[name] = None if result is None else result.get("weights")
    return found
