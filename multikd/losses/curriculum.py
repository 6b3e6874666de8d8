"""Curricula: which images of a batch count yet, easy ones first.

Competence and its pacing after Platanios et al. 2019 (arXiv 1903.09848). Shapes: B images of this
rank, M of all ranks, K classes, T teachers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from multikd.distributed import all_gather_rows, rank
from multikd.errors import unknown_name
from multikd.functional import full_precision
from multikd.losses.response import check_temperature
from multikd.losses.term import Targets, chosen_teachers

if TYPE_CHECKING:
    from multikd.teachers import Teacher

Measure = Literal["entropy", "disagreement"]
Pacing = Literal["linear", "root", "step"]


class Curriculum(nn.Module):
    """The easiest share of every global batch counts; the share grows with the run.

    An image's difficulty is taken from the step's own teacher logits (live or cached), and its
    place among the images of all ranks decides, so that there is no state: a resumed run, a cached
    one and one on other ranks admit the same images. What is not admitted has weight 0 in ladder
    and terms, and the loss is the mean over those that are. Nothing waits for the device.

    Args:
        measure: ``entropy`` of the teachers' mean probabilities, or ``disagreement``: the variance
            of their probabilities over the teachers, summed over the classes.
        pacing: how the share grows: ``linear``; ``root``, so that new images come in at an even
            rate; ``step``, in one step at ``end``.
        start: share of the images at the beginning, above 0 and at most 1.
        end: share of the run from which on all images count, above 0 and at most 1.
        temperature: of the teachers' probabilities.
        teachers: names; null: all that have a classifier.

    Raises:
        ValueError: an unknown measure or pacing, or a share out of range.
    """

    def __init__(
        self,
        measure: Measure = "entropy",
        pacing: Pacing = "root",
        start: float = 0.3,
        end: float = 0.6,
        temperature: float = 1.0,
        teachers: list[str] | None = None,
    ) -> None:
        super().__init__()
        if measure not in get_args(Measure):
            raise unknown_name("measure of difficulty", measure, get_args(Measure))
        if pacing not in get_args(Pacing):
            raise unknown_name("pacing", pacing, get_args(Pacing))
        if not 0.0 < start <= 1.0 or not 0.0 < end <= 1.0:
            raise ValueError(
                "start (of the images) and end (of the run) of a curriculum must be above 0 and at "
                f"most 1, received {start} and {end}"
            )
        check_temperature("the temperature of a curriculum", temperature)
        self.measure: Measure = measure
        self.pacing: Pacing = pacing
        self.start = start
        self.end = end
        self.temperature = temperature
        self.asked = teachers
        self.names: tuple[str, ...] = ()

    def bind(self, teachers: Mapping[str, Teacher]) -> None:
        """Learn the run's teachers.

        Raises:
            ValueError: too few have a classifier, or they have different classes.
        """
        able = [name for name, teacher in teachers.items() if teacher.num_classes]
        self.names = chosen_teachers("curriculum", self.asked, teachers) if self.asked else (*able,)
        lacking = [name for name in self.names if name not in able]
        needed = 2 if self.measure == "disagreement" else 1
        if lacking or len(self.names) < needed:
            who = f"teacher {lacking[0]!r} has" if lacking else f"only {len(self.names)} have"
            raise ValueError(
                f"a curriculum by {self.measure} reads the class probabilities of {needed} or more "
                f"teachers, and {who} a classifier: fit one with `multikd teachers fit-head`"
            )
        if len(classes := {teachers[name].num_classes for name in self.names}) > 1:
            raise ValueError(
                f"a curriculum compares teachers of the same classes, received {sorted(classes)}: "
                "name those of one label space in its teachers"
            )

    def share(self, progress: float) -> float:
        """Share of the images that count at ``progress`` of the run (0 to 1)."""
        if progress >= self.end or self.start == 1.0:
            return 1.0
        if self.pacing == "step":
            return self.start
        part = max(progress, 0.0) / self.end
        if self.pacing == "linear":
            return self.start + (1 - self.start) * part
        return math.sqrt(self.start**2 + (1 - self.start**2) * part)

    def forward(self, targets: Targets, real: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Which images count, and by what the loss of the batch is to be multiplied.

        Args:
            targets: of the teachers that ran; where none of this curriculum's did, all count.
            real: bool ``(B,)``: not a filler.
            progress: of the run, 0 to 1.

        Returns:
            bool ``(B,)``, and ``real / admitted`` of all ranks, ``()`` float32.
        """
        share = self.share(progress)
        logits = [z for n in self.names if n in targets and (z := targets[n].logits) is not None]
        if share >= 1.0 or len(logits) < (2 if self.measure == "disagreement" else 1):
            return real, torch.ones((), device=real.device)
        hard = difficulty(logits, self.measure, self.temperature)
        everyone = all_gather_rows(torch.where(real, hard, float("inf")))
        count = torch.isfinite(everyone).sum()
        admitted = easiest(everyone, torch.ceil(share * count)) & torch.isfinite(everyone)
        own = slice(rank() * len(real), (rank() + 1) * len(real))
        scale = count / admitted.sum().clamp(min=1)
        return admitted[own], scale.float()


def difficulty(logits: Sequence[Tensor], measure: Measure, temperature: float = 1.0) -> Tensor:
    """How unsure the teachers are of each image: T times ``(B, K)`` → ``(B,)`` ≥ 0, no gradient.

    ``entropy``: of the mean of the probabilities, in nats; ``disagreement``:
    ``Σ_k mean_t (p_tk − mean_t p_tk)²``.
    """
    p = torch.stack([torch.softmax(full_precision(z.detach()) / temperature, 1) for z in logits])
    if measure == "entropy":
        entropy: Tensor = torch.special.entr(p.mean(0)).sum(1)
        return entropy
    variance: Tensor = (p - p.mean(0)).square().mean(0).sum(1)
    return variance


def easiest(hard: Tensor, count: Tensor) -> Tensor:
    """bool ``(M,)``: the ``count`` smallest, of equal ones the first."""
    order = torch.argsort(hard, stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(hard), device=hard.device))
    return places < count
