"""Agreement with teachers as tasks; the maths is in ``agreement.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.agreement import head_cosine, linear_cka, mutual_neighbours
from multikd.evaluation.task import (
    EvalSplit,
    NotApplicable,
    Request,
    SplitName,
    Subject,
    Task,
    TaskResult,
)
from multikd.types import EncoderSpec, TokenType


@dataclass
class _Agreement(Task):
    """What the agreement tasks share: the runner sets ``teachers`` before it calls ``score``.

    Attributes:
        split: whose images are compared.
        maximum: images compared, evenly spaced over the split.
        teachers: name → the teacher before the same data set; set by the runner.
    """

    data: str
    split: SplitName = "test"
    maximum: int = 5000
    teachers: Mapping[str, Subject] = field(default_factory=dict, init=False)

    splits = ()
    compares = True

    def __post_init__(self) -> None:
        if self.maximum < 3:
            raise ValueError(f"maximum must be at least 3 images, received {self.maximum}")

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses a data set without the split that is compared."""
        super().check(splits, specs)
        if self.split not in splits or len(splits[self.split]) < 3:
            raise ValueError(
                f"{type(self).__name__} on {self.data!r} compares encoders on at least 3 images "
                f"of the split {self.split!r}, which the data set lacks"
            )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Features of the one split that is compared."""
        del spec
        return [Request(self.split, self._asked())]

    def _asked(self) -> tuple[TokenType, ...]:
        return ("summary",)

    def applies(self, subject: Subject) -> bool:
        """Only what learned from teachers: a teacher's share of another teacher says nothing."""
        return subject.name not in self.teachers

    def _compared(self, subject: Subject) -> dict[str, Subject]:
        others = {name: t for name, t in self.teachers.items() if name != subject.name}
        if not others:
            raise NotApplicable(
                f"{type(self).__name__} compares {subject.name!r} with teachers, and there are "
                "none beside it: pass --with-teachers"
            )
        return others

    def _kept(self, *faulty: Sequence[str], keys: Sequence[str]) -> Tensor:
        """Indices compared: readable for everybody, at most ``maximum``, evenly spaced."""
        bad = {key for faults in faulty for key in faults}
        usable = [i for i, key in enumerate(keys) if key not in bad]
        if len(usable) > self.maximum:
            places = np.linspace(0, len(usable) - 1, self.maximum).round().astype(int)
            usable = [usable[i] for i in places]
        if len(usable) < 3:
            raise ValueError(f"{type(self).__name__} needs 3 readable images, found {len(usable)}")
        return torch.tensor(usable)

    def _pairs(self, subject: Subject) -> dict[str, tuple[Tensor, Tensor]]:
        """Teacher → summaries of the subject and of the teacher, of the images compared."""
        own = subject.features(self.split)
        keys = subject.splits[self.split].keys
        pairs = {}
        for name, teacher in self._compared(subject).items():
            other = teacher.features(self.split)
            kept = self._kept(own.faults, other.faults, keys=keys)
            if own.summary is None or other.summary is None:
                raise ValueError(f"{subject.name!r} or {name!r} gave no summary to compare")
            pairs[name] = (own.summary[kept], other.summary[kept])
        return pairs

    @staticmethod
    def _result(values: Mapping[str, float], details: Mapping[str, Any]) -> TaskResult:
        mean = sum(values.values()) / len(values)
        return TaskResult(
            mean, metrics=dict(values), details={"per_teacher": dict(values), **details}
        )


@dataclass
class CKA(_Agreement):
    """Linear CKA with each teacher (Kornblith et al. 2019), and their mean as the value."""

    metric = "CKA"
    unit = ""
    source = "Kornblith et al. 2019, arXiv 1905.00414, equation 3"

    def score(self, subject: Subject) -> TaskResult:
        """Mean over teachers; ``metrics`` has each."""
        pairs = self._pairs(subject)
        values = {name: linear_cka(a, b) for name, (a, b) in pairs.items()}
        return self._result(values, {"images": len(next(iter(pairs.values()))[0])})


@dataclass
class MutualNeighbours(_Agreement):
    """Mutual k-NN overlap with each teacher (Huh et al. 2024), and their mean as the value.

    Args:
        k: neighbours of each image.
    """

    k: int = 10

    metric = "mutual k-NN"
    source = "Huh et al. 2024, arXiv 2405.07987, section 2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1, received {self.k}")

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses k above the number of other images."""
        super().check(splits, specs)
        images = min(len(splits[self.split]), self.maximum)
        if self.k >= images:
            raise ValueError(f"k must be below the {images} images compared, received {self.k}")

    def score(self, subject: Subject) -> TaskResult:
        """Mean over teachers; ``metrics`` has each, ``details`` what chance gives."""
        pairs = self._pairs(subject)
        rows = {name: mutual_neighbours(a, b, self.k) for name, (a, b) in pairs.items()}
        images = min(len(row) for row in rows.values())
        result = self._result(
            {name: float(row.mean()) for name, row in rows.items()},
            {"images": images, "chance": self.k / (images - 1)},
        )
        if len({len(row) for row in rows.values()}) == 1:
            result.per_sample = _mean_rows(list(rows.values()))
        return result


@dataclass
class HeadCosine(_Agreement):
    """Cosine of what a student's head predicts of its teacher against what the teacher says.

    Only encoders that are a head are scored, each against its own teacher.

    Args:
        of: summary or patches (whose grids must then agree).
    """

    of: TokenType = "summary"

    metric = "cosine"
    unit = ""
    source = "cosine of prediction and target, as in Heinrich et al. 2024, arXiv 2410.01680"

    def _asked(self) -> tuple[TokenType, ...]:
        return (self.of,)

    def applies(self, subject: Subject) -> bool:
        """The encoder is a head, and its teacher is among the teachers."""
        return subject.head is not None and subject.head in self.teachers

    def score(self, subject: Subject) -> TaskResult:
        """Mean cosine over images."""
        if subject.head is None or subject.head not in self.teachers:
            raise NotApplicable(
                f"HeadCosine compares a head with its teacher, and {subject.name!r} is no head "
                f"of the teachers at hand ({', '.join(sorted(self.teachers)) or 'none'}): choose "
                "heads with --heads and pass --with-teachers"
            )
        teacher = self.teachers[subject.head]
        own = subject.features(self.split, (self.of,))
        other = teacher.features(self.split, (self.of,))
        kept = self._kept(own.faults, other.faults, keys=subject.splits[self.split].keys)
        rows = head_cosine(own, other, self.of, kept)
        return TaskResult(
            float(rows.mean()),
            per_sample=rows.numpy(),
            metrics={"lowest tenth": float(rows.quantile(0.1))},
            details={"images": len(kept), "per_teacher": {subject.head: float(rows.mean())}},
        )


def _mean_rows(rows: list[Tensor]) -> npt.NDArray[np.float64]:
    mean: npt.NDArray[np.float64] = torch.stack(rows).mean(dim=0).numpy()
    return mean
