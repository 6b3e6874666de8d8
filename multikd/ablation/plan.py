"""From a study to runs: which, and the whole config of each."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from multikd.ablation.study import Study
from multikd.ablation.subsets import Subset, subsets_of
from multikd.config_files import load_config
from multikd.errors import unknown_name
from multikd.runs.overrides import get, put
from multikd.runs.trainer import own_folder

Kind = Literal["cache", "teachers", "run"]
# Callbacks of the base that a run of a study has of its own, or needs not.
_OWN_CALLBACKS = ("PrecomputeFeatures", "GradientShare")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Combination:
    """What is compared: teachers and one level of every axis.

    Attributes:
        subset: the teachers; none for the untrained student.
        levels: axis → level.
        budget: of successive halving; None otherwise.
    """

    subset: Subset
    levels: tuple[tuple[str, str], ...] = ()
    budget: int | None = None

    @property
    def setting(self) -> str:
        """The levels (and budget) as a name; "" without axes."""
        parts = [f"{axis}={level}" for axis, level in self.levels]
        return ",".join(parts + ([f"budget={self.budget}"] if self.budget is not None else []))

    @property
    def teachers(self) -> str:
        """The teachers as a name."""
        return "+".join(self.subset) or "untrained"

    @property
    def label(self) -> str:
        """Teachers and levels as one name, which is a folder's, too."""
        return ",".join(part for part in (self.teachers, self.setting) if part)


@dataclass(frozen=True)
class Run:
    """One job of a study: a combination with a seed, or what all of them share."""

    kind: Kind
    combination: Combination
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        if self.kind != "run":
            return f"_{self.kind}"
        return f"{self.combination.label},seed={self.seed}"

    def to_json(self) -> dict[str, Any]:
        """For ``plan.json``."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Run:
        """Back from ``plan.json``, where tuples are lists."""
        told = values["combination"]
        levels = tuple((str(a), str(b)) for a, b in told["levels"])
        return Run(
            values["kind"],
            Combination(tuple(told["subset"]), levels, told["budget"]),
            values["seed"],
        )


class Planner:
    """A study's base config, its pool of teachers, and the runs that follow from them.

    Args:
        study: as it was read.
        out: folder of the study.

    Raises:
        ValueError: an unknown teacher, a key that leads nowhere, or an empty plan.
    """

    def __init__(self, study: Study, out: Path) -> None:
        self.study = study
        self.out = out
        self.base = load_config(study.base)
        for key, value in study.settings.items():
            put(self.base, key, value)
        pool = get(self.base, "model.teachers") if study.teachers is None else study.teachers
        if not isinstance(pool, dict) or not pool:
            raise ValueError(
                f"the study {study.path} has no teachers, nor has its base {study.base}: "
                "give teachers: {NAME: …}"
            )
        self.pool: dict[str, Any] = pool
        for name in (*pool, *study.axes, *(n for levels in study.axes.values() for n in levels)):
            if not _NAME.fullmatch(str(name)):
                raise ValueError(
                    f"{name!r} of the study {study.path} becomes the name of a folder: use "
                    "letters, digits, '_', '-', '+' and '.'"
                )
        self.subsets = subsets_of(tuple(pool), study.subsets, study.sizes)

    @property
    def cache(self) -> Path:
        """The feature cache that all runs share."""
        return self.out / "features"

    def combinations(self) -> list[Combination]:
        """All of the study's, without the empty set, at no budget."""
        axes = [[(axis, level) for level in levels] for axis, levels in self.study.axes.items()]
        return [
            Combination(subset, levels)
            for levels in itertools.product(*axes)
            for subset in self.subsets
        ]

    def shared(self) -> list[Run]:
        """What every run builds on: the teachers' own scores, their features.

        The scores first: a task that does not fit them is found before a cache is filled.
        """
        everything = Combination(tuple(self.pool), self._first_levels())
        runs = [Run("teachers", everything, self.study.seeds[0])]
        if self.study.cache is not None:
            runs.append(Run("cache", everything, self.study.seeds[0]))
        return runs

    def runs(self, combinations: Sequence[Combination]) -> list[Run]:
        """With every seed; seed by seed, so that a study that is stopped has whole rounds."""
        return [Run("run", c, seed) for seed in self.study.seeds for c in combinations]

    def empty(self, combinations: Sequence[Combination]) -> list[Run]:
        """The untrained students: one for every setting of the axes that change the student."""
        if not self.study.empty:
            return []
        return self.runs(list(dict.fromkeys(self.untrained(c) for c in combinations)))

    def untrained(self, combination: Combination) -> Combination:
        """The untrained student beside a combination; what only changes training is left out."""
        return Combination((), tuple(x for x in combination.levels if self._changes_student(x[0])))

    def _changes_student(self, axis: str) -> bool:
        """Whether a level of an axis touches the student, or replaces the model as a whole."""
        keys = [key for level in self.study.axes[axis].values() for key in level]
        plain = [key.replace(".init_args", "") for key in keys]
        return any(key.startswith("model.student") or key == "model" for key in plain)

    def _first_levels(self) -> tuple[tuple[str, str], ...]:
        return tuple((axis, next(iter(levels))) for axis, levels in self.study.axes.items())

    # ------------------------------------------------------------------ configs

    def folder(self, run: Run) -> Path:
        """Where a run writes."""
        return self.out / "runs" / run.name

    def config(self, run: Run) -> dict[str, Any]:
        """The whole config of a run, for ``multikd fit --config``.

        Raises:
            ValueError: a dotted key that leads nowhere.
        """
        config = copy.deepcopy(self.base)
        levels = {**dict(self._first_levels()), **dict(run.combination.levels)}
        for axis, level in levels.items():
            for key, value in self.study.axes[axis][level].items():
                put(config, key, value)
        if run.combination.budget is not None and self.study.halving is not None:
            put(config, self.study.halving.setting, run.combination.budget)
        # The untrained student is built beside teachers, of which it learns nothing.
        names = run.combination.subset or tuple(self.pool)
        put(config, "model.teachers", {name: self.pool[name] for name in names})
        losses = get(config, "model.teacher_losses")
        if isinstance(losses, dict):
            put(config, "model.teacher_losses", {n: v for n, v in losses.items() if n in names})
        config["seed_everything"] = run.seed
        views_seed = get(config, "data.seed") or 0
        put(config, "data.seed", run.seed)
        put(config, "data.recorded_seed", views_seed)  # one cache for runs of all seeds
        cached = self.study.cache is not None
        put(config, "data.cache", str(self.cache) if cached else None)
        put(config, "data.cache_storage", None if not cached else asdict(self.study.cache))  # type: ignore[arg-type]
        own: list[Any] = []
        if self.study.diagnose:
            settings = {"every_n_steps": self.study.diagnose}
            own = [{"class_path": "multikd.callbacks.GradientShare", "init_args": settings}]
        own_folder(config, self.folder(run), own=own, without=_OWN_CALLBACKS)
        return config


def check_levels(study: Study, known: Sequence[str]) -> None:
    """Refuse a dotted key whose section no config has.

    Raises:
        ValueError: names the axis.
    """
    for axis, levels in study.axes.items():
        for level in levels.values():
            for key in level:
                if key.split(".")[0] not in known:
                    raise unknown_name(f"setting (axis {axis!r})", key, known)


def plan_json(runs: Sequence[Run]) -> str:
    """What ``plan.json`` holds."""
    return json.dumps([run.to_json() for run in runs], indent=1)
