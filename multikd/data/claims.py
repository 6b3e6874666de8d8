"""Whose data a data set is: DUNE's policies of data for single teachers (arXiv 2503.14405)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from multikd.data.specs import DatasetSpec
from multikd.errors import unknown_name

TeacherData = Literal["own", "own_and_generic", "all"]


def claims(
    datasets: Mapping[str, DatasetSpec], teachers: Sequence[str], policy: TeacherData | None
) -> dict[str, frozenset[int]] | None:
    """Which data sets each teacher learns from.

    Args:
        datasets: the mixture, in its order; empty where the run reads a list of shards.
        teachers: all teachers of the run.
        policy: ``own``: an image is for the teachers that its data set names; ``own_and_generic``:
            generic data sets are for all teachers besides; ``all``: every image for every teacher;
            None: nothing was said, and data sets may not say anything.

    Returns:
        teacher → places of its data sets in the mixture; None where every image is everyone's.

    Raises:
        ValueError: data sets and policy do not fit, an unknown teacher, a data set that no teacher
            claims, or a teacher that no data set feeds.
    """
    if policy is not None and policy not in get_args(TeacherData):
        raise unknown_name("teacher_data", policy, get_args(TeacherData))
    claimed = [name for name, spec in datasets.items() if spec.teachers or spec.generic]
    for spec in datasets.values():
        for teacher in spec.teachers or ():
            if teacher not in teachers:
                raise unknown_name("teacher of a data set", teacher, teachers)
    if policy is None and claimed:
        raise ValueError(
            f"data set {claimed[0]!r} says whose it is, and model.teacher_data does not say what "
            f"follows: set it to {', '.join(get_args(TeacherData))}"
        )
    if policy is None or policy == "all":
        return None
    if not datasets:
        raise ValueError(
            f"model.teacher_data={policy} needs data.train to be a mixture whose data sets name "
            "their teachers: {name: {urls: …, teachers: […]}, …}"
        )
    found: dict[str, set[int]] = {teacher: set() for teacher in teachers}
    for place, (name, spec) in enumerate(datasets.items()):
        generic = spec.generic and policy == "own_and_generic"
        own = list(teachers) if generic else list(spec.teachers or ())
        if not own:
            remedy = "or make it generic" if policy == "own_and_generic" else "or leave it out"
            raise ValueError(
                f"no teacher claims the data set {name!r} with model.teacher_data={policy}: name "
                f"its teachers (data.train.{name}.teachers), {remedy}"
            )
        for teacher in own:
            found[teacher].add(place)
    hungry = [teacher for teacher, places in found.items() if not places]
    if hungry:
        raise ValueError(
            f"no data set feeds teacher {hungry[0]!r} with model.teacher_data={policy}: name it in "
            "the teachers of a data set, or leave it out"
        )
    return {teacher: frozenset(places) for teacher, places in found.items()}
