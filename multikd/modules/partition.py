"""Teachers divided over ranks, where one device cannot hold them all.

Rank r loads and runs the teachers of group r mod G, on its own images as ever. Student and ladder
are whole on every rank, and DDP averages their gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from multikd.distributed import all_gather_object, all_or_none
from multikd.errors import unknown_name
from multikd.teachers import Teacher


class Partition:
    """Groups of teachers.

    Args:
        groups: names of teachers, each in one group.
        names: all teachers of the run.

    Raises:
        ValueError: a name that is no teacher, is there twice, or is missing; an empty group.
    """

    def __init__(self, groups: Sequence[Sequence[str]], names: Sequence[str]) -> None:
        given = [name for group in groups for name in group]
        for name in given:
            if name not in names:
                raise unknown_name("teacher in partition", name, names)
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise ValueError(f"partition names {', '.join(twice)} twice: put each into one group")
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(
                f"partition leaves out {', '.join(missing)}: put every teacher into one group"
            )
        if len(groups) < 2 or not all(groups):
            raise ValueError(
                "a partition has two or more groups with a teacher each, received "
                f"{[list(group) for group in groups]}: leave partition out to run all on every rank"
            )
        # In the order of the run, which is that of every other row.
        self.groups = [tuple(name for name in names if name in group) for group in groups]

    def here(self, rank: int) -> tuple[str, ...]:
        """The teachers that a rank runs."""
        return self.groups[rank % len(self.groups)]

    def check_ranks(self, world: int) -> None:
        """Refuse too few processes.

        Raises:
            ValueError: a group would be run by nobody.
        """
        if world < len(self.groups):
            idle = ", ".join(name for group in self.groups[world:] for name in group)
            raise ValueError(
                f"partition has {len(self.groups)} groups and the run has {world} "
                f"process{'es' * (world > 1)}, so that nobody would run {idle}: use at least "
                f"{len(self.groups)} (trainer.devices, trainer.num_nodes), or leave partition out"
            )


def facts_of(teacher: Teacher) -> dict[str, str]:
    """Encoder, licence, source and fingerprint, for checkpoints."""
    return {
        "encoder": teacher.spec.name,
        "licence": teacher.spec.licence,
        "source": teacher.spec.source,
        "fingerprint": teacher.fingerprint(),
    }


def load_own(teachers: Mapping[str, Teacher], here: Collection[str]) -> dict[str, dict[str, str]]:
    """Load the teachers of this rank, and leave the others where they are.

    Returns:
        name → ``facts_of`` all teachers, each told by a rank that has it.

    Raises:
        ValueError, OSError: weights that can't be loaded, on every rank.
    """
    told: dict[str, dict[str, str]] = {}
    with all_or_none():
        for name, teacher in teachers.items():
            if name in here:
                _ = teacher.encoder
                told[name] = facts_of(teacher)
            else:
                teacher.stay()
    return {name: facts for part in all_gather_object(told) for name, facts in part.items()}


def check_told(told: Mapping[str, Mapping[str, str]], kept: object, names: Sequence[str]) -> None:
    """Refuse a checkpoint of other teachers; with a partition nobody could look before.

    Raises:
        ValueError: names the teacher, on every rank.
    """
    for name in names:
        facts = kept.get(name) if isinstance(kept, dict) else None
        if isinstance(facts, dict) and facts.get("fingerprint") != told[name]["fingerprint"]:
            raise ValueError(
                f"the checkpoint's teacher {name!r} has other weights or another input: give the "
                "config that it was made with"
            )
