"""Reductions over ranks: a no-op in a single process, exact and without gradients in many.

Every function must be called by all ranks, with tensors of equal shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """True inside an initialised process group of any size."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks; 1 outside a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this rank; 0 outside a process group."""
    return dist.get_rank() if is_distributed() else 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if is_distributed():
        dist.barrier()


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor of the same shape and dtype, without a gradient."""
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        dist.all_reduce(reduced, op=dist.ReduceOp.SUM)
    return reduced


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks of a floating tensor, as a new tensor without a gradient."""
    return all_reduce_sum(tensor) / world_size()


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> Tensor:
    """Largest over ranks, element by element, as a new tensor without a gradient."""
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate ``(B, …)`` of every rank along dim 0, in rank order: ``(world · B, …)``.

    All ranks must bring the same number of rows. No gradient.
    """
    rows = tensor.detach().contiguous()
    if not is_distributed():
        return rows.clone()
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    # Its name from torch 2.14 on, which warns of the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on these rows.
        total = all_reduce_sum(gradient)
        count = len(total) // world_size()
        return total[rank() * count : (rank() + 1) * count]


def gather_rows(tensor: Tensor) -> Tensor:
    """``all_gather_rows`` with its gradient: the sum of what the losses of all ranks say of them.

    DDP's mean over ranks of the parameters' gradients is then that of the ranks' mean loss, as in
    one process. All ranks must go backward through it.
    """
    if not is_distributed():
        return tensor
    gathered: Tensor = _GatherRows.apply(tensor)
    return gathered


def all_gather_object(value: T) -> list[T]:
    """One picklable value per rank, in rank order."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block at whose end every rank stops when one of them has failed, with its reason.

    Ranks may do different work in it; every rank must come here.

    Raises:
        Exception: this rank's own, or a ValueError with another's sentence.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others would wait for this rank
        failed = error
    reason = None if failed is None else f"{failed} (on rank {rank()}; all of them stop)"
    reasons = [found for found in all_gather_object(reason) if found is not None]
    if failed is not None:
        raise failed
    if reasons:
        raise ValueError(reasons[0])


def combine_moments(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the union of all ranks' observations, from the moments of each.

    Chan, Golub & LeVeque 1979: with ``mean`` the weighted mean of the ranks' means,
    ``m2 = Σ_r m2_r + count_r · (mean_r − mean)²``. Everything is centred, so a mean that is large
    against the deviation costs no digits, as ``Σx² − (Σx)²/n`` would. One small collective.

    Args:
        count: observations of this rank, ``(D,)`` or ``()``; 0 is allowed.
        mean: their mean, ``(D,)``.
        m2: their sum of squared deviations from that mean, ``(D,)``.

    Returns:
        (count, mean, m2) of all ranks, each ``(D,)``, in the dtype of ``mean``, equal on every
        rank. Where no rank has observations they are 0.
    """
    packed = torch.stack([count.to(mean.dtype).expand_as(mean), mean, m2])
    if world_size() == 1:
        total, grand_mean, grand_m2 = packed.detach().clone().unbind(0)
        return total, grand_mean, grand_m2
    counts, means, m2s = all_gather_rows(packed.unsqueeze(0)).unbind(1)
    total = counts.sum(0)
    divisor = total.clamp(min=1.0)
    # From a rank's mean, not from 0: keeps the digits of the small differences between ranks.
    offset = (counts * (means - means[0])).sum(0) / divisor
    grand_mean = means[0] + offset
    grand_m2 = (m2s + counts * (means - grand_mean).square()).sum(0)
    return total, grand_mean, grand_m2


def combine_covariance(
    count: Tensor, mean: Tensor, scatter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``combine_moments``, with the whole matrix of centred products.

    ``scatter = Σ_r scatter_r + count_r · (mean_r − mean)(mean_r − mean)ᵀ``. Two collectives: the
    means are gathered, the matrices summed.

    Args:
        count: observations of this rank, ``()``; 0 is allowed.
        mean: their mean, ``(D,)``.
        scatter: ``Σ (x − mean)(x − mean)ᵀ``, ``(D, D)``.

    Returns:
        (count ``()``, mean, scatter) of all ranks, equal on every rank.
    """
    if world_size() == 1:
        return count.detach().clone(), mean.detach().clone(), scatter.detach().clone()
    gathered = all_gather_rows(torch.cat([count.view(1).to(mean), mean])[None])
    counts, means = gathered[:, :1], gathered[:, 1:]
    total = counts.sum()
    offset = (counts * (means - means[0])).sum(0) / total.clamp(min=1.0)
    grand_mean = means[0] + offset
    own = torch.addr(scatter, count.to(mean) * (mean - grand_mean), mean - grand_mean)
    return total, grand_mean, all_reduce_sum(own)


@torch.no_grad()
def broadcast_first(tensor: Tensor) -> Tensor:
    """The first rank's tensor on every rank, as a new tensor; shapes must be equal."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if is_distributed():
        dist.broadcast(copy, src=0)
    return copy
