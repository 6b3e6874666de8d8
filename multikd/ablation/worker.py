"""A process that works on the runs of a study until none is left: ``python -m …worker FOLDER``.

Several may work on one folder, on one machine or on many: each run is claimed by a lock, which the
system frees when its holder dies.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multikd.ablation.plan import Run
from multikd.ablation.state import StudyFolder
from multikd.files import disk_is_full, write_text_atomically
from multikd.redaction import redact
from multikd.runs.process import stop_with_parent
from multikd.untrusted import read_json

log = logging.getLogger(__name__)

JOB = "job.json"
FULL_DISK = 74  # EX_IOERR: what a worker ends with where there is no room left


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


class DiskFullError(OSError):
    """There is no room left for the runs of a study: trying the next one would not help."""

    exit_code = 1


def attempt(study: StudyFolder, run: Run, tasks: str, data: tuple[str, ...]) -> bool:
    """One attempt at a run; a failure is noted with its reason.

    Raises:
        DiskFullError: there is no room left; nothing is noted against the run.
    """
    from multikd.ablation import work

    study.mark(run, True)
    try:
        study.write_result(run, work.do(run, study.out, tasks, data))
    except KeyboardInterrupt:
        study.mark(run, False)
        raise
    except Exception as error:  # whatever a run may raise costs that run alone
        if disk_is_full(error):
            study.mark(run, False)
            raise DiskFullError(disk_full(study.out, run.name)) from error
        reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))
        log.warning("run %s failed: %s", run.name, reason[:400])
        study.note_failure(run, reason[:2000])
        study.mark(run, False)
        return False
    study.mark(run, False)
    return True


def disk_full(out: Path, name: str = "") -> str:
    """What a study says when there is no room left."""
    free = shutil.disk_usage(out).free / 1e6
    at = f" (at {name})" if name else ""
    return (
        f"the disk of {out} is full{at}, {free:.1f} MB are left: what is finished is kept; make "
        "room and give the same command again"
    )


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
        except DiskFullError as error:
            log.error("%s", error)
            return FULL_DISK
    return 0


def run_slurm_task(out: str, name: str) -> dict[str, Any]:
    """What a task of a SLURM array runs."""
    return {"done": work_on(Path(out), [name])}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
