"""A folder of runs: who works on which, and what came out of each.

Every run has a folder with its config, a ``lock`` held by whoever works on it (the system frees it
when its holder dies), ``attempts.json`` and, once it is done, ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from multikd.files import file_lock, write_text_atomically
from multikd.runs.overrides import with_strings
from multikd.untrusted import read_json

CONFIG, CHECKPOINTS, LAST = "config.yaml", "checkpoints", "last.ckpt"
RESULT, ATTEMPTS, RUNNING = "result.json", "attempts.json", "running"
MOST_ATTEMPTS = 2


class Named(Protocol):
    """Anything that is done in a folder of its own."""

    @property
    def name(self) -> str:
        """Of the folder."""
        ...


class RunsFolder:
    """Files of several runs.

    Args:
        out: the folder.
        inside: sub-folder in which the runs have theirs; "" for none.
        what: what it is a folder of, for messages (``study``).
        part: what one of its runs is called there (``run``).
    """

    def __init__(self, out: Path, inside: str = "runs", what: str = "study", part: str = "run"):
        self.out = out
        self.inside, self.what, self.part = inside, what, part

    def folder(self, run: Named) -> Path:
        """Of one run."""
        return self.out / self.inside / run.name

    def put_config(self, run: Named, config: dict[str, Any]) -> Path:
        """Write a run's config, unless it is there.

        Another spelling of the folder, or another place that it was moved to, is no other setting.

        Returns:
            Its file.

        Raises:
            ValueError: a run of that name was made with other settings.
        """
        path = self.folder(run) / CONFIG
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        if not path.exists():
            write_text_atomically(path, text)
            return path
        had, here = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
        before = self._spelling(run, had) if had != here else None
        if before is not None and respelled(had, before, str(self.out)) == here:
            if os.path.realpath(before) != os.path.realpath(self.out):
                write_text_atomically(path, text)
            return path  # as it is spelt there: what was begun goes on with the same settings
        if had != here:
            key, before, now = difference(had, here)
            raise ValueError(
                f"{self.out} holds a {self.what} whose {self.part} {run.name!r} has {key} = "
                f"{str(before)[:120]}, and here it is {str(now)[:120]}: name another --out, or "
                f"remove that {self.part}'s folder"
            )
        return path

    def _spelling(self, run: Named, config: Any) -> str | None:
        """How a run's config spells this folder."""
        trainer = config.get("trainer") if isinstance(config, dict) else None
        root = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        inside = str(Path(self.inside, run.name))
        if not isinstance(root, str) or not root.endswith(f"/{inside}"):
            return None
        return root.removesuffix(f"/{inside}")

    def result(self, run: Named) -> dict[str, Any] | None:
        """What came out of a run; None while it is not done (or its file is damaged)."""
        try:
            found = read_json(self.folder(run) / RESULT)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_result(self, run: Named, result: dict[str, Any]) -> None:
        """Note that a run is done."""
        write_text_atomically(self.folder(run) / RESULT, json.dumps(result, indent=1))

    def failures(self, run: Named) -> list[str]:
        """Why attempts at a run failed."""
        try:
            found = read_json(self.folder(run) / ATTEMPTS)
        except (FileNotFoundError, ValueError):
            return []
        return [str(reason) for reason in found] if isinstance(found, list) else []

    def note_failure(self, run: Named, reason: str) -> None:
        """One more failed attempt."""
        reasons = [*self.failures(run), reason]
        write_text_atomically(self.folder(run) / ATTEMPTS, json.dumps(reasons, indent=1))

    def mark(self, run: Named, running: bool) -> None:
        """Note that a run is at hand, or no longer: who dies in between is found out by it."""
        path = self.folder(run) / RUNNING
        path.touch() if running else path.unlink(missing_ok=True)

    def was_running(self, run: Named) -> bool:
        """Whether somebody began a run and did not end."""
        return (self.folder(run) / RUNNING).exists()

    def forget_failures(self, runs: Sequence[Named]) -> None:
        """Let runs that failed be tried again: the command was started anew."""
        for run in runs:
            if self.result(run) is None:
                (self.folder(run) / ATTEMPTS).unlink(missing_ok=True)

    def settled(self, run: Named) -> bool:
        """Whether nothing more is to be done about a run."""
        return self.result(run) is not None or len(self.failures(run)) >= MOST_ATTEMPTS

    @contextlib.contextmanager
    def claim(self, run: Named) -> Iterator[bool]:
        """Hold a run, if nobody else does and it is still to be done."""
        self.folder(run).mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(self.folder(run) / "lock", wait=False):
                yield not self.settled(run)
        except BlockingIOError:
            yield False


def check_place(out: Path) -> None:
    """Refuse a folder that can't be made or written to.

    Raises:
        ValueError: it can't.
    """
    place = out
    while not place.exists():
        place = place.absolute().parent
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out {out} can't be written to: name another folder")


def difference(had: Any, here: Any, key: str = "") -> tuple[str, Any, Any]:
    """The first setting in which two configs differ: its dotted key and both values."""
    if isinstance(had, dict) and isinstance(here, dict):
        for name in [*had, *(n for n in here if n not in had)]:
            if had.get(name) != here.get(name):
                return difference(had.get(name), here.get(name), f"{key}.{name}".lstrip("."))
    return key.replace(".init_args", ""), had, here


def respelled(value: Any, before: str, now: str) -> Any:
    """A config with another path in place of one, wherever strings hold it as a whole."""
    place = re.compile(rf"(?<![\w./-]){re.escape(before)}(?=/|$)")
    return with_strings(value, lambda text: place.sub(lambda _: now, text))
