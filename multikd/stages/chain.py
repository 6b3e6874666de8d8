"""Chain files: typed YAML with one entry a stage.

::

    tasks: demo-quick              # optional: score every stage's student
    base: demo                     # config of every stage that names none
    settings: {trainer.max_epochs: 2}
    stages:
      assistant:
        settings: {model.student.name: resnet18}
      small:
        settings:
          model.student.name: resnet10t
          model.teachers: {assistant: {class_path: multikd.teachers.Teacher,
                                       init_args: {encoder: "exported:{stage:assistant}"}}}

``{stage:NAME}`` is the exported folder of a stage, ``{stage:NAME:checkpoint}`` its last training
checkpoint, ``{out}`` the folder of the chain. They may stand anywhere in a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from multikd.config_errors import condense
from multikd.config_files import inline_fragments, read_yaml
from multikd.errors import unknown_name
from multikd.runs.overrides import with_strings
from multikd.shipped import find_chain

PLACEHOLDER = re.compile(r"\{stage:([^{}:]*)(?::([^{}]*))?\}")
KINDS = ("export", "checkpoint")
OUT = "{out}"
LOCK = "lock"  # the file in the chain's folder that whoever works on it holds
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_STAGE = ("base", "settings", "export")


@dataclass(frozen=True)
class ExportAs:
    """How a stage's student leaves it; see ``multikd export``.

    Attributes:
        classifier: keep the trained classifier; null: where the student has one.
        heads: teachers whose heads are kept beside it.
        weights: the moving average (``ema``), the last (``raw``), or the average where it is kept.
    """

    classifier: bool | None = None
    heads: list[str] = field(default_factory=list)
    weights: Literal["auto", "ema", "raw"] = "auto"


@dataclass
class Stage:
    """One run of a chain.

    Attributes:
        name: also of its folder.
        base: a config that ``multikd fit`` takes, by path (beside the chain, or in the working
            directory) or shipped name.
        settings: dotted keys and values; they may hold placeholders.
        export: see ``ExportAs``.
    """

    name: str
    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    export: ExportAs = field(default_factory=ExportAs)

    def references(self) -> list[tuple[str, str]]:
        """(stage, kind) of every placeholder in the settings, in their order."""
        found: list[tuple[str, str]] = []
        _walk(self.settings, found)
        return list(dict.fromkeys(found))


@dataclass
class Chain:
    """Stages in the order in which they run.

    Attributes:
        stages: sorted so that each comes after those that it builds on.
        tasks: task file of ``multikd evaluate`` with which every student is scored; null: none.
        data: ``DATASET.SPLIT=SOURCE`` in place of what the task file says.
        save_every: keep a checkpoint of every so many steps, beside those of epochs.
        path: where it was read from.
    """

    stages: list[Stage]
    tasks: str | None = None
    data: list[str] = field(default_factory=list)
    save_every: int | None = None
    path: Path = Path()


@dataclass
class _Head:
    """What a chain file holds beside its stages."""

    tasks: str | None = None
    data: list[str] = field(default_factory=list)
    save_every: int | None = None
    base: str | None = None


def read_chain(name: str, changes: dict[str, Any] | None = None) -> Chain:
    """A chain by path or shipped name, its stages in the order in which they run.

    Args:
        name: of the file.
        changes: ``KEY`` (of every stage) or ``STAGE:KEY`` → value, from the command line.

    Raises:
        ValueError: not found, not readable, an unknown setting or stage, stages that need one
            another in a circle, in one sentence.
    """
    path = find_chain(name)
    content = read_yaml(path)
    known = [*(f.name for f in fields(_Head)), "settings", "stages"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no chain: expected stages, each with a base and settings")
    for key in content:
        if key not in known:
            raise unknown_name("setting", str(key), known, f"(of the chain {path})")
    content = inline_fragments(content, path.parent)
    given = content.pop("stages", None)
    common = _mapping(content.pop("settings", None), "settings", path)
    head: _Head = _typed(_Head, content, path)
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{path} has no stages: give stages: {{NAME: {{settings: …}}}}")
    stages = [_stage(str(n), part, head.base, common, path) for n, part in given.items()]
    _change(stages, changes or {}, path)
    if head.save_every is not None and head.save_every < 1:
        raise ValueError(f"{path}: save_every must be 1 step or more, received {head.save_every}")
    return Chain(in_order(stages, path), head.tasks, head.data, head.save_every, path)


def _stage(name: str, part: Any, base: str | None, common: dict[str, Any], path: Path) -> Stage:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} of the chain {path} becomes the name of a folder: use letters, digits, "
            "'_', '-', '+' and '.'"
        )
    if name == LOCK:
        raise ValueError(f"a stage of {path} can't be called {name!r}, as a file of the chain is")
    part = {} if part is None else part
    if not isinstance(part, dict):
        raise ValueError(f"the stage {name!r} of {path} must be a mapping with {', '.join(_STAGE)}")
    for key in part:
        if key not in _STAGE:
            raise unknown_name("setting", str(key), _STAGE, f"(of the stage {name!r} of {path})")
    base = part.get("base", base)
    if not isinstance(base, str):
        raise ValueError(f"the stage {name!r} of {path} has no base: name a config, such as demo")
    own = _mapping(part.get("settings"), f"settings of the stage {name!r}", path)
    beside = path.parent / base
    return Stage(
        name,
        str(beside) if beside.is_file() else base,
        {**common, **own},
        _typed(ExportAs, part.get("export") or {}, path),
    )


def in_order(stages: list[Stage], path: Path) -> list[Stage]:
    """Sorted so that each comes after those that it builds on; otherwise as they are written.

    Raises:
        ValueError: a stage that is not there, an unknown kind, or a circle.
    """
    names = [stage.name for stage in stages]
    for stage in stages:
        for other, kind in stage.references():
            if other not in names:
                raise unknown_name("stage", other, names, f"(in {stage.name!r} of {path})")
            if kind not in KINDS:
                raise unknown_name(
                    "kind", kind, KINDS, f"(of {{stage:{other}:…}} in {stage.name!r} of {path})"
                )
    left, done = list(stages), list[Stage]()
    while left:
        have = {stage.name for stage in done}
        ready = next((s for s in left if {n for n, _ in s.references()} <= have), None)
        if ready is None:
            raise ValueError(
                f"stages of {path} need one another in a circle: {_circle(left)}; let one of them "
                "start from something else"
            )
        left.remove(ready)
        done.append(ready)
    return done


def _circle(stages: list[Stage]) -> str:
    """A way from a stage back to itself, for the message."""
    needs = {stage.name: [n for n, _ in stage.references()] for stage in stages}
    way = [stages[0].name]
    while True:
        following = next(n for n in needs[way[-1]] if n in needs)
        if following in way:
            return " → ".join([*way[way.index(following) :], following])
        way.append(following)


def filled(value: Any, places: dict[tuple[str, str], str], out: str) -> Any:
    """A value with a path in place of every placeholder, ``{out}`` included.

    Args:
        value: plain values.
        places: (stage, kind) → path.
        out: folder of the chain.
    """

    def of(text: str) -> str:
        return PLACEHOLDER.sub(lambda m: places[m[1], m[2] or KINDS[0]], text).replace(OUT, out)

    return with_strings(value, of)


def _walk(value: Any, found: list[tuple[str, str]]) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _walk(item, found)
    elif isinstance(value, list):
        for item in value:
            _walk(item, found)
    elif isinstance(value, str):
        found += [(m[1], m[2] or KINDS[0]) for m in PLACEHOLDER.finditer(value)]


def _change(stages: list[Stage], changes: dict[str, Any], path: Path) -> None:
    names = [stage.name for stage in stages]
    for key, value in changes.items():
        of, colon, setting = key.rpartition(":")
        if colon and of not in names:
            raise unknown_name("stage", of, names, f"(of --set {key}, in {path})")
        for stage in stages:
            if not colon or stage.name == of:
                stage.settings[setting] = value


def _mapping(value: Any, what: str, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be a mapping, received {type(value).__name__}")
    return value


def _typed(kind: type, content: Any, path: Path) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"part": content})).part
    except Exception as error:  # of jsonargparse, or of a dataclass
        raise ValueError(f"{path}: {condense(str(error))}") from error
