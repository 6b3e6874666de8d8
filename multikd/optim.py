"""Parameter groups, learning-rate scaling, and warm-up followed by a cosine.

Source of the settings: UNIC (arXiv 2408.05088) and DUNE (arXiv 2503.14405), which share them with
DINO and MAE: no weight decay on biases and 1-d parameters, a linear warm-up, half a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Settings of Adam that exclude the fused kernel.
_OTHER_WAYS = ("foreach", "capturable", "differentiable")

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions, and biases with 1-d parameters (no decay).

    Parameters that need no gradient are left out. The second group carries ``weight_decay = 0``;
    the first takes the optimiser's own setting.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        (plain if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    groups: list[dict[str, Any]] = []
    if decay:
        groups.append({"params": decay})
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    if not groups:
        raise ValueError(
            "there is nothing to train: every parameter is frozen; "
            "give the student at least one trainable rung"
        )
    return groups


def fuse(optimizer: Optimizer) -> bool:
    """Let Adam and AdamW update all parameters in one kernel, unless told how to; whether they do.

    One pass over the weights in place of a dozen, and no host synchronisation to read the step's
    number. Not for sharded parameters (FSDP2), nor beside a gradient scaler (float16), which could
    not clip then.
    """
    if type(optimizer) not in (Adam, AdamW):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    plain = all(
        type(p) is nn.Parameter and p.is_floating_point() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )
    told = any(group.get(key) for group in optimizer.param_groups for key in _OTHER_WAYS) or any(
        group.get("fused") is not None for group in optimizer.param_groups
    )
    if not plain or told:
        return False
    optimizer.defaults["fused"] = True
    for group in optimizer.param_groups:
        group["fused"] = True
    return True


@dataclass
class WarmupCosine:
    """Linear warm-up from near zero, then half a cosine down to ``min_lr``; stepped every batch.

    Args:
        warmup_epochs: length of the warm-up in epochs (fractions allowed).
        warmup_share: its length as a share of the whole run instead (DUNE: 0.2).
        min_lr: the learning rate at the last step, not scaled with the batch.
    """

    warmup_epochs: float = 0.0
    warmup_share: float | None = None
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < float("inf"):
            raise ValueError(
                f"warmup_epochs must be 0 or more and finite, received {self.warmup_epochs}"
            )
        if self.warmup_share is not None and not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must lie in [0, 1), received {self.warmup_share}")
        if not 0 <= self.min_lr < float("inf"):
            raise ValueError(f"min_lr must be 0 or more and finite, received {self.min_lr}")

    def warmup_steps(self, total_steps: int, steps_per_epoch: float) -> int:
        """How many optimiser steps the warm-up takes."""
        if self.warmup_share is not None:
            return round(self.warmup_share * total_steps)
        if self.warmup_epochs == 0:
            return 0
        if not math.isfinite(steps_per_epoch):
            raise ValueError(
                "a warm-up given in epochs needs epochs of a known length: set warmup_share, or "
                "trainer.limit_train_batches"
            )
        return min(round(self.warmup_epochs * steps_per_epoch), max(total_steps - 1, 0))

    def build(self, optimizer: Optimizer, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """A scheduler for ``total_steps`` optimiser steps."""
        warmup = self.warmup_steps(total_steps, steps_per_epoch)
        factors = [
            warmup_cosine(warmup, total_steps, self.min_lr / max(float(group["lr"]), 1e-12))
            for group in optimizer.param_groups
        ]
        return LambdaLR(optimizer, factors)


def warmup_cosine(
    warmup_steps: int, total_steps: int, final_factor: float
) -> Callable[[int], float]:
    """The factor on the learning rate at a step: (k+1)/warm-up, then a cosine to the end.

    The first step trains with a factor above 0 (1/warm-up), so that no step is lost, and the last
    step of the run has ``final_factor``.
    """
    floor = min(final_factor, 1.0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return max((step + 1) / warmup_steps, floor)
        span = max(total_steps - warmup_steps - 1, 1)
        progress = min((step - warmup_steps) / span, 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def scale_learning_rate(optimizer: Optimizer, batch: int, reference: int | None) -> None:
    """Multiply every group's rate by ``batch / reference`` (the linear rule); None leaves it."""
    if reference is None:
        return
    if reference <= 0:
        raise ValueError(f"the reference batch must be positive, received {reference}")
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"]) * batch / reference
