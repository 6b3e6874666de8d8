"""Teachers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from multikd.teachers.base import Teacher
from multikd.types import Widths


class TeacherDict(nn.ModuleDict):
    """Teachers by name. Nothing of them is in its state dict, and a strict load asks for nothing.

    Raises:
        ValueError: a name with a dot, or a value that is no ``Teacher``.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        for name, teacher in teachers.items():
            if not isinstance(teacher, Teacher):
                raise ValueError(f"teacher {name!r} is a {type(teacher).__name__}, not a Teacher")
            if not name or "." in name:
                raise ValueError(f"a teacher's name must be non-empty without dots, not {name!r}")
        super().__init__(dict(teachers))

    @property
    def widths(self) -> dict[str, Widths]:
        """Widths of every teacher."""
        return {name: cast(Teacher, teacher).widths for name, teacher in self.items()}
