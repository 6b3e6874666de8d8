"""An exponential moving average of the student: the weights that are usually exported.

Lightning's own averaging callback copies the whole LightningModule, frozen teachers included; this
one copies the student alone, and lives in the module so that its weights are in the checkpoint.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from multikd.students import StudentEncoder


class StudentAverage(nn.Module):
    """``average ← decay·average + (1 − decay)·student`` after every optimiser step.

    The decay is warmed up, ``min(decay, (1 + n) / (10 + n))`` at the n-th update, so that a short
    run does not end on its random start. Buffers (batch statistics) are copied, not averaged.
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

    def train(self, mode: bool = True) -> StudentAverage:
        """Stay in evaluation mode: the average is never trained."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: StudentEncoder) -> None:
        """Move the average toward ``student``, without a host synchronisation."""
        self.updates += 1
        n = self.updates.to(torch.float32)
        rate = 1.0 - torch.clamp((1.0 + n) / (10.0 + n), max=self.decay)
        averages = [p for p in self.student.parameters() if p.is_floating_point()]
        currents = [p.detach() for p in student.parameters() if p.is_floating_point()]
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, rate.to(average.dtype))
        for kept, now in zip(self.student.buffers(), student.buffers(), strict=True):
            kept.copy_(now)
