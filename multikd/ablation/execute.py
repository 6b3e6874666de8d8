"""Who works on the runs: processes of this machine, or a SLURM array through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from multikd.ablation.plan import Run
from multikd.ablation.state import StudyFolder
from multikd.ablation.worker import FULL_DISK, DiskFullError, disk_full, run_slurm_task
from multikd.data.workers import usable_cores
from multikd.errors import MissingExtraError

_POLL_SECONDS = 0.5
Progress = Callable[[], None]


class Processes:
    """Worker processes on this machine.

    Args:
        study: the folder.
        count: how many at once.
        threads: of torch in each; None: the cores, divided.
    """

    def __init__(self, study: StudyFolder, count: int = 1, threads: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"--processes must be 1 or more, received {count}")
        self.study = study
        self.count = count
        self.threads = threads or max(1, usable_cores() // count)

    def __call__(self, runs: Sequence[Run], progress: Progress) -> None:
        """Have the runs done; returns when each is done, has failed twice, or time is over."""
        workers = [self._start(runs, seat) for seat in range(min(self.count, len(runs)))]
        try:
            while workers:
                time.sleep(_POLL_SECONDS)
                progress()
                for worker in [w for w in workers if w.poll() is not None]:
                    workers.remove(worker)
                    if worker.returncode == 0 or all(self.study.settled(r) for r in runs):
                        continue
                    if worker.returncode == 130:
                        raise KeyboardInterrupt
                    if worker.returncode == FULL_DISK:
                        raise DiskFullError(disk_full(self.study.out))
                    if not self._blame(runs, worker.returncode):
                        raise ValueError(
                            f"a worker process ended with code {worker.returncode} before it "
                            f"began a run: see {self.study.out}/worker-*.log"
                        )
                    workers.append(self._start(runs, len(workers)))
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGINT)
            for worker in workers:
                try:
                    worker.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    worker.kill()
        progress()

    def _start(self, runs: Sequence[Run], seat: int) -> subprocess.Popen[bytes]:
        log = (self.study.out / f"worker-{seat}.log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "multikd.ablation.worker", str(self.study.out)]
        command += [run.name for run in runs]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _blame(self, runs: Sequence[Run], code: int) -> bool:
        """A worker died by itself (memory, a crash): of the run that it held, an attempt."""
        found = False
        for run in runs:
            with self.study.claim(run) as free:
                if free and self.study.was_running(run):
                    self.study.mark(run, False)
                    reason = f"the process that worked on it ended with code {code}"
                    self.study.note_failure(run, reason)
                    found = True
        return found


class Slurm:
    """A SLURM array through submitit, one task a run.

    Args:
        study: the folder, on a file system that all machines see.
        settings: of submitit's ``update_parameters`` (``slurm_partition``, ``timeout_min``, …).
        cluster: ``slurm``, or ``local`` and ``debug`` to try it here.

    Raises:
        MissingExtraError: submitit is not installed.
        ValueError: there is no SLURM here, or a setting that submitit does not know.
    """

    def __init__(
        self, study: StudyFolder, settings: dict[str, Any], cluster: str = "slurm"
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise MissingExtraError("submitit", "slurm", "a study on SLURM") from error
        self.study = study
        folder = study.out.resolve() / "slurm"
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self.executor.update_parameters(**settings)
        except (RuntimeError, TypeError, NameError, KeyError, ValueError) as error:
            raise ValueError(
                f"submitit can't submit here: {' '.join(str(error).split())}; check --slurm "
                "(KEY=VALUE of submitit, such as slurm_partition=gpu), or use --processes"
            ) from error

    def __call__(self, runs: Sequence[Run], progress: Progress) -> None:
        """Submit those that are left, and wait."""
        left = [run for run in runs if not self.study.settled(run)]
        if not left:
            return
        out = str(self.study.out.resolve())
        jobs = self.executor.map_array(run_slurm_task, [out] * len(left), [r.name for r in left])
        waiting = dict(zip(jobs, left, strict=True))
        while waiting:
            for job in [job for job in waiting if job.done()]:
                run = waiting.pop(job)
                if not self.study.settled(run):
                    error = job.exception()
                    if error is not None:
                        reason = " ".join(str(error).split())[-400:]
                        self.study.note_failure(run, f"its SLURM task failed: {reason}")
            progress()
            time.sleep(_POLL_SECONDS)


def parse_slurm(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of submitit; numbers are numbers.

    Raises:
        ValueError: not of that form.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"--slurm takes KEY=VALUE of submitit, received {setting!r}")
        found[key] = int(value) if value.isdigit() else value
    return found
