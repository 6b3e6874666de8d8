"""A study's folder: what was planned, who works on what, and what came out.

Every run has a folder with its config, a ``lock`` held by whoever works on it (the system frees it
when its holder dies), ``attempts.json`` and, once it is done, ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from multikd.ablation.plan import CONFIG, Planner, Run, plan_json
from multikd.files import file_lock, write_text_atomically
from multikd.untrusted import read_json

PLAN, RESULT, ATTEMPTS, RUNNING = "plan.json", "result.json", "attempts.json", "running"
MOST_ATTEMPTS = 2


class StudyFolder:
    """Files of a study.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def folder(self, run: Run) -> Path:
        """Of one run."""
        return self.out / "runs" / run.name

    # ------------------------------------------------------------------ plan

    def write_plan(self, planner: Planner, runs: Sequence[Run]) -> None:
        """Add runs to the plan, each with its config.

        Raises:
            ValueError: a run of that name was made with other settings.
        """
        known = self.plan()
        # What all of them share comes from the folder, not from here.
        for run in runs:
            path = self.folder(run) / CONFIG
            text = yaml.safe_dump(planner.config(run), sort_keys=False, allow_unicode=True)
            if path.exists():
                _refuse_other(path, text, self.out)
            else:
                write_text_atomically(path, text)
        names = {run.name for run in known}
        added = [run for run in runs if run.name not in names]
        if added or not (self.out / PLAN).exists():
            write_text_atomically(self.out / PLAN, plan_json([*known, *added]))

    def plan(self) -> list[Run]:
        """The runs so far; none before there is a plan."""
        try:
            return [Run.from_json(entry) for entry in read_json(self.out / PLAN)]
        except FileNotFoundError:
            return []
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.out / PLAN} is no plan of a study: remove it") from error

    # ------------------------------------------------------------------ work

    def result(self, run: Run) -> dict[str, Any] | None:
        """What came out of a run; None while it is not done (or its file is damaged)."""
        try:
            found = read_json(self.folder(run) / RESULT)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_result(self, run: Run, result: dict[str, Any]) -> None:
        """Note that a run is done."""
        write_text_atomically(self.folder(run) / RESULT, json.dumps(result, indent=1))

    def failures(self, run: Run) -> list[str]:
        """Why attempts at a run failed."""
        try:
            found = read_json(self.folder(run) / ATTEMPTS)
        except (FileNotFoundError, ValueError):
            return []
        return [str(reason) for reason in found] if isinstance(found, list) else []

    def note_failure(self, run: Run, reason: str) -> None:
        """One more failed attempt."""
        reasons = [*self.failures(run), reason]
        write_text_atomically(self.folder(run) / ATTEMPTS, json.dumps(reasons, indent=1))

    def mark(self, run: Run, running: bool) -> None:
        """Note that a run is at hand, or no longer: who dies in between is found out by it."""
        path = self.folder(run) / RUNNING
        path.touch() if running else path.unlink(missing_ok=True)

    def was_running(self, run: Run) -> bool:
        """Whether somebody began a run and did not end."""
        return (self.folder(run) / RUNNING).exists()

    def forget_failures(self, runs: Sequence[Run]) -> None:
        """Let runs that failed be tried again: the study was started anew."""
        for run in runs:
            if self.result(run) is None:
                (self.folder(run) / ATTEMPTS).unlink(missing_ok=True)

    def settled(self, run: Run) -> bool:
        """Whether nothing more is to be done about a run."""
        return self.result(run) is not None or len(self.failures(run)) >= MOST_ATTEMPTS

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Hold a run, if nobody else does and it is still to be done."""
        self.folder(run).mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(self.folder(run) / "lock", wait=False):
                yield not self.settled(run)
        except BlockingIOError:
            yield False


def _refuse_other(path: Path, text: str, out: Path) -> None:
    had, here = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
    if had == here:
        return
    key, before, now = _difference(had, here)
    raise ValueError(
        f"{out} holds a study whose run {path.parent.name!r} has {key} = {str(before)[:120]}, and "
        f"here it is {str(now)[:120]}: name another --out, or remove that run's folder"
    )


def _difference(had: Any, here: Any, key: str = "") -> tuple[str, Any, Any]:
    if isinstance(had, dict) and isinstance(here, dict):
        for name in [*had, *(n for n in here if n not in had)]:
            if had.get(name) != here.get(name):
                return _difference(had.get(name), here.get(name), f"{key}.{name}".lstrip("."))
    return key.replace(".init_args", ""), had, here
