"""What the batches of an optimiser step changed beside the parameters, kept until it is taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multikd.normalizers import FeatureNormalizer

# Teachers and their anchors do not change, and the average of the student only after a step.
# Held-out batches of a skipped step stay taken.
_NOT_OURS = ("teachers.", "average.", "anchors.", "held_out_taken")


class StepUndo:
    """Copies of the buffers that a batch may change: statistics of normalisers, balancers, norms.

    On the device and without a synchronisation; the copies are made once and written over.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._normalizers: list[FeatureNormalizer] = []

    @torch.no_grad()
    def remember(self, module: nn.Module) -> None:
        """Keep the buffers as they are now."""
        if not self._kept:
            self._kept = [
                (buffer, buffer.detach().clone())
                for name, buffer in module.named_buffers()
                if not name.startswith(_NOT_OURS)
            ]
            self._normalizers = [m for m in module.modules() if isinstance(m, FeatureNormalizer)]
            return
        for now, kept in self._kept:
            kept.copy_(now)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what was remembered."""
        for now, kept in self._kept:
            now.copy_(kept)
        for normalizer in self._normalizers:
            normalizer.state_restored()
