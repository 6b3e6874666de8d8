"""Sentences for users' mistakes: what was expected, what was received, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_AGAIN = 75
"""Exit code of a run that should be started again: ``EX_TEMPFAIL`` of sysexits.h."""


class PreemptedError(RuntimeError):
    """The run was asked to stop, saved, and should be started again."""

    exit_code = EXIT_AGAIN


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the pip command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            f"run  pip install 'multikd[{extra}]'"
        )


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` choices most like ``name`` (none when nothing is near)."""
    return difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5)


def unknown_name(kind: str, name: str, choices: Iterable[str], hint: str = "") -> ValueError:
    """A ValueError that offers the nearest known names."""
    choices = list(choices)
    close = nearest(name, choices)
    if close:
        offer = f"did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(choices) <= 12:
        offer = f"known: {', '.join(sorted(choices)) or 'none'}"
    else:
        offer = f"{len(choices)} names are known, none is near"
    return ValueError(f"unknown {kind} {name!r}: {offer}{' ' + hint if hint else ''}")
