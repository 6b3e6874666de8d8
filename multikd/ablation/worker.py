"""A process that works on the runs of a study until none is left: ``python -m …worker FOLDER``.

Several may work on one folder, on one machine or on many: each run is claimed by a lock, which the
system frees when its holder dies.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multikd.ablation.plan import Run
from multikd.ablation.state import StudyFolder
from multikd.files import write_text_atomically
from multikd.redaction import redact
from multikd.runs.process import stop_with_parent
from multikd.untrusted import read_json

log = logging.getLogger(__name__)

JOB = "job.json"


def write_job(out: Path, tasks: str, data: Sequence[str], hours: float | None) -> None:
    """What workers need to know besides the plan."""
    until = None if hours is None else time.time() + 3600 * hours
    content = {"tasks": tasks, "data": list(data), "until": until}
    write_text_atomically(out / JOB, json.dumps(content))


def work_on(out: Path, only: Sequence[str] | None = None) -> int:
    """Work on what is left of the plan; returns how many runs were done here.

    Args:
        out: folder of the study.
        only: names of runs; None for all.
    """
    study = StudyFolder(out)
    job = read_json(out / JOB)
    done = 0
    for run in study.plan():
        if (only is not None and run.name not in only) or study.settled(run):
            continue
        if job["until"] is not None and time.time() > job["until"]:
            break
        with study.claim(run) as mine:
            while mine and not study.settled(run):
                done += attempt(study, run, str(job["tasks"]), tuple(job["data"]))
    return done


def attempt(study: StudyFolder, run: Run, tasks: str, data: tuple[str, ...]) -> bool:
    """One attempt at a run; a failure is noted with its reason."""
    from multikd.ablation import work

    study.mark(run, True)
    try:
        result = work.do(run, study.out, tasks, data)
    except KeyboardInterrupt:
        study.mark(run, False)
        raise
    except Exception as error:  # whatever a run may raise costs that run alone
        reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))
        log.warning("run %s failed: %s", run.name, reason[:400])
        study.note_failure(run, reason[:2000])
        study.mark(run, False)
        return False
    study.write_result(run, result)
    study.mark(run, False)
    return True


def main(argv: Sequence[str]) -> int:
    """``FOLDER [--detached]``."""
    from multikd.console import messages_on_stderr, take_over_lightning

    if "--detached" not in argv:
        stop_with_parent()
    names = [a for a in argv if not a.startswith("--")]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of one's own, as for the command
    with messages_on_stderr():
        take_over_lightning()
        try:
            work_on(Path(names[0]), names[1:] or None)
        except KeyboardInterrupt:
            return 130
    return 0


def run_slurm_task(out: str, name: str) -> dict[str, Any]:
    """What a task of a SLURM array runs."""
    return {"done": work_on(Path(out), [name])}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
