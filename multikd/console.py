"""What a command says on stderr: our messages and Lightning's, each of them once."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from multikd.redaction import redact

# Lightning's messages that tell a user of this package nothing. Everything else is shown.
_NOISE = re.compile(
    r"[Tt]ip: For seamless"  # advertises litlogger and litmodels
    r"|(GPU|TPU|HPU) available: False"
    r"|Seed set to"  # the config says it, too
    r"|Loading `train_dataloader` to estimate number of stepping batches"
    r"|Restoring states from"  # it says again when that is done
    r"|Detected KeyboardInterrupt"  # the command's own last line says it, and how to go on
)
_QUIET = ("httpx", "urllib3", "matplotlib", "PIL", "fsspec")
_LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time, so that a redirected one is respected."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("lightning") and _NOISE.search(record.getMessage()):
            return False
        return bool(super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        text = redact(record.getMessage().strip("\n"))
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Inside, log records of this package and of Lightning are lines on stderr."""
    root, own = logging.getLogger(), logging.getLogger("multikd")
    handler, level, formatting = _Stderr(), own.level, warnings.formatwarning
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        warnings.formatwarning = formatting
        own.setLevel(level)
        root.removeHandler(handler)


def take_over_lightning() -> None:
    """Let Lightning's records come through our handler alone; call it after Lightning's import.

    It puts a handler of its own on ``lightning`` and, with none on the root, on two below, and has
    Python's warnings begin with the path of the line that gave them.
    """
    warnings.formatwarning = _plain_warning
    for name in _LIGHTNING:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _plain_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"warning: {redact(' '.join(str(message).split()))}\n"
