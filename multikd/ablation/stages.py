"""In which order a study's runs are chosen: all at once, in halving rounds, or by a search."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from multikd.ablation.leaderboard import RETENTION, build_leaderboard
from multikd.ablation.plan import Combination, Planner, Run
from multikd.ablation.state import StudyFolder
from multikd.errors import MissingExtraError


def stages(planner: Planner, study: StudyFolder) -> Iterator[list[Run]]:
    """Lists of runs; each is to be done before the next is asked for."""
    for run in planner.shared():
        yield [run]
    if planner.study.halving is not None:
        yield from _halving(planner, study)
    elif planner.study.search is not None:
        yield from _search(planner, study)
    else:
        combinations = planner.combinations()
        yield [*planner.empty(combinations), *planner.runs(combinations)]


def planned_runs(planner: Planner) -> int:
    """How many runs a study has, at most; the shared jobs and the untrained student left out."""
    seeds, combinations = len(planner.study.seeds), planner.combinations()
    if planner.study.search is not None:
        return seeds * min(planner.study.search.trials, len(combinations))
    if planner.study.halving is None:
        return seeds * len(combinations)
    total, left = 0, len(combinations)
    for _ in planner.study.halving.budgets:
        total += left
        left = max(1, math.ceil(left * planner.study.halving.keep))
    return seeds * total


def _halving(planner: Planner, study: StudyFolder) -> Iterator[list[Run]]:
    """Jamieson and Talwalkar, "Non-stochastic best arm identification …" (2016)."""
    halving = planner.study.halving
    if halving is None:
        return
    left = planner.combinations()
    for budget in halving.budgets:
        at = [replace(c, budget=budget) for c in left]
        yield [*planner.empty(at), *planner.runs(at)]
        means = {c: retention_of_combination(planner, study, c) for c in at}
        ranked = sorted(at, key=lambda c: -means[c])
        count = max(1, math.ceil(len(left) * halving.keep))
        left = [replace(c, budget=None) for c in ranked[:count] if math.isfinite(means[c])]


def _search(planner: Planner, study: StudyFolder) -> Iterator[list[Run]]:
    """Optuna's TPE over teachers (in or out) and levels; the same trials when started again."""
    search = planner.study.search
    if search is None:
        return
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "a search") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=5)
    tpe = optuna.create_study(direction="maximize", sampler=sampler)
    allowed = {c.subset for c in planner.combinations()}
    known: dict[Combination, float] = {}
    while len(known) < min(search.trials, len(planner.combinations())):
        trial = tpe.ask()
        subset = tuple(n for n in planner.pool if trial.suggest_categorical(n, [True, False]))
        levels = tuple(
            (axis, str(trial.suggest_categorical(f"axis {axis}", list(names))))
            for axis, names in planner.study.axes.items()
        )
        chosen = Combination(subset, levels)
        if subset not in allowed:
            tpe.tell(trial, state=optuna.trial.TrialState.FAIL)
            if len(tpe.trials) > 50 * search.trials:
                return  # it keeps asking for what is known
            continue
        if chosen not in known:
            yield [*planner.empty([chosen]), *planner.runs([chosen])]
            known[chosen] = retention_of_combination(planner, study, chosen)
        value = known[chosen]
        if math.isfinite(value):
            tpe.tell(trial, value)
        else:
            tpe.tell(trial, state=optuna.trial.TrialState.FAIL)
        if len(tpe.trials) > 50 * search.trials:
            return


def retention_of_combination(
    planner: Planner, study: StudyFolder, combination: Combination
) -> float:
    """Mean retention over the seeds that are done; −inf where none is."""
    board = build_leaderboard(planner, study, planner.runs([combination]))
    found: Sequence[Any] = [row["scores"].get(RETENTION) for row in board["rows"]]
    means = [entry["mean"] for entry in found if entry is not None]
    return statistics.fmean(means) if means else -math.inf
