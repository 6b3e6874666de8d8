"""A ``multikd fit`` in a process of its own: ``python -m multikd.runs.process FOLDER``.

Its memory is free when it ends, what it does to signals and seeds is its own, and ranks that
Lightning starts run this module again, not the command that asked for several runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from multikd.errors import EXIT_AGAIN, PreemptedError
from multikd.files import file_lock
from multikd.redaction import redact
from multikd.runs.folder import CONFIG

LOG = "fit.log"
_WATCH_SECONDS = 1.0
_PATIENCE_SECONDS = 60


def fit_in_process(folder: Path, packages: Sequence[str] = ()) -> None:
    """Train what ``FOLDER/config.yaml`` says, or go on with it; output goes to ``fit.log``.

    Signals come to this process alone (the run has a group of its own) and are passed on once:
    Ctrl-C, and those with which schedulers ask to stop, upon which the run saves first.

    Args:
        folder: of the run.
        packages: whose classes the config may name (``--allow_code``).

    Raises:
        PreemptedError: it was asked to stop, saved, and should be started again.
        ValueError: it failed; its last words are in the sentence.
        KeyboardInterrupt: it was interrupted, here or there.
    """
    path = folder / LOG
    command = [sys.executable, "-m", "multikd.runs.process", str(folder), *packages]
    with path.open("ab") as log, _passing_on() as stop:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        stop.child = child
        try:
            code = child.wait()
        except BaseException:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=_PATIENCE_SECONDS)
            except BaseException:  # too long, or Ctrl-C again
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    # Ended by the signal itself (it came before training took it over), or just done.
    if code == EXIT_AGAIN or (stop.asked and code <= 0):
        raise PreemptedError(
            f"{folder}: {_last_words(path) if code == EXIT_AGAIN else 'it was asked to stop'}; "
            "run the same command again to go on"
        )
    if code != 0:
        raise ValueError(f"{_last_words(path)} (code {code}; all of it is in {path})")


@dataclass
class _Stop:
    """What SIGTERM and SIGUSR1 did."""

    child: subprocess.Popen[bytes] | None = None
    asked: bool = False

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """To the child; this process does not end by it."""
        self.asked = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


@contextmanager
def _passing_on() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.pass_on) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(path: Path) -> str:
    """The sentence with which the command ended, or its last line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in deque(file, maxlen=50) if line.strip()]
    own = [line.removeprefix("multikd: ") for line in lines if line.startswith("multikd: ")]
    found = own or lines
    return found[-1][:400] if found else "the process said nothing"


def stop_with_parent() -> None:
    """End this process as soon as the one that started it has gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """``FOLDER [PACKAGE …]``."""
    from multikd.console import messages_on_stderr, take_over_lightning
    from multikd.fit import run_lightning
    from multikd.imports import allowing

    stop_with_parent()
    folder = Path(argv[0])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of one's own, as for the command
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with messages_on_stderr(), allowing(argv[1:]):
        take_over_lightning()
        try:
            # A predecessor whose parent was killed takes a moment to notice.
            with file_lock(folder / (f"fit{'' if first else os.environ['LOCAL_RANK']}.lock")):
                run_lightning(["fit", f"--config={folder / CONFIG}", "--resume", "auto"])
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            sys.stderr.write(f"multikd: {kind}{redact(' '.join(str(error).split()))}\n")
            return int(getattr(error, "exit_code", 1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
