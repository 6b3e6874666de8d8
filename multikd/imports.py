"""Which modules a file from elsewhere may name: to import a module is to run its code.

The working directory is searched for classes of one's own, so that a folder from a stranger, with a
config and a ``.py`` beside it, could otherwise bring its own code along.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

KNOWN = frozenset(
    ("multikd", "torch", "torchvision", "lightning", "torchmetrics", "timm", "open_clip")
)
"""Packages that any config may name."""

# Installed beside everything, and there to run or fetch code.
_INSTALLERS = frozenset(("jsonargparse", "pip", "setuptools", "pkg_resources", "distutils"))

_allowed: ContextVar[frozenset[str]] = ContextVar("multikd_allowed_code", default=frozenset())
_judged: ContextVar[bool] = ContextVar("multikd_imports_judged", default=False)


class ImportRefusedError(ValueError):
    """A config names a module that nobody has allowed; nothing of it has run."""


@contextmanager
def allowing(packages: Iterable[str]) -> Iterator[None]:
    """Inside, files may name these packages, too: the user has.

    Raises:
        ValueError: one is no package's name, or of Python's standard library.
    """
    added = frozenset(packages)
    for name in added:
        if not name.isidentifier() or name in sys.stdlib_module_names or name in _INSTALLERS:
            raise ValueError(
                f"--allow_code takes the name of a package or module of your own, received {name!r}"
            )
    token = _allowed.set(_allowed.get() | added)
    try:
        yield
    finally:
        _allowed.reset(token)


def allowed_by_user() -> frozenset[str]:
    """Packages of ``--allow_code`` alone, to be handed to a process that is started."""
    return _allowed.get()


def allowed() -> frozenset[str]:
    """Packages that a file may name: the known ones, those allowed, and what is imported already,
    of which nothing runs by being named."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    return (KNOWN | _allowed.get() | loaded) - sys.stdlib_module_names - _INSTALLERS


@contextmanager
def only_allowed() -> Iterator[None]:
    """Inside, values that are parsed may name no other modules (by jsonargparse's own means).

    Raises:
        ImportRefusedError: one does.
    """
    from jsonargparse import _common, set_parsing_settings

    # It has no way to take settings back.
    before = dict(_common.parsing_settings)
    names = sorted(name for name in allowed() if name.isidentifier())
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=names)
    token = _judged.set(True)
    try:
        yield
    except Exception as error:
        if path := denied(str(error)):
            raise ImportRefusedError(refusal(path)) from error
        raise
    finally:
        _judged.reset(token)
        _common.parsing_settings.update(before)


def denied(message: str) -> str | None:
    """The import path that jsonargparse says it did not import."""
    found = re.search(r"Importing '([\w.]+)' is not allowed, denied by", message)
    return found.group(1) if found else None


def check_import(path: str) -> None:
    """Refuse an import path that a file gives; what code gives is not judged.

    Raises:
        ImportRefusedError: see ``refusal``.
    """
    if _judged.get() and path.partition(".")[0] not in allowed():
        raise ImportRefusedError(refusal(path))


def _exists(root: str) -> bool:
    """Whether there is such a module; looked for, not imported."""
    try:
        return find_spec(root) is not None
    except (ImportError, ValueError):
        return False


def refusal(path: str) -> str:
    """Why a module is not imported, and what to do."""
    root = path.partition(".")[0]
    if root in sys.stdlib_module_names:
        return (
            f"{path} is of Python's standard library, which no config may name: give a class or "
            "function of multikd, torch or Lightning, or your own"
        )
    if not _exists(root):
        return f"{path} can't be imported: there is no module {root!r}"
    return (
        f"{path} is not imported, since a config that names a module runs its code: if you wrote "
        f"or trust it, add --allow_code={root} to the command"
    )
