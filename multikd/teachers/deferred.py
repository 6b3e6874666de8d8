"""A teacher that is loaded only where it runs: known by its shapes until then."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from multikd.backbones import skeleton
from multikd.teachers.base import Teacher
from multikd.teachers.kept import KeptTeacher, load_teacher, remember
from multikd.types import Grid, Widths


class DeferredTeacher(KeptTeacher):
    """``Teacher(**settings)`` of which only a skeleton without weights is built at first.

    Widths, grids, licence and size are the skeleton's. The weights are loaded when the encoder is
    first asked for: on the ranks of a partition that run this teacher, before training.

    Args:
        settings: of the teacher, its encoder given by name.

    Raises:
        ValueError: as ``Teacher``, as far as it can be known without weights.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        with torch.random.fork_rng(devices=[]), skeleton(), torch.device("meta"):
            bones = Teacher(**settings)
        facts = {
            "spec": dataclasses.asdict(bones.spec),
            "fingerprint": "",
            "parameters": bones.num_parameters,
            "grids": [],
        }
        super().__init__(facts, settings)
        self.__dict__["_bones"] = bones

    @property
    def widths(self) -> Widths:
        """As the skeleton's."""
        widths: Widths = self.__dict__["_bones"].widths
        return widths

    def grid_for(self, image_size: Grid, student_patch: int | None = None) -> Grid | None:
        """As the skeleton's."""
        grid: Grid | None = self.__dict__["_bones"].grid_for(image_size, student_patch)
        return grid

    def fingerprint(self) -> str:
        """Of the weights, which are loaded for it."""
        _ = self.encoder
        return Teacher.fingerprint(self)

    def _check(self, real: Teacher) -> None:
        """Nothing was kept of other weights; what only they tell (classes, source) is theirs."""
        self._spec, self._parameters_known = real.spec, real.num_parameters


def defer_teacher(**kwargs: Any) -> Teacher:
    """A teacher by name without its weights; one whose encoder is an object is built at once."""
    if not isinstance(kwargs.get("encoder"), str):
        return load_teacher(kwargs)
    return remember(DeferredTeacher(kwargs), kwargs)
