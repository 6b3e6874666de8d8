"""Dotted keys of a config: ``model.dropper.p`` inside ``class_path`` and ``init_args``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, as the command line does: ``init_args`` need not be written.

    A number in a key is a place in a list.

    Raises:
        ValueError: the key leads through something that has no settings.
    """
    parts = key.split(".")
    if not all(parts):
        raise ValueError(f"{key!r} is no dotted key, such as model.dropper")
    node: Any = config
    for place, part in enumerate(parts):
        node = _inside(node, part)
        last = place == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{key!r}: {part!r} is no place in a list of {len(node)}")
            at: Any = int(part)
        elif isinstance(node, dict):
            at = part
        else:
            raise ValueError(f"{key!r} leads through {node!r}, which has no settings")
        if last:
            node[at] = value
            return
        if isinstance(node, dict) and node.get(at) is None:
            node[at] = {}
        elif isinstance(node[at], str) and "." in node[at]:
            node[at] = {"class_path": node[at], "init_args": {}}
        node = node[at]


def get(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is not set."""
    node: Any = config
    for part in key.split("."):
        node = _inside(node, part, make=False)
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.get(part)
        else:
            return None
    return node


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with every string in them, but for keys, changed."""
    if isinstance(value, dict):
        return {key: with_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [with_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _inside(node: Any, part: str, make: bool = True) -> Any:
    """A node, or its ``init_args`` where it is an object and ``part`` one of its settings."""
    if isinstance(node, dict) and "class_path" in node and part not in ("class_path", "init_args"):
        if make:
            return node.setdefault("init_args", {})
        return node.get("init_args") or {}
    return node
