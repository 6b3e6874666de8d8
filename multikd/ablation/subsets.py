"""Subsets of teachers: which of them a study runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from multikd.ablation.study import ADD_ONE, ALL, LEAVE_ONE_OUT
from multikd.errors import unknown_name

Subset = tuple[str, ...]


def subsets_of(
    pool: Sequence[str], kind: str | Sequence[Sequence[str]], sizes: Sequence[int] | None = None
) -> list[Subset]:
    """The subsets, smallest first, each in the order of the pool.

    Args:
        pool: names of all teachers.
        kind: ``all``, ``leave-one-out``, ``add-one`` or a list of subsets.
        sizes: with ``all``, of these sizes only.

    Raises:
        ValueError: a teacher that is not in the pool, a size that no subset has, or no subset.
    """
    pool = tuple(pool)
    found: list[Subset] = []
    if kind == ALL:
        for size in sizes or range(1, len(pool) + 1):
            if not 1 <= size <= len(pool):
                raise ValueError(
                    f"there are {len(pool)} teachers, so sizes are from 1 to {len(pool)}, "
                    f"received {size}"
                )
            found += combinations(pool, size)
    elif kind == LEAVE_ONE_OUT:
        found = [*combinations(pool, len(pool) - 1), pool]
    elif kind == ADD_ONE:
        found = [*((name,) for name in pool), pool]
    else:
        for names in kind:
            for name in names:
                if name not in pool:
                    raise unknown_name("teacher", name, pool, "(in the subsets of the study)")
            found.append(tuple(name for name in pool if name in names))
    unique = list(dict.fromkeys(subset for subset in found if subset))
    if not unique:
        raise ValueError("the study has no subset of teachers to run: give subsets: all, or a list")
    return sorted(unique, key=lambda subset: (len(subset), [pool.index(n) for n in subset]))
