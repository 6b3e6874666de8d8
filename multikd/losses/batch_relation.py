"""Terms on how the images of a batch relate to one another: RKD and similarity preserving.

Park et al. 2019 (arXiv 1904.05068, equations 4 to 9); Tung & Mori 2019 (arXiv 1907.09682,
equations 1 to 4). Relations go across all ranks: each has the rows of its own images, against the
images of all. Shapes: B images of this rank, M of all ranks, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.distributed import all_gather_rows, gather_rows, rank, world_size
from multikd.functional import full_precision, where_images, without_autocast
from multikd.losses.term import Targets, TeacherTerm, chosen_teachers, nothing
from multikd.types import TOKEN_TYPES, Batch, StudentOutput, TokenFeatures, TokenType

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher


class RelationTerm(TeacherTerm):
    """Base: relations of the images' vectors, the mean over the teachers that ran.

    Args:
        weight: of this term.
        teachers: names; null: all.
        token: which vectors; of a side that lacks it, the other.
    """

    def __init__(
        self, weight: float, teachers: list[str] | None = None, token: TokenType = "summary"
    ) -> None:
        super().__init__(weight)
        if token not in TOKEN_TYPES:
            raise ValueError(f"token must be 'summary' or 'patches', received {token!r}")
        self.asked = teachers
        self.token: TokenType = token
        self.names: tuple[str, ...] = ()

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``."""
        self.names = chosen_teachers(name, self.asked, teachers)

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        return [self.tensor(output.features)]

    def tensor(self, features: TokenFeatures) -> Tensor:
        """The summary, or the patches, whichever this term reads here."""
        own = features.summary if self.token == "summary" else features.patches
        other = features.patches if self.token == "summary" else features.summary
        if own is None and other is None:
            raise ValueError("relations need a summary or patches, received neither")
        return cast(Tensor, other if own is None else own)

    def vectors(self, features: TokenFeatures) -> Tensor:
        """One vector an image, ``(B, D)`` or ``(B, N·D)``."""
        return full_precision(self.tensor(features)).flatten(1)

    def relation(self, student: Tensor, teacher: Tensor, real: Tensor, first: int) -> Tensor:
        """Loss of the rows from ``first`` on.

        Args:
            student: ``(M, D)``, of all ranks.
            teacher: ``(M, D')``.
            real: bool ``(M,)``: not a filler.
            first: where this rank's images begin; they are ``M / ranks``.

        Returns:
            ``(B,)``; 0 for fillers.
        """
        raise NotImplementedError

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``TeacherTerm``."""
        losses = [nothing(self.tensor(output.features))]
        present = [name for name in self.names if name in (targets or {})]
        if present:
            with without_autocast(losses[0].device):
                student = gather_rows(self.vectors(output.features))
                real = all_gather_rows((batch.positions >= 0).to(torch.int8)) > 0
                for name in present:
                    target = self.vectors(cast(Targets, targets)[name])
                    teacher = all_gather_rows(target)
                    first = rank() * len(target)
                    losses.append(self.relation(student, teacher, real, first) / len(present))
        return torch.stack(losses).sum(0)


class RKDTerm(RelationTerm):
    """Distances and angles between images are to be the teacher's (Huber, δ = 1).

    ``distance · mean_j huber(d_ij/μ) + angle · mean_{j≠k} huber(cos ∠ j i k)`` for each image i,
    as the corner of the angle; μ is the mean distance in the batch of all ranks, of each side its
    own. The paper has the sums over all pairs and triplets; means let weights keep their sense.
    The angles take B·M² numbers.

    Args:
        weight: of this term.
        distance: weight of the distances; the paper's is 25 to 50 beside a task loss.
        angle: weight of the angles; the paper has twice that of the distances.
        teachers: names; null: all.
        token: ``summary``, or ``patches`` for all of an image's patches as one vector.
    """

    def __init__(
        self,
        weight: float = 1.0,
        distance: float = 1.0,
        angle: float = 2.0,
        teachers: list[str] | None = None,
        token: TokenType = "summary",
    ) -> None:
        super().__init__(weight, teachers, token)
        if not (0.0 < distance + angle < float("inf") and min(distance, angle) >= 0):
            raise ValueError(
                "distance and angle must be finite weights of 0 or more, not both 0, received "
                f"{distance} and {angle}"
            )
        self.distance = distance
        self.angle = angle

    def relation(self, student: Tensor, teacher: Tensor, real: Tensor, first: int) -> Tensor:
        """See ``RelationTerm``."""
        s, t = Pairs(student, real, first), Pairs(teacher, real, first)
        loss = torch.zeros_like(s.own, dtype=student.dtype)
        if self.distance:
            loss = loss + self.distance * distance_rows(s, t)
        if self.angle:
            loss = loss + self.angle * angle_rows(s, t)
        return loss


class SimilarityPreservingTerm(RelationTerm):
    """``mean_j (G_ij − Ĝ_ij)²`` with Gram matrices of which each row has length 1.

    Summed over i this is the published ``‖G − Ĝ‖²/M²`` times M. The diagonal counts, as there.

    Args:
        weight: of this term; the paper's is 3000 for batches of 128 and more, since the entries
            of a unit row are small.
        teachers: names; null: all.
        token: ``patches`` (all of an image's as one vector, as published), or ``summary``.
    """

    def __init__(
        self,
        weight: float = 1000.0,
        teachers: list[str] | None = None,
        token: TokenType = "patches",
    ) -> None:
        super().__init__(weight, teachers, token)

    def relation(self, student: Tensor, teacher: Tensor, real: Tensor, first: int) -> Tensor:
        """See ``RelationTerm``."""
        rows = slice(first, first + _own(student))
        s, t = (similarity_rows(x, real, rows) for x in (student, teacher))
        squares = (s - t).square().sum(1) / real.sum().clamp(min=1)
        return torch.where(real[rows], squares, 0.0)


class Pairs:
    """Distances from this rank's images to all, and what angles are made of.

    Attributes:
        gram: ``(M, M)`` inner products of the centred vectors.
        squares: ``(B, M)`` squared distances; 1 where there is no pair.
        there: bool ``(B, M)``: two different, real images that are not in one place.
        own: bool ``(B,)``: real.
    """

    def __init__(self, vectors: Tensor, real: Tensor, first: int) -> None:
        count = _own(vectors)
        rows = slice(first, first + count)
        vectors = where_images(real, vectors)
        # Differences alone matter, and inner products of centred vectors keep their digits.
        mean = vectors.sum(0, keepdim=True) / real.sum().clamp(min=1)
        vectors = where_images(real, vectors - mean)
        self.gram = vectors @ vectors.mT
        norms = self.gram.diagonal()
        squares = norms[rows].unsqueeze(1) + norms.unsqueeze(0) - 2 * self.gram[rows]
        scale = norms.detach().sum() / real.sum().clamp(min=1)
        least = scale * (1e-12 if vectors.dtype == torch.float64 else 1e-6)
        index = torch.arange(len(real), device=real.device)
        other = index[rows].unsqueeze(1) != index.unsqueeze(0)
        self.pairs = other & real[rows].unsqueeze(1) & real.unsqueeze(0)
        # Images in one place have no direction between them, and a root of 0 has no gradient.
        self.there = self.pairs & (squares.detach() > least)
        self.squares = torch.where(self.there, squares, 1.0)
        self.rows = rows
        self.own = real[rows]

    @property
    def distances(self) -> Tensor:
        """``(B, M)``; 0 where two images are in one place."""
        return torch.where(self.there, self.squares.sqrt(), 0.0)

    def mean_distance(self) -> Tensor:
        """μ over the pairs of all ranks that are not in one place."""
        distances = self.distances
        own = torch.stack([distances.sum(), self.there.sum().to(distances.dtype)])
        total = gather_rows(own.unsqueeze(0)).sum(0)
        return total[0] / total[1].clamp(min=1)

    def cosines(self) -> Tensor:
        """``(B, M, M)``: cos of the angle at image i between j and k."""
        # (x_j − x_i)·(x_k − x_i) = g_jk − g_ij − g_ik + g_ii
        own = self.gram[self.rows]
        corner = self.gram.diagonal()[self.rows].view(-1, 1, 1)
        products = self.gram.unsqueeze(0) - own.unsqueeze(2) - own.unsqueeze(1) + corner
        lengths = self.squares.sqrt()
        return products / (lengths.unsqueeze(2) * lengths.unsqueeze(1))


def distance_rows(student: Pairs, teacher: Pairs) -> Tensor:
    """``mean_j huber(d_ij/μ − d'_ij/μ')`` over the other real images, ``(B,)`` (equation 5)."""
    tiny = 1e-30
    s = student.distances / student.mean_distance().clamp(min=tiny)
    t = teacher.distances / teacher.mean_distance().clamp(min=tiny)
    losses = torch.where(student.pairs, F.smooth_l1_loss(s, t, reduction="none"), 0.0)
    return losses.sum(1) / student.pairs.sum(1).clamp(min=1)


def angle_rows(student: Pairs, teacher: Pairs) -> Tensor:
    """Mean over pairs (j, k) of other images of the Huber loss of cosines, ``(B,)`` (equation 8).

    A triplet counts where, on both sides, neither end is in the corner's place.
    """
    there = student.there & teacher.there
    index = torch.arange(there.shape[1], device=there.device)
    different = (index.unsqueeze(1) != index.unsqueeze(0)).unsqueeze(0)
    triplets = there.unsqueeze(2) & there.unsqueeze(1) & different
    losses = F.smooth_l1_loss(student.cosines(), teacher.cosines(), reduction="none")
    losses = torch.where(triplets, losses, 0.0)
    return losses.sum((1, 2)) / triplets.sum((1, 2)).clamp(min=1)


def similarity_rows(vectors: Tensor, real: Tensor, rows: slice) -> Tensor:
    """``A Aᵀ`` of which each row has length 1, of these rows: ``(M, D)`` → ``(B, M)``."""
    vectors = where_images(real, vectors)
    return F.normalize(vectors[rows] @ vectors.mT, dim=1)


def _own(vectors: Tensor) -> int:
    return len(vectors) // world_size()
