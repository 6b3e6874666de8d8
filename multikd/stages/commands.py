"""What ``multikd stages`` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from multikd.config_files import parse_yaml
from multikd.files import file_lock
from multikd.retention.taskfile import read_task_file
from multikd.runs.folder import check_place
from multikd.runs.tables import text_table
from multikd.stages.chain import KINDS, LOCK, Chain, read_chain
from multikd.stages.check import StageShape, check_chain
from multikd.stages.inputs import check_stage, stale
from multikd.stages.plan import places_in, stage_config, stage_folders
from multikd.stages.run import do_stage


@dataclass(frozen=True)
class StagesSettings:
    """What the command line asks for; see ``multikd stages --help``."""

    out: Path
    changes: tuple[str, ...] = ()
    dry_run: bool = False
    progress: bool = True


def run_stages(name: str, settings: StagesSettings) -> tuple[str, dict[str, Any]]:
    """Check a chain and run what is left of it; returns (table, figures).

    Raises:
        ValueError: a mistake in the chain or the command, before any work; or a stage that failed.
        KeyboardInterrupt: what is done stays; the same command goes on.
    """
    chain = read_chain(name, split_changes(settings.changes))
    out = Path(os.path.abspath(settings.out))  # however it is spelt: configs hold it
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if chain.tasks is not None:
        read_task_file(chain.tasks, tuple(chain.data))
    shapes = check_chain(chain, out, data=not settings.dry_run)
    folders = stage_folders(out)
    if settings.dry_run:
        return _told(chain, shapes, out, dry=True)
    check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, disable=not settings.progress, console=Console(stderr=True)) as bar:
        try:
            with file_lock(out / LOCK, wait=False):
                for number, stage in enumerate(chain.stages, 1):
                    check_stage(chain, stage, out)
                    if folders.result(stage) is not None:
                        # Refuses where it was made with other settings than these.
                        folders.put_config(stage, stage_config(chain, stage, out))
                        continue
                    before = f"{number}/{len(chain.stages)} {stage.name}"
                    task = bar.add_task(before, total=None)

                    def tell(what: str, before: str = before, task: Any = task) -> None:
                        bar.update(task, description=f"{before}: {what}")

                    try:
                        result = do_stage(chain, stage, out, tell)
                    except ValueError as error:
                        raise ValueError(
                            f"the stage {stage.name!r} failed: {error}; the same command tries it "
                            "again"
                        ) from error
                    folders.write_result(stage, result)
                    bar.update(task, description=f"{before}: done", total=1, completed=1)
        except BlockingIOError:
            raise ValueError(
                f"another `multikd stages` is working in {out}: wait for it, or name another --out"
            ) from None
    return _told(chain, shapes, out)


def _told(
    chain: Chain, shapes: dict[str, StageShape], out: Path, dry: bool = False
) -> tuple[str, dict[str, Any]]:
    """The table of all stages and what ``--json`` writes."""
    folders, places = stage_folders(out), places_in(chain, out)
    entries, rows = [], []
    for stage in chain.stages:
        result, shape = folders.result(stage), shapes[stage.name]
        if result is not None:  # the folder may have been moved since
            result |= {kind: places[stage.name, kind] for kind in KINDS}
        former = stale(stage, out)
        known = {k: v for k, v in shape.to_json().items() if result is None or k != "parameters"}
        entries.append(
            {"stage": stage.name, "base": stage.base, **known, "done": result is not None}
            | {"built_on_another": former}
            | (result or {})
        )
        seconds = "to do" if result is None else f"{result['seconds_training']:.0f}"
        length = f"{shape.epochs} epochs" if shape.epochs else f"{shape.steps or '?'} steps"
        scores = {} if result is None else result["scores"]
        rows.append(
            {
                "stage": stage.name,
                "builds on": ", ".join(shape.needs) or "–",
                "teachers": ", ".join(shape.teachers),
                "student": f"{shape.student} ({shape.parameters / 1e6:.2f} M)",
                "length": length,
                "seconds": seconds if former is None else f"built on another {former}",
                **{f"{task}": _shown(entry) for task, entry in scores.items()},
            }
        )
    text = text_table(rows, f"stages of {chain.path.stem}")
    if dry:
        return f"{text}\nnothing was written", {"stages": entries}
    last = entries[-1]
    return f"{text}\nthe last student: {last['export']}", {"stages": entries}


def _shown(entry: dict[str, Any]) -> str:
    value = float(entry["value"])
    return f"{100 * value:.1f} %" if entry["unit"] == "%" else f"{value:.3f}"


def split_changes(changes: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` or ``STAGE:KEY=VALUE``, values as YAML.

    Raises:
        ValueError: not of that form.
    """
    found: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE or STAGE:KEY=VALUE, received {change!r}")
        found[key] = parse_yaml(value, f"--set {key}")
    return found
