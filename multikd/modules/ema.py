"""An exponential moving average of the student: the weights that are usually exported.

Lightning's own averaging callback copies the whole LightningModule, frozen teachers included; this
one copies the student alone, and lives in the module so that its weights are in the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from multikd.modules.sharding import local
from multikd.students import StudentEncoder


class StudentAverage(nn.Module):
    """``average ← decay·average + (1 − decay)·student`` after every optimiser step.

    The decay is warmed up, ``min(decay, (1 + n) / (10 + n))`` at the n-th update, so that a short
    run does not end on its random start. Buffers (batch statistics) are copied, not averaged.
    Float32 also under ``bf16-true``: the steps of an average are too small for bfloat16, in which
    it would stand still.
    """

    updates: Tensor

    def __init__(self, student: StudentEncoder, decay: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(
                f"ema_decay must lie strictly between 0 and 1, received {decay}; use null for none"
            )
        self.decay = decay
        self.student: StudentEncoder = copy.deepcopy(student)
        self.student.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StudentAverage:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> StudentAverage:
        """Stay in evaluation mode: the average is never trained."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: StudentEncoder) -> None:
        """Move the average toward ``student``, without a host synchronisation."""
        self.updates += 1
        n = self.updates.to(torch.float32)
        rate = 1.0 - torch.clamp((1.0 + n) / (10.0 + n), max=self.decay)
        averages = [local(p) for p in self.student.parameters() if p.is_floating_point()]
        currents = [local(p.detach()) for p in student.parameters() if p.is_floating_point()]
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current.to(average.dtype), rate.to(average.dtype))
        for kept, now in zip(self.student.buffers(), student.buffers(), strict=True):
            kept.copy_(now)
