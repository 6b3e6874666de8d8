"""Licences of what went into a student, in the order of how much they forbid."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNKNOWN = "unknown"

# (rank, what it forbids most, pattern). The first that matches counts; a higher rank binds more.
_KINDS: tuple[tuple[int, str, str], ...] = (
    (90, "no licence is known: nothing is permitted until its owner says so", r"^(unknown|none|)$"),
    (80, "no commercial use, no derivatives", r"nc-nd"),
    (70, "no commercial use, share alike", r"nc-sa"),
    (60, "no commercial use", r"(-|\b)nc(-|\b)|non-?commercial|research"),
    (45, "no derivatives", r"\bnd\b|-nd-"),
    (40, "share alike", r"\bsa\b|-sa-|gpl|odbl|mpl"),
    (20, "attribution", r"cc-by|apache|\bmit\b|^bsd|isc|openrail"),
    (0, "nothing", r"cc0|public-?domain|unlicense|pddl"),
)
# Anything else (a vendor's own licence) may forbid what we cannot tell.
_OTHER = (50, "a licence of its own: read it")
# Those that a model hub's `license:` field takes as they are.
_HUB = re.compile(
    r"^(apache-2\.0|mit|bsd-[23]-clause(-clear)?|isc|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|"
    r"[al]?gpl-[23]\.0|mpl-2\.0|openrail|unlicense|pddl|odbl)$"
)


def normal(licence: str) -> str:
    """One spelling: ``Apache 2.0`` and ``apache-2.0`` are ``apache-2.0``."""
    text = re.sub(r"[\s_]+", "-", licence.strip().lower()).removeprefix("the-")
    text = text.removesuffix("-license").removesuffix("-licence")
    return {"apache-2": "apache-2.0", "apache": "apache-2.0", "": UNKNOWN}.get(text, text)


def _kind(licence: str) -> tuple[int, str]:
    name = normal(licence)
    for rank, meaning, pattern in _KINDS:
        if re.search(pattern, name):
            return rank, meaning
    return _OTHER


def forbids(licence: str) -> str:
    """What this licence asks or forbids most, in a few words."""
    return _kind(licence)[1]


def most_restrictive(licences: Iterable[str]) -> str:
    """The one that binds most; ``unknown`` binds more than any, and is what none at all gives."""
    found = sorted(licences, key=lambda licence: -_kind(licence)[0])
    return normal(found[0]) if found else UNKNOWN


def hub_fields(licence: str) -> dict[str, str]:
    """``license`` (and ``license_name``) of a hub's metadata."""
    name = normal(licence)
    return {"license": name} if _HUB.match(name) else {"license": "other", "license_name": name}
