"""What each teacher adds: Shapley values, interactions of pairs, leave-one-out. Pure functions.

A *game* gives a value to subsets of teachers: the score of a student that learned from them, and to
the empty one that of the untrained student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

Game = Mapping[frozenset[str], float]


def is_complete(game: Game, names: Sequence[str]) -> bool:
    """Whether every subset of ``names`` has a value, the empty one included."""
    return all(subset in game for subset in all_subsets(names))


def all_subsets(names: Sequence[str]) -> list[frozenset[str]]:
    """The ``2^n`` subsets, smallest first."""
    return [frozenset(c) for size in range(len(names) + 1) for c in combinations(names, size)]


def shapley_values(game: Game, names: Sequence[str]) -> dict[str, float]:
    """``φ_i = Σ_S |S|! (n−|S|−1)! / n! · (v(S ∪ i) − v(S))``; they add up to ``v(N) − v(∅)``.

    Shapley, "A Value for n-Person Games" (1953). In float64, with exact sums.

    Raises:
        ValueError: a subset without a value.
    """
    if not is_complete(game, names):
        lacking = next(s for s in all_subsets(names) if s not in game)
        raise ValueError(
            "Shapley values need the value of every subset, and there is none of "
            f"{{{', '.join(sorted(lacking))}}}: run all subsets and the empty one"
        )
    n = len(names)
    values = {}
    for name in names:
        others = [other for other in names if other != name]
        values[name] = math.fsum(
            math.factorial(len(s)) * math.factorial(n - len(s) - 1) / math.factorial(n)
            * (game[s | {name}] - game[s])
            for s in all_subsets(others)
        )  # fmt: skip
    return values


def interactions(game: Game, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Shapley interaction index of each pair: above 0 they add to one another, below they overlap.

    ``I_ij = Σ_S |S|! (n−|S|−2)! / (n−1)! · (v(S∪ij) − v(S∪i) − v(S∪j) + v(S))``, Grabisch and
    Roubens, "An axiomatic approach to the concept of interaction among players" (1999).

    Raises:
        ValueError: a subset without a value.
    """
    if not is_complete(game, names):
        raise ValueError("interactions need the value of every subset: run all of them")
    n = len(names)
    found = {}
    for a, b in combinations(names, 2):
        others = [other for other in names if other not in (a, b)]
        found[a, b] = math.fsum(
            math.factorial(len(s)) * math.factorial(n - len(s) - 2) / math.factorial(n - 1)
            * (game[s | {a, b}] - game[s | {a}] - game[s | {b}] + game[s])
            for s in all_subsets(others)
        )  # fmt: skip
    return found


def leave_one_out(game: Game, names: Sequence[str]) -> dict[str, float]:
    """``v(N) − v(N∖i)`` of each teacher whose absence was run; none without ``v(N)``."""
    whole = frozenset(names)
    if whole not in game:
        return {}
    return {name: game[whole] - game[whole - {name}] for name in names if whole - {name} in game}
