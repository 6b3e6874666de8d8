"""Which of a teacher's classes are which of the student's, from a file.

The file is JSON or YAML, in one of two forms:

- ``{"classes": [0, 0, null, 2, …]}``: for each of the teacher's K_t classes, in order, the number
  of the student's class it belongs to, or null for none.
- ``{"teacher": ["tabby", "tiger cat", …], "student": ["cat", …]}``: names of both, in order;
  teacher classes of the same name are mapped, the others belong to none. With
  ``"same": {"tabby": "cat", …}`` teacher names are first replaced.

Several classes of the teacher may belong to one of the student's: their probabilities add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.config_files import read_yaml


class ClassMap(nn.Module):
    """Logits over a teacher's classes to logits over the student's.

    Args:
        classes: for each of the teacher's classes the student's, −1 for none.
        count: K, of the student's classes.
    """

    index: Tensor

    def __init__(self, classes: list[int], count: int) -> None:
        super().__init__()
        self.count = count
        # What has no class is summed into one more, which is cut off.
        index = torch.tensor([c if c >= 0 else count for c in classes], dtype=torch.int64)
        self.register_buffer("index", index, persistent=False)

    def forward(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """``τ·log Σ_{j→c} exp(z_j/τ)``, whose softmax at τ is what the mapped classes share.

        A class of the student's that no class of the teacher belongs to has probability 0.

        Args:
            logits: ``(B, K_t)``.
            temperature: τ.

        Returns:
            ``(B, K)``; −∞ for classes without one.
        """
        scaled = logits / temperature
        scaled = scaled.masked_fill(self.index == self.count, float("-inf"))
        top = scaled.amax(dim=1, keepdim=True)
        sums = scaled.new_zeros((len(scaled), self.count + 1))
        sums.index_add_(1, self.index, torch.exp(scaled - top))
        mapped: Tensor = temperature * (sums[:, : self.count].log() + top)
        # All of the mapped ones may have underflowed: then nothing is known of this image.
        known = sums[:, : self.count].sum(1, keepdim=True) > 0
        return torch.where(known, mapped, 0.0)


def read_class_map(path: str | Path, teacher_classes: int, student_classes: int) -> ClassMap:
    """Read a mapping; see the module for its forms.

    Raises:
        ValueError: no such file, another form, a wrong number of classes, or nothing mapped.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no mapping of classes at {path}: give a JSON or YAML file")
    content = read_yaml(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} maps no classes: {_FORMS}")
    classes = _numbers(content, file, student_classes)
    if len(classes) != teacher_classes:
        raise ValueError(
            f"{path} maps {len(classes)} classes and the teacher has {teacher_classes}: list each "
            "of them, in the order of its logits"
        )
    if all(c < 0 for c in classes):
        raise ValueError(f"{path} maps no class of the teacher to one of the student's: {_FORMS}")
    return ClassMap(classes, student_classes)


_FORMS = (
    "it needs 'classes' (for each teacher class the student's number, or null), or 'teacher' and "
    "'student' (lists of names)"
)


def _numbers(content: Mapping[str, Any], path: Path, count: int) -> list[int]:
    if isinstance(content.get("classes"), list):
        numbers = [-1 if c is None else c for c in content["classes"]]
        if not all(type(c) is int and -1 <= c < count for c in numbers):
            raise ValueError(
                f"{path}: 'classes' must be numbers from 0 to {count - 1}, or null, one for each "
                "class of the teacher"
            )
        return numbers
    names, own = content.get("teacher"), content.get("student")
    if not isinstance(names, list) or not isinstance(own, list):
        raise ValueError(f"{path} maps no classes: {_FORMS}")
    if len(own) != count:
        raise ValueError(f"{path} names {len(own)} student classes and the student has {count}")
    same = content.get("same") or {}
    if not isinstance(same, Mapping):
        raise ValueError(f"{path}: 'same' must map names of the teacher's classes to the student's")
    same = {str(name): str(other) for name, other in same.items()}
    place = {str(name): i for i, name in enumerate(own)}
    return [place.get(same.get(str(name), str(name)), -1) for name in names]
