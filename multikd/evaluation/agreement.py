"""How alike two encoders see the same images.

Linear CKA after Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML
2019, eq. 3 with a linear kernel); mutual k-nearest neighbours after Huh et al., "The Platonic
Representation Hypothesis" (ICML 2024, section 2 and appendix A); cosine of what a student predicts
of a teacher against what the teacher says.

Shapes: M images, D_a and D_b widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.neighbours import Neighbours, nearest_neighbours
from multikd.evaluation.task import (
    EncodedSplit,
    EvalSplit,
    NotApplicable,
    Request,
    SplitName,
    Subject,
    Task,
    TaskResult,
)
from multikd.types import EncoderSpec, TokenType


def linear_cka(a: Tensor, b: Tensor) -> float:
    """``‖BᵀA‖²_F / (‖AᵀA‖_F · ‖BᵀB‖_F)`` of centred features, in 0–1; float64.

    Equal to ``HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L))`` with ``K = AAᵀ``, ``L = BBᵀ``. Not changed by
    rotating or scaling either side. With few images and wide features it is biased upward: use at
    least as many images as features.

    Args:
        a: ``(M, D_a)``.
        b: ``(M, D_b)``, the same images in the same order.

    Raises:
        ValueError: shapes that do not fit, fewer than two images, values that are not finite, or
            features that are the same for all images.
    """
    _check_pair(a, b)
    x, y = (rows.detach().cpu().to(torch.float64) for rows in (a, b))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    own_x, own_y = (float(_cross(rows, rows)) for rows in (x, y))
    if own_x <= 0 or own_y <= 0:
        raise ValueError("CKA is not defined where an encoder gives all images the same features")
    return float(_cross(x, y)) / math.sqrt(own_x * own_y)


def mutual_neighbours(a: Tensor, b: Tensor, k: int = 10) -> Tensor:
    """Share of each image's k nearest others on which both encoders agree; float64 ``(M,)``.

    ``|N_a(i) ∩ N_b(i)| / k`` with cosine similarity and the image itself left out. Two unrelated
    encoders have about ``k / (M − 1)``.

    Args:
        a: ``(M, D_a)``.
        b: ``(M, D_b)``, the same images in the same order.
        k: from 1 to M − 1.

    Raises:
        ValueError: shapes that do not fit, k out of range, or values that are not finite.
    """
    _check_pair(a, b)
    if not 1 <= k < len(a):
        raise ValueError(
            f"k must be from 1 to {len(a) - 1}, the other images, received {k}: use a smaller k"
        )
    near_a, near_b = (nearest_others(rows, k).indices for rows in (a, b))
    shared = (near_a.unsqueeze(2) == near_b.unsqueeze(1)).any(dim=2).sum(dim=1)
    return shared.to(torch.float64).cpu() / k


def prediction_cosine(predicted: Tensor, truth: Tensor) -> Tensor:
    """Cosine of predicted against true features; float64 ``(M,)``, or mean over N of ``(M, N, D)``.

    A row of zeros has cosine 0.

    Args:
        predicted: ``(M, D)`` or ``(M, N, D)``, of a student's head for a teacher.
        truth: the same shape, of that teacher.

    Raises:
        ValueError: shapes that differ.
    """
    if predicted.shape != truth.shape or predicted.ndim not in (2, 3):
        raise ValueError(
            "predicted and true features must both be (M, D) or (M, N, D), received "
            f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
        )
    a, b = (
        torch.nn.functional.normalize(rows.detach().cpu().to(torch.float64), dim=-1)
        for rows in (predicted, truth)
    )
    cosine = (a * b).sum(dim=-1)
    return cosine if cosine.ndim == 1 else cosine.mean(dim=1)


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


def head_cosine(
    predicted: EncodedSplit, truth: EncodedSplit, of: TokenType, kept: Tensor, chunk: int = 256
) -> Tensor:
    """:func:`prediction_cosine` of the images ``kept`` of two encoded splits, chunk by chunk.

    Raises:
        ValueError: a token type that one of them lacks, or widths or grids that differ.
    """
    sides = [getattr(side, of) for side in (predicted, truth)]
    if sides[0] is None or sides[1] is None:
        raise ValueError(f"the head or its teacher has no {of} to compare: compare the others")
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise ValueError(
            f"a head predicts {of} of shape {tuple(sides[0].shape[1:])} where its teacher has "
            f"{tuple(sides[1].shape[1:])}: give both the image size at which their grids agree"
        )
    parts = []
    for start in range(0, len(kept), chunk):
        rows = kept[start : start + chunk]
        a, b = (torch.as_tensor(side[rows]) for side in sides)
        parts.append(prediction_cosine(a, b))
    return torch.cat(parts)


def _mean_rows(rows: list[Tensor]) -> npt.NDArray[np.float64]:
    mean: npt.NDArray[np.float64] = torch.stack(rows).mean(dim=0).numpy()
    return mean


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """``‖XᵀY‖²_F``, through whichever of the two Gram forms is smaller."""
    if len(x) <= x.shape[1] or len(x) <= y.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def nearest_others(rows: Tensor, k: int) -> Neighbours:
    """The k nearest other rows of every row, nearest first; k from 1 to M − 1."""
    found = nearest_neighbours(rows, rows, k + 1)
    own = torch.arange(len(rows), device=found.indices.device).unsqueeze(1)
    is_self = found.indices == own
    # A row with k + 1 exact copies of lower index does not see itself: its last one goes instead.
    is_self[~is_self.any(dim=1), -1] = True
    shape = (len(rows), k)
    return Neighbours(found.indices[~is_self].view(shape), found.similarities[~is_self].view(shape))


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            "two encoders are compared on (M, D) features of the same images, at least 2, received "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, rows in (("first", a), ("second", b)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the features of the {name} must be finite, received NaN or infinity")
