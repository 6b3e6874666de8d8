"""Faults of machines in one sentence: memory that is used up, ranks that are lost."""

from __future__ import annotations

import re

import lightning.pytorch as pl
import torch

from multikd.data.module import ShardDataModule
from multikd.errors import EXIT_AGAIN
from multikd.modules.distillation import DistillationModule


class OutOfMemoryError(RuntimeError):
    """Device or host memory is used up; the message names the settings to change."""


class LostRankError(RuntimeError):
    """Another rank died or hung; the run should be started again."""

    exit_code = EXIT_AGAIN


_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|DefaultCPUAllocator")
_DEVICE = re.compile(r"(CUDA|HIP|XPU|MPS)[^.]{0,30}out of memory", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker .*(Bus error|Killed|exited unexpectedly)", re.DOTALL)
_RANK = re.compile(
    r"Connection (closed|reset) by (remote )?peer|[Tt]imed out waiting|[Tt]imed out after"
    r"|Watchdog caught collective|NCCL (error|timeout)|Broken pipe|monitoredBarrier"
    r"|Socket Timeout|timeout caused pair closure|connection was aborted"
    r"|Gloo connectFullMesh failed"
)


def explained(
    error: BaseException, trainer: pl.Trainer, model: object, data: object
) -> RuntimeError | None:
    """What a user can do about a fault of the machine; None where it is none.

    ``error`` is looked through with all that it came of.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        text = str(one)
        if isinstance(one, torch.OutOfMemoryError) or _DEVICE.search(text):
            return OutOfMemoryError(_of_memory(trainer, model, data, "the device's memory"))
        if isinstance(one, MemoryError) or _HOST.search(text):
            return OutOfMemoryError(_of_memory(trainer, model, data, "the machine's memory"))
        if _WORKER.search(text):
            return OutOfMemoryError(
                "a worker of the loader was killed, most often for want of (shared) memory: lower "
                f"data.num_workers{_now(data, 'num_workers')} or data.prefetch_factor"
                f"{_now(data, 'prefetch_factor')}, or give the container more of /dev/shm"
            )
    if trainer.world_size > 1 and any(_is_of_ranks(one) for one in chain):
        reason = next(" ".join(str(one).split())[:200] for one in chain if _is_of_ranks(one))
        return LostRankError(
            f"rank {trainer.global_rank} of {trainer.world_size} stopped after step "
            f"{trainer.global_step}: another rank died or hung ({reason}); look at that one's own "
            "message, and start the same command again with --resume auto"
        )
    return None


def _is_of_ranks(error: BaseException) -> bool:
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or bool(_RANK.search(str(error)))


def _now(owner: object, name: str) -> str:
    value = getattr(owner, name, None)
    return "" if value is None else f" (now {value})"


def _of_memory(trainer: pl.Trainer, model: object, data: object, what: str) -> str:
    """The settings that help, most effective first, with their present values."""
    accumulate = trainer.accumulate_grad_batches
    advice = [
        f"halve data.batch_size{_now(data, 'batch_size')} and double "
        f"trainer.accumulate_grad_batches (now {accumulate}), which keeps the learning rate"
    ]
    if isinstance(model, DistillationModule):
        if not getattr(model.student, "grad_checkpointing", False):
            advice.append("set model.student.grad_checkpointing=true")
        if isinstance(data, ShardDataModule) and data.cache is None:
            advice.append("let teachers run once, into data.cache (with PrecomputeFeatures)")
    if trainer.precision == "32-true":
        advice.append("set trainer.precision=bf16-mixed")
    if getattr(data, "in_memory_bytes", None) is not None:
        advice.append("set data.in_memory=false")
    return (
        f"{what} is used up at step {trainer.global_step}: {'; or '.join(advice)}. "
        "The last checkpoint is as it was"
    )
