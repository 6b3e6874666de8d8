"""The figures of a study: ranks, worth of each teacher, interactions, costs, intervals.

Everything is plain JSON values. Scores are as the task gives them (shares in 0–1 where its unit is
%), *retention* is the mean over tasks of score / best teacher's score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from multikd import __version__
from multikd.ablation.plan import Combination, Planner, Run
from multikd.ablation.shapley import (
    Game,
    interactions,
    is_complete,
    leave_one_out,
    shapley_values,
)
from multikd.ablation.state import StudyFolder
from multikd.evaluation.intervals import mean_interval
from multikd.retention.matrix import pareto

RETENTION = "retention"
CONFIDENCE = 0.95
_FEW = 2
Scores = dict[Combination, dict[int, dict[str, float]]]


def build_leaderboard(planner: Planner, study: StudyFolder, runs: Sequence[Run]) -> dict[str, Any]:
    """The leaderboard of what is done so far."""
    shared = {run.kind: study.result(run) for run in planner.shared()}
    teachers = shared.get("teachers") or {"scores": {}, "costs": {}}
    results = {run: study.result(run) for run in runs if run.kind == "run"}
    done = {run: result for run, result in results.items() if result is not None}
    tasks = _tasks(done.values(), teachers["scores"])
    best = _best_teachers(tasks, teachers["scores"])
    scores = _scores(done, tasks, best)
    rows = [_row(c, by_seed, done, teachers["costs"]) for c, by_seed in scores.items()]
    _rank(rows)
    settings = {c.setting: c for c in scores if c.subset}
    return {
        "multikd": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "study": str(planner.study.path),
        "base": planner.study.base,
        "seeds": planner.study.seeds,
        "teachers": {
            name: {
                "scores": {t: v["value"] for t, v in teachers["scores"].get(name, {}).items()},
                "cost": teachers["costs"].get(name),
            }
            for name in planner.pool
        },
        "tasks": [
            {"name": name, **facts, "best_teacher": best.get(name)} for name, facts in tasks.items()
        ],
        "rows": rows,
        "worth": [
            worth(combination, list(planner.pool), scores, [*tasks, RETENTION], tasks)
            for combination in settings.values()
        ],
        "progress": {
            "runs": len(results),
            "done": len(done),
            "failed": {
                run.name: reasons[-1]
                for run in [*planner.shared(), *results]
                if study.result(run) is None and (reasons := study.failures(run))
            },
            "seconds": sum(float(r.get("seconds", 0.0)) for r in done.values())
            + sum(float((r or {}).get("seconds", 0.0)) for r in shared.values()),
            "cache_bytes": (shared.get("cache") or {}).get("bytes_on_disk"),
        },
    }


def worth(
    of: Combination,
    names: Sequence[str],
    scores: Scores,
    measures: Sequence[str],
    tasks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Shapley values and interactions at one setting, or leave-one-out where subsets are few.

    ``of`` is any combination with that setting.

    Each seed is a game of its own, so that intervals are over seeds; the values are those of the
    mean game (they are linear in it).
    """
    games: dict[str, dict[int, dict[frozenset[str], float]]] = {m: {} for m in measures}
    for combination, by_seed in scores.items():
        untrained = not combination.subset and set(combination.levels) <= set(of.levels)
        if combination.setting != of.setting and not untrained:
            continue
        for seed, values in by_seed.items():
            for measure, value in values.items():
                # So that more is always better.
                sign = 1.0 if tasks.get(measure, {}).get("higher_is_better", True) else -1.0
                games[measure].setdefault(seed, {})[frozenset(combination.subset)] = sign * value
    found: dict[str, Any] = {"setting": of.setting, "measures": {}}
    for measure, played in games.items():
        complete = {s: g for s, g in played.items() if is_complete(g, names)}
        if complete:
            found["measures"][measure] = _shapley(complete, names)
        elif played:
            found["measures"][measure] = _left_out(played, names)
    return found


def _shapley(games: Mapping[int, Game], names: Sequence[str]) -> dict[str, Any]:
    mean = mean_game(list(games.values()))
    values = shapley_values(mean, names)
    by_seed = [shapley_values(game, names) for game in games.values()]
    pairs = interactions(mean, names) if len(names) > 1 else {}
    pairs_by_seed = [interactions(game, names) for game in games.values()] if pairs else []
    return {
        "method": "shapley",
        "seeds": sorted(games),
        "values": {
            name: {"value": values[name], **interval_of([v[name] for v in by_seed])}
            for name in names
        },
        "full": mean[frozenset(names)],
        "empty": mean[frozenset()],
        "sum": math.fsum(values.values()),
        "interactions": [
            {"pair": list(pair), "value": value, **interval_of([v[pair] for v in pairs_by_seed])}
            for pair, value in pairs.items()
        ],
    }


def _left_out(games: Mapping[int, Game], names: Sequence[str]) -> dict[str, Any]:
    by_seed = {seed: leave_one_out(game, names) for seed, game in games.items()}
    values = {}
    for name in names:
        found = [gains[name] for gains in by_seed.values() if name in gains]
        if found:
            values[name] = {"value": statistics.fmean(found), **interval_of(found)}
    return {"method": "leave-one-out", "seeds": sorted(games), "values": values}


def mean_game(games: Sequence[Game]) -> dict[frozenset[str], float]:
    """Mean value of every subset that all games have."""
    common = set(games[0]).intersection(*games)
    return {s: math.fsum(game[s] for game in games) / len(games) for s in common}


def interval_of(values: Sequence[float]) -> dict[str, Any]:
    """Student-t interval over seeds, and what can be said: ``too few`` seeds say nothing."""
    if len(values) < _FEW:
        return {"low": None, "high": None, "n": len(values), "says": "too few seeds"}
    found = mean_interval(values, CONFIDENCE)
    resolved = found.low > 0 or found.high < 0
    return {
        "low": found.low,
        "high": found.high,
        "n": len(values),
        "says": ("above 0" if found.low > 0 else "below 0") if resolved else "unresolved",
    }


def retention_of(
    values: Mapping[str, float],
    tasks: Mapping[str, Mapping[str, Any]],
    best: Mapping[str, Mapping[str, Any]],
) -> float | None:
    """Mean over tasks of the share kept of the best teacher; None without any."""
    shares = []
    for name, value in values.items():
        if name not in best or not tasks[name]["in_mean"]:
            continue
        top = best[name]["value"]
        above, below = (value, top) if tasks[name]["higher_is_better"] else (top, value)
        if below > 0:
            shares.append(above / below)
    return math.fsum(shares) / len(shares) if shares else None


def _tasks(results: Any, teachers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for scores in [*teachers.values(), *(r["scores"] for r in results)]:
        for name, entry in scores.items():
            found.setdefault(name, {k: v for k, v in entry.items() if k != "value"})
    return found


def _best_teachers(
    tasks: Mapping[str, Mapping[str, Any]], teachers: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    best = {}
    for name, facts in tasks.items():
        values = {t: scores[name]["value"] for t, scores in teachers.items() if name in scores}
        if values:
            top = (max if facts["higher_is_better"] else min)(values, key=values.__getitem__)
            best[name] = {"name": top, "value": values[top]}
    return best


def _scores(
    done: Mapping[Run, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    best: Mapping[str, Mapping[str, Any]],
) -> Scores:
    scores: Scores = {}
    for run, result in done.items():
        values = {task: float(entry["value"]) for task, entry in result["scores"].items()}
        kept = retention_of(values, tasks, best)
        if kept is not None:
            values[RETENTION] = kept
        scores.setdefault(run.combination, {})[run.seed] = values
    return scores


def _row(
    combination: Combination,
    by_seed: Mapping[int, Mapping[str, float]],
    done: Mapping[Run, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    results = [r for run, r in done.items() if run.combination == combination]
    measures = list(dict.fromkeys(m for values in by_seed.values() for m in values))
    paces = [costs[n].get("seconds_per_image") if n in costs else None for n in combination.subset]
    shares: dict[str, list[float]] = {}
    for result in results:
        for key, value in (result.get("diagnostics") or {}).items():
            shares.setdefault(key, []).append(value)
    return {
        "label": combination.label,
        "teachers": list(combination.subset),
        "setting": combination.setting,
        "budget": combination.budget,
        "seeds": sorted(by_seed),
        "scores": {
            measure: _summary([values[measure] for values in by_seed.values() if measure in values])
            for measure in measures
        },
        "by_seed": {str(seed): dict(values) for seed, values in sorted(by_seed.items())},
        "seconds": statistics.fmean(float(r.get("seconds", 0.0)) for r in results),
        "teacher_seconds_per_image": None
        if any(pace is None for pace in paces)
        else math.fsum(p for p in paces if p is not None),
        "diagnostics": {key: statistics.fmean(values) for key, values in shares.items()},
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _rank(rows: list[dict[str, Any]]) -> None:
    """Best first (of the largest budget), with the paired difference to the best."""
    most = max((row["budget"] or 0 for row in rows), default=0)

    def retention(row: Mapping[str, Any]) -> float:
        found = row["scores"].get(RETENTION)
        return -math.inf if found is None else float(found["mean"])

    rows.sort(key=lambda row: (-(row["budget"] or 0), -retention(row), row["label"]))
    trained = [row for row in rows if row["teachers"] and (row["budget"] or 0) == most]
    for place, row in enumerate(trained, start=1):
        row["rank"] = place if math.isfinite(retention(row)) else None
        row["behind_best"] = None if place == 1 else paired(row, trained[0])
    measured = {r["label"]: r for r in trained if r["teacher_seconds_per_image"]}
    points = pareto(
        {label: retention(r) for label, r in measured.items() if math.isfinite(retention(r))},
        {label: r["teacher_seconds_per_image"] for label, r in measured.items()},
    )
    front = {point.encoder for point in points if point.on_front}
    for row in rows:
        row.setdefault("rank", None)
        row.setdefault("behind_best", None)
        row["pareto"] = row["label"] in front


def paired(row: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, Any]:
    """Retention of ``row`` minus that of ``best``, over the seeds that both were run with."""
    seeds = [s for s in row["by_seed"] if s in best["by_seed"]]
    gaps = [
        row["by_seed"][s][RETENTION] - best["by_seed"][s][RETENTION]
        for s in seeds
        if RETENTION in row["by_seed"][s] and RETENTION in best["by_seed"][s]
    ]
    if not gaps:
        return {"difference": None, "low": None, "high": None, "n": 0, "says": "too few seeds"}
    return {"difference": statistics.fmean(gaps), **interval_of(gaps)}
