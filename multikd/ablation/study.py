"""Study files: typed YAML that says what is varied over a base config, and how it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from multikd.config_errors import condense
from multikd.config_files import inline_fragments, read_yaml
from multikd.data.cache_storage import CacheStorage
from multikd.errors import unknown_name
from multikd.shipped import find_study

ALL, LEAVE_ONE_OUT, ADD_ONE = "all", "leave-one-out", "add-one"
KINDS = (ALL, LEAVE_ONE_OUT, ADD_ONE)
_PARTS = ("settings", "teachers", "axes")
# One setting of an axis: dotted keys of the config and their values.
Level = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Beyond what a study asks before it begins.

    Attributes:
        runs: so many runs need ``--yes``.
        hours: stop starting runs after so many hours; null: no end.
    """

    runs: int = 50
    hours: float | None = None


@dataclass(frozen=True)
class Halving:
    """Drop losing combinations early: all run at the first budget, the best at the next, …

    Attributes:
        budgets: values of ``setting``, ascending.
        setting: dotted key of what is spent.
        keep: share of the combinations that goes on.
    """

    budgets: list[int]
    setting: str = "trainer.max_epochs"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if len(self.budgets) < 2 or sorted(set(self.budgets)) != self.budgets:
            raise ValueError(
                f"halving needs two or more ascending budgets, received {self.budgets}"
            )
        if not 0 < self.keep < 1:
            raise ValueError(f"halving keeps a share between 0 and 1, received {self.keep}")


@dataclass(frozen=True)
class Search:
    """Let Optuna choose combinations in place of running all.

    Attributes:
        trials: how many combinations are tried.
        seed: of the sampler.
    """

    trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"a search needs trials, received {self.trials}")


@dataclass
class Study:
    """A study over a base config.

    Attributes:
        base: a config that ``multikd fit`` takes, by path or shipped name.
        tasks: task file of ``multikd evaluate``, by path or shipped name.
        settings: dotted keys and values of every run.
        teachers: the pool; null: those of the base config.
        subsets: ``all``, ``leave-one-out`` (all, and all but each), ``add-one`` (each alone, and
            all), or a list of lists of names.
        sizes: with ``all``, subsets of these sizes only; null: all sizes.
        axes: axis → level → dotted keys and values.
        seeds: each combination is run with each.
        empty: score the untrained student too: what a set without teachers is worth.
        data: ``DATASET.SPLIT=SOURCE`` in place of what the task file says.
        cache: how the shared feature cache keeps features; null: teachers run in every step.
        limits: see ``Limits``.
        halving: see ``Halving``.
        search: see ``Search``.
        diagnose: sample each teacher's gradient on the encoder every so many steps; 0: never.
        path: where it was read from.
    """

    base: str
    tasks: str
    settings: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, Any] | None = None
    subsets: str | list[list[str]] = ALL
    sizes: list[int] | None = None
    axes: dict[str, dict[str, Level]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    empty: bool = True
    data: list[str] = field(default_factory=list)
    cache: CacheStorage | None = field(default_factory=CacheStorage)
    limits: Limits = field(default_factory=Limits)
    halving: Halving | None = None
    search: Search | None = None
    diagnose: int = 50
    path: Path = Path()


def read_study(name: str, changes: Sequence[str] = ()) -> Study:
    """A study by path or shipped name.

    Args:
        name: of the file.
        changes: ``KEY=VALUE`` of ``settings``, from the command line.

    Raises:
        ValueError: not found, not readable, or a setting that does not fit, in one sentence.
    """
    path = find_study(name)
    content = read_yaml(path)
    known = [f.name for f in fields(Study) if f.name != "path"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no study: expected base, tasks and what is varied")
    for key in content:
        if key not in known:
            raise unknown_name("setting", str(key), known, f"(of the study {path})")
    content = inline_fragments(content, path.parent)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, received {change!r}")
        from multikd.config_files import parse_yaml

        content["settings"] = {
            **(content.get("settings") or {}), key: parse_yaml(value, f"--set {key}")
        }  # fmt: skip
    # Parts of configs, which belong to the runs: here they would be built.
    parts = {key: content.pop(key) for key in _PARTS if content.get(key) is not None}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {key} must be a mapping, received {type(part).__name__}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--study", type=Study)
    try:
        study: Study = parser.instantiate(parser.parse_object({"study": content})).study
    except Exception as error:  # of jsonargparse, or of a dataclass
        raise ValueError(f"{path}: {condense(str(error))}") from error
    for key, part in parts.items():
        setattr(study, key, part)
    study.path = path
    _check(study)
    return study


def _check(study: Study) -> None:
    where = f"of the study {study.path}"
    if not study.seeds or len(set(study.seeds)) != len(study.seeds) or min(study.seeds) < 0:
        raise ValueError(f"the seeds {where} must be different numbers from 0 on: {study.seeds}")
    if isinstance(study.subsets, str) and study.subsets not in KINDS:
        raise unknown_name("subsets", study.subsets, KINDS, f"({where}; or a list of lists)")
    if study.sizes is not None and study.subsets != ALL:
        raise ValueError(f"sizes {where} go with subsets: all")
    for axis, levels in study.axes.items():
        made = isinstance(levels, dict) and levels
        if not made or not all(isinstance(level, dict) for level in levels.values()):
            raise ValueError(
                f"the axis {axis!r} {where} needs levels, each of dotted keys and values: "
                "{LEVEL: {model.dropper: …}}"
            )
    if study.halving is not None and study.search is not None:
        raise ValueError(f"halving and search {where} exclude one another: leave one out")
