"""What the demo's report says, as plain typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from multikd.evaluation.intervals import PairedInterval

Role = Literal["student", "untrained", "single", "teacher", "concatenated"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Score:
    """What one encoder reached on the held-out images; accuracies in 0–1.

    The gaps are the student's accuracy minus this encoder's, paired over the same images; None for
    the student itself, or where they were not computed.
    """

    name: str
    role: Role
    knn: float
    logistic: float
    parameters: int | None = None
    knn_gap: PairedInterval | None = None
    logistic_gap: PairedInterval | None = None


@dataclass(frozen=True)
class History:
    """One value an epoch; None where k-NN was not scored."""

    epochs: Sequence[int]
    loss: Sequence[float]
    knn: Sequence[float | None]
    teacher_losses: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class NeighbourRow:
    """A held-out image and the train images nearest to it, as uint8 (H, W) or (H, W, 3)."""

    query: Pixels
    label: int
    neighbours: Sequence[tuple[Pixels, int]]


@dataclass(frozen=True)
class ReportData:
    """Everything the page says.

    Attributes:
        student: name of the student.
        data: the data set in a few words, with its licence.
        test_images: held-out images behind every accuracy.
        classes: their names, by label.
        scores: in the order of the table; exactly one has the role ``student``.
            The best teachers' gaps make the headline.
        history: of the training.
        neighbours: sample rows.
        confusion: int ``(K, K)``, truth × answer of the student, or None.
        confusion_probe: the probe that gave those answers.
        command: what was typed.
        seconds: step → seconds.
        versions: package → version.
        facts: anything else worth a line: batch size, export folder, teachers' licences.
    """

    student: str
    data: str
    test_images: int
    classes: Sequence[str]
    scores: Sequence[Score]
    history: History
    neighbours: Sequence[NeighbourRow] = ()
    confusion: npt.NDArray[np.int64] | None = None
    confusion_probe: str = "logistic regression"
    command: str = "multikd demo"
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        students = sum(score.role == "student" for score in self.scores)
        if students != 1:
            raise ValueError(
                f"a report needs exactly one score of role 'student', received {students}"
            )
        lengths = {len(self.history.epochs), len(self.history.loss), len(self.history.knn)}
        lengths |= {len(values) for values in self.history.teacher_losses.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"a history needs one value an epoch, received {sorted(lengths)} values"
            )
        if self.confusion is not None and self.confusion.shape != (len(self.classes),) * 2:
            raise ValueError(
                f"the confusion of {len(self.classes)} classes must be square in them, "
                f"received {self.confusion.shape}"
            )
