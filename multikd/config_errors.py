"""One sentence out of jsonargparse's tree of what did not validate.

jsonargparse reports every branch of every union it tried, which is complete and hard to read. A
user needs the path of the key, what is wrong with it, and the nearest right name.
"""

from __future__ import annotations

import importlib
import inspect
import re

from multikd.errors import nearest

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNRECOGNISED = re.compile(r"unrecognized arguments: (.+)")


def condense(message: str, known: list[str] | None = None) -> str:
    """A readable sentence for a jsonargparse message; unknown forms pass unchanged.

    Args:
        message: what jsonargparse says.
        known: option names of the parser, to offer the nearest of.
    """
    known = known or []
    unrecognised = _UNRECOGNISED.search(message)
    if unrecognised:
        words = unrecognised.group(1).split()
        return (
            "; ".join(
                f"unknown option {word.split('=')[0]}{_offer(word.split('=')[0], known)}"
                for word in words
                if word.startswith("-")
            )
            or f"unexpected argument {unrecognised.group(1)!r}"
        )
    lines = [line for line in message.splitlines() if not _is_noise(line)]
    path: list[str] = []
    owner: str | None = None
    problems: list[str] = []
    for line in lines:
        key = _KEY.search(line)
        if key:
            path.extend(part for part in key.group(1).split(".") if part not in ("init_args",))
        found = _CLASS.search(line)
        if found:
            owner = found.group(1)
        text = _KEY.sub("", _CLASS.sub("", line)).strip(" -:")
        option = _OPTION.search(line)
        if option:
            problems.append(_no_setting(owner, option.group(1), known))
        elif text and "Does not validate" not in text and not text.startswith("Errors"):
            problems.append(_plain(text))
    where = ".".join(path)
    if not problems:
        return message
    # The deepest problem is the precise one; the others are the unions around it.
    unique = list(dict.fromkeys(problems))
    specific = [p for p in unique if not p.startswith("expected a ")] or unique
    return f"{where}: {'; or '.join(specific[:3])}" if where else "; or ".join(specific[:3])


def _is_noise(line: str) -> bool:
    text = line.strip()
    return (
        not text or text.startswith(("Given value", "Subtypes", "Errors:")) or "'NoneType'" in text
    )


def _plain(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", lambda m: m.group(1).rsplit(".", 1)[-1], text)
    text = re.sub(r"Expected an? ", "expected a ", text)
    return text.rstrip(".")


def _offer(name: str, choices: list[str]) -> str:
    close = nearest(name, choices, 2)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _no_setting(owner: str | None, option: str, known: list[str]) -> str:
    choices = _settings_of(owner) if owner else known
    name = option.split(".")[0]
    who = f"{owner.rsplit('.', 1)[-1]} has no setting" if owner else "there is no setting"
    offer = _offer(name, choices)
    listing = "" if offer or not choices else f" (it has {', '.join(choices)})"
    return f"{who} {name!r}{offer}{listing}"


def _settings_of(class_path: str) -> list[str]:
    """Names of the constructor's parameters; empty when the class can't be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(target.__init__).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [
        p.name
        for p in parameters
        if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
