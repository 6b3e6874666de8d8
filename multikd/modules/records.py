"""What one step computed, as device tensors: for logs, guards and diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class StepRecord:
    """What the step on one view computed, kept on the device.

    Attributes:
        names: the T teachers that ran.
        losses: ``(T, B)`` float32, detached.
        keep: ``(T, B)`` which teacher counted for which image.
        lambdas: ``(T,)`` weights of the balancer.
        total: the loss that was differentiated, detached.
        terms: name → ``(B,)`` of the terms beside the teachers'.
        keys: the B sample keys.
        norms: name → norm of predictions and targets, for logging.
        images: teacher → images of the batch that were its, the others having loss 0; None where
            all were.
    """

    names: tuple[str, ...]
    losses: Tensor
    keep: Tensor
    lambdas: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    keys: list[str]
    norms: dict[str, Tensor]
    images: dict[str, int] | None = None

    def mean(self, values: Tensor) -> dict[str, Tensor]:
        """Teacher → mean of its row of ``(T, B)`` over its own images, 0 without any."""
        if self.images is None:
            return dict(zip(self.names, values.mean(dim=1), strict=True))
        sums = zip(self.names, values.sum(dim=1), strict=True)
        return {name: total / max(self.images[name], 1) for name, total in sums}

    def values(self) -> dict[str, Tensor]:
        """What is logged each step: every loss, share, weight, term and norm, without a sync."""
        per_teacher, kept = self.mean(self.losses), self.mean(self.keep)
        values: dict[str, Tensor] = {}
        for index, name in enumerate(self.names):
            if self.images is not None and not self.images[name]:
                continue
            values[f"train/loss/{name}"] = per_teacher[name]
            values[f"train/kept/{name}"] = kept[name]
            values[f"train/weight/{name}"] = self.lambdas[index]
        for name, term in self.terms.items():
            values[f"train/term/{name}"] = term.mean()
        for name, norm in self.norms.items():
            values[f"train/norm/{name}"] = norm
        return values


def mean_norm(*tensors: Tensor | None) -> Tensor:
    """Mean norm of the vectors of the first tensor that is there; 0 if none is."""
    for tensor in tensors:
        if tensor is not None:
            norm: Tensor = tensor.detach().float().norm(dim=-1).mean()
            return norm
    return torch.zeros(())


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of the gradients at hand, as a device scalar; under FSDP2 over all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    # Of sharded gradients the norm is sharded too; all ranks ask at the same steps.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
