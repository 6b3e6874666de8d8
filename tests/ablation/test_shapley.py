"""Worth of teachers: against the definition over all orders, in exact fractions."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from multikd.ablation.shapley import (
    all_subsets,
    interactions,
    leave_one_out,
    shapley_values,
)

NAMES = ("a", "b", "c", "d")


def random_game(seed: int, names: tuple[str, ...] = NAMES) -> dict[frozenset[str], float]:
    draw = random.Random(seed)
    return {subset: draw.random() for subset in all_subsets(names)}


def by_orders(game: dict[frozenset[str], float], names: tuple[str, ...]) -> dict[str, Fraction]:
    """The definition: what each adds when it joins, averaged over all orders of joining."""
    sums = dict.fromkeys(names, Fraction(0))
    orders = list(itertools.permutations(names))
    for order in orders:
        before: frozenset[str] = frozenset()
        for name in order:
            sums[name] += Fraction(game[before | {name}]) - Fraction(game[before])
            before |= {name}
    return {name: total / len(orders) for name, total in sums.items()}


@pytest.mark.parametrize("seed", range(5))
def test_values_are_the_mean_over_all_orders(seed: int) -> None:
    game = random_game(seed)
    expected = by_orders(game, NAMES)
    for name, value in shapley_values(game, NAMES).items():
        assert value == pytest.approx(float(expected[name]), abs=1e-14)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES[:3], NAMES])
def test_values_add_up_to_the_full_gain(names: tuple[str, ...]) -> None:
    for seed in range(20):
        game = random_game(seed, names)
        total = math.fsum(shapley_values(game, names).values())
        assert abs(total - (game[frozenset(names)] - game[frozenset()])) < 1e-9


def test_a_useless_teacher_is_worth_nothing_and_equal_ones_the_same() -> None:
    weights = {"a": 3.0, "b": 3.0, "c": 0.0}
    game = {s: sum(weights[n] for n in s) ** 0.5 for s in all_subsets(("a", "b", "c"))}
    values = shapley_values(game, ("a", "b", "c"))
    assert values["c"] == pytest.approx(0.0, abs=1e-15)
    assert values["a"] == pytest.approx(values["b"], abs=1e-15)


def test_interactions_follow_their_definition() -> None:
    additive = {s: float(len(s)) for s in all_subsets(NAMES)}
    assert all(abs(v) < 1e-12 for v in interactions(additive, NAMES).values())
    # A value that only the pair has: 1 for it, 0 for the others.
    pair = {s: float({"a", "b"} <= s) for s in all_subsets(NAMES)}
    found = interactions(pair, NAMES)
    assert found["a", "b"] == pytest.approx(1.0)
    assert found["c", "d"] == pytest.approx(0.0)
    # Of two, it is the second difference itself.
    game = random_game(3, ("a", "b"))
    empty, a, b, both = (game[frozenset(s)] for s in ("", "a", "b", "ab"))
    assert interactions(game, ("a", "b"))["a", "b"] == pytest.approx(both - a - b + empty)


def test_leave_one_out_needs_only_what_was_run() -> None:
    game = {frozenset("abc"): 0.9, frozenset("ab"): 0.7, frozenset("bc"): 1.0}
    found = leave_one_out(game, ("a", "b", "c"))
    assert found == {"c": pytest.approx(0.2), "a": pytest.approx(-0.1)}
    with pytest.raises(ValueError, match="run all subsets and the empty one"):
        shapley_values(game, ("a", "b", "c"))
    with pytest.raises(ValueError, match="run all of them"):
        interactions(game, ("a", "b", "c"))
