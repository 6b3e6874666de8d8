"""Search files: typed YAML with the sizes, the score, and the budget on this device.

The rule: sizes are trained from the smallest up. After ``patience`` sizes in a row of which none
raised the best score so far by ``tolerance`` or more, the search ends. The answer is the smallest
size whose score is less than ``tolerance`` below the best. Sizes over the budget are not trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from multikd.config_errors import condense
from multikd.config_files import inline_fragments, parse_yaml, read_yaml
from multikd.errors import unknown_name
from multikd.shipped import find_search

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_PARTS = ("settings", "sizes")


@dataclass(frozen=True)
class Budget:
    """What a student may cost on this device; null: no bound.

    Attributes:
        latency_ms: median of a pass over ``batch`` images.
        memory_mb: weights, and what a pass over ``batch`` images holds at once, in 10⁶ bytes.
        parameters: of the encoder.
        batch: images in a pass.
        threads: of a CPU; null: torch's.
    """

    latency_ms: float | None = None
    memory_mb: float | None = None
    parameters: float | None = None
    batch: int = 1
    threads: int | None = 1

    def __post_init__(self) -> None:
        bounds = (self.latency_ms, self.memory_mb, self.parameters)
        if any(bound is not None and not bound > 0 for bound in bounds) or self.batch < 1:
            raise ValueError(f"the budget's numbers must be above 0, received {self}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"the budget's threads must be 1 or more, received {self.threads}")


@dataclass
class Search:
    """A search over sizes of a base config's student.

    Attributes:
        base: a config that ``multikd fit`` takes, by path or shipped name.
        tasks: task file of ``multikd evaluate``, by path or shipped name.
        score: the task that decides.
        tolerance: a gain below it is none; in the score's own unit (shares from 0 to 1).
        patience: the search ends after so many sizes in a row without a gain.
        budget: see ``Budget``.
        seeds: each size is trained with each; their mean decides.
        data: ``DATASET.SPLIT=SOURCE`` in place of what the task file says.
        settings: dotted keys and values of every run.
        sizes: name → dotted keys and values, such as ``{model.student.name: resnet18}``.
        path: where it was read from.
    """

    base: str
    tasks: str
    score: str
    tolerance: float = 0.005
    patience: int = 1
    budget: Budget = field(default_factory=Budget)
    seeds: list[int] = field(default_factory=lambda: [0])
    data: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path = Path()


def read_search(name: str, changes: Sequence[str] = ()) -> Search:
    """A search by path or shipped name.

    Args:
        name: of the file.
        changes: ``KEY=VALUE`` of ``settings``, from the command line.

    Raises:
        ValueError: not found, not readable, or a setting that does not fit, in one sentence.
    """
    path = find_search(name)
    content = read_yaml(path)
    known = [f.name for f in fields(Search) if f.name != "path"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no search: expected base, tasks, score and sizes")
    for key in content:
        if key not in known:
            raise unknown_name("setting", str(key), known, f"(of the search {path})")
    content = inline_fragments(content, path.parent)
    parts = {key: content.pop(key, None) or {} for key in _PARTS}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {key} must be a mapping, received {type(part).__name__}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--search", type=Search)
    try:
        search: Search = parser.instantiate(parser.parse_object({"search": content})).search
    except Exception as error:  # of jsonargparse, or of a dataclass
        raise ValueError(f"{path}: {condense(str(error))}") from error
    search.settings, search.path = parts["settings"], path
    search.sizes = {str(name): change for name, change in parts["sizes"].items()}  # 96 is a name
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, received {change!r}")
        search.settings[key] = parse_yaml(value, f"--set {key}")
    _check(search)
    return search


def _check(search: Search) -> None:
    where = f"of the search {search.path}"
    if len(search.sizes) < 2:
        raise ValueError(
            f"the sizes {where} must be two or more: {{NAME: {{model.student.name: resnet18}}}}"
        )
    for name, change in search.sizes.items():
        if not _NAME.fullmatch(str(name)):
            raise ValueError(
                f"{name!r} {where} becomes the name of a folder: use letters, digits, '_', '-', "
                "'+' and '.'"
            )
        if not isinstance(change, dict) or not change:
            raise ValueError(f"the size {name!r} {where} needs dotted keys and values")
    if not search.tolerance > 0 or search.patience < 1:
        raise ValueError(
            f"tolerance {where} must be above 0 and patience 1 or more, received "
            f"{search.tolerance} and {search.patience}"
        )
    if not search.seeds or len(set(search.seeds)) != len(search.seeds):
        raise ValueError(f"the seeds {where} must be different numbers: {search.seeds}")
