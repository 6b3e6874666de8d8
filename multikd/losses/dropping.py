"""Teacher dropping: which teachers run, which count for which image, and the weighted total."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from multikd.distributed import all_reduce_sum, world_size
from multikd.errors import unknown_name
from multikd.functional import full_precision, hash_uniform, hash_unit

Normalize = Literal["image", "batch", "teacher"]

# Streams of random draws; far from the teacher indices that HardestKept uses as streams.
_TEACHER_STREAM = 1 << 32


def hardest_kept(losses: Tensor, draws: Tensor, p: float) -> Tensor:
    """UNIC's teacher dropping (arXiv 2408.05088, section 3.3).

    For each image the teacher with the largest loss is kept, and each other one is dropped with
    probability ``p``. A NaN is larger than anything, so it is kept and seen.

    Args:
        losses: ``(T, B)``.
        draws: ``(T, B)`` uniform in [0, 1); those of the hardest teachers go unused.
        p: a teacher is dropped where its draw is below.

    Returns:
        ``(T, B)`` float32, 1 for kept and 0 for dropped, at least one 1 per image.
    """
    hardest = losses.detach().argmax(dim=0, keepdim=True)
    return (draws >= p).float().scatter(0, hardest, 1.0)


def weigh(
    losses: Tensor, keep: Tensor, lambdas: Tensor, normalize: Normalize = "image"
) -> tuple[Tensor, Tensor]:
    """The scalar to differentiate, and the weight of every loss in it.

    ``total = mean over images of Σ_t w·L`` with ``w ∝ λ_t · keep``, and with λ̄ = mean of λ:

    - ``image``: ``w = λ̄ · λ_t·keep / Σ_t λ_t·keep``: each image counts equally.
    - ``batch``: the denominator is the mean of ``Σ_t λ_t·keep`` over the images of **all** ranks,
      as UNIC's published code has it (for one rank): images that keep more teachers weigh more.
    - ``teacher``: ``w = λ_t · keep · (images) / (T · images kept for t)``, both counted over all
      ranks: the mean over teachers of λ_t times the mean over the images that count for each. A
      teacher with few images (data of its own, a part of the ranks) then weighs like the others.

    The factor λ̄ is 1 for balancers of relative weights. For learned ones it is what makes the sum
    Kendall's when nothing is dropped; without it their common scale would not enter the loss.
    Under DDP, which averages gradients, both give the gradient of the global value; the batches of
    all ranks must have one size. What is not kept is masked, not multiplied by 0: a NaN there does
    not reach the total, nor a gradient through ``FeatureLoss``; the backward pass of other losses
    makes a NaN of 0·NaN.

    Args:
        losses: ``(T, B)`` of the teachers that ran.
        keep: ``(T, B)`` 0 or 1.
        lambdas: ``(T,)`` ≥ 0, with or without gradient.
        normalize: see above.

    Returns:
        total ``()`` of this rank, whose mean over ranks is the global one, and weights ``(T, B)``
        (whose mean over images is UNIC's coefficient of a teacher).

    Raises:
        ValueError: for shapes that do not agree, or an unknown ``normalize``.
    """
    if losses.ndim != 2 or keep.shape != losses.shape or lambdas.shape != losses.shape[:1]:
        raise ValueError(
            "weigh needs losses (T, B), keep (T, B) and lambdas (T,), received "
            f"{tuple(losses.shape)}, {tuple(keep.shape)} and {tuple(lambdas.shape)}"
        )
    losses, keep, lambdas = full_precision(losses), full_precision(keep), full_precision(lambdas)
    weighted = lambdas.unsqueeze(1) * keep
    if normalize == "teacher":
        images = all_reduce_sum(keep.sum(1)).clamp(min=1.0)
        share = world_size() * keep.shape[1] / (len(keep) * images)
        weights = weighted * share.unsqueeze(1)
    else:
        if normalize == "image":
            divisor = weighted.sum(0)
        elif normalize == "batch":
            # Reduced before λ comes in, so that a learned λ keeps its gradient.
            kept = all_reduce_sum(keep.sum(1)) / (world_size() * keep.shape[1])
            divisor = (lambdas * kept).sum()
        else:
            raise unknown_name("normalize", normalize, get_args(Normalize))
        # An image whose kept teachers all weigh 0 has weight 0, not 0/0.
        tiny = torch.finfo(weighted.dtype).tiny
        weights = lambdas.mean() * weighted / divisor.clamp(min=tiny)
    terms = torch.where(weights > 0, losses, 0.0) * weights
    return terms.sum() / losses.shape[1], weights


class TeacherDropper(nn.Module):
    """Which teachers run this step, and which count for which image.

    ``bind`` comes first; the module that owns the teachers calls it once.
    """

    normalize: Normalize = "image"
    by_default = False  # nobody chose ``normalize``: the training module may, see ``weigh``

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def bind(self, names: Sequence[str]) -> None:
        """Tell the dropper its teachers. Their order does not matter to the draws."""
        self.names = tuple(names)

    def select(self, step: int) -> tuple[str, ...]:
        """The teachers to run at a training step, alike on every rank; at least one."""
        return self.names

    def keep(
        self,
        losses: Tensor,
        positions: Tensor,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Which teacher counts for which image.

        Args:
            losses: ``(T, B)`` of the teachers that ran; detached here.
            positions: int64 ``(B,)`` of the images in the global order, the key of the draws.
            epoch: the other key.
            names: the T teachers of the rows; None for all, in the order of ``bind``.

        Returns:
            ``(T, B)`` float32 of 0 and 1, at least one 1 per image; all 1 in eval mode, since
            nothing is ever dropped in validation.
        """
        return torch.ones_like(losses, dtype=torch.float32)


class NoDropping(TeacherDropper):
    """Every teacher runs and counts for every image that is its.

    Args:
        normalize: see ``weigh``; null is ``image``, and ``teacher`` where ranks run different
            teachers or images belong to some of them, which is the same where every teacher sees
            as many images.
    """

    def __init__(self, normalize: Normalize | None = None) -> None:
        super().__init__()
        self.by_default = normalize is None
        self.normalize = _checked(normalize or "image")


class HardestKept(TeacherDropper):
    """UNIC's: keep an image's hardest teacher, drop each other one with probability ``p``.

    Args:
        p: probability of dropping.
        normalize: ``batch`` as the published code, over all ranks; ``image`` as the paper says;
            ``teacher`` for data of single teachers.
        seed: of the draws, which are keyed by (seed, epoch, position, teacher).
    """

    def __init__(self, p: float = 0.5, normalize: Normalize = "batch", seed: int = 0) -> None:
        super().__init__()
        _check_probability(p)
        self.p = p
        self.normalize = _checked(normalize)
        self.seed = seed

    def keep(
        self,
        losses: Tensor,
        positions: Tensor,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """See ``TeacherDropper``."""
        if not self.training:
            return super().keep(losses, positions, epoch, names)
        rows = self.names if names is None else tuple(names)
        if len(rows) != losses.shape[0]:
            raise ValueError(
                f"losses have {losses.shape[0]} rows for the {len(rows)} teachers "
                f"{', '.join(rows)}: pass the names of the rows"
            )
        order = sorted(self.names)
        draws = [hash_uniform(self.seed, epoch, positions, order.index(name)) for name in rows]
        return hardest_kept(losses, torch.stack(draws), self.p)


class RandomTeachers(TeacherDropper):
    """Whole teachers are left out for a whole step, before they are run.

    Args:
        p: probability of leaving a teacher out; one always stays.
        seed: of the draws, which are keyed by (seed, step, teacher) and so alike on every rank.
        normalize: see ``weigh``; null as for ``NoDropping``.
    """

    def __init__(self, p: float = 0.5, seed: int = 0, normalize: Normalize | None = None) -> None:
        super().__init__()
        _check_probability(p)
        self.by_default = normalize is None
        self.normalize = _checked(normalize or "image")
        self.p = p
        self.seed = seed

    def select(self, step: int) -> tuple[str, ...]:
        """See ``TeacherDropper``; in the order of ``bind``."""
        if not self.training:
            return self.names
        draws = {
            name: hash_unit(self.seed, 0, step, _TEACHER_STREAM + index)
            for index, name in enumerate(sorted(self.names))
        }
        luckiest = max(draws, key=draws.__getitem__)
        return tuple(n for n in self.names if draws[n] >= self.p or n == luckiest)


def _checked(normalize: Normalize) -> Normalize:
    if normalize not in get_args(Normalize):
        raise unknown_name("normalize", normalize, get_args(Normalize))
    return normalize


def _check_probability(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a probability in [0, 1], received {p}")
