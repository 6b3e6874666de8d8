"""A linear probe by SGD, for sets too large for L-BFGS: all learning rates in one pass.

The protocol of DINOv2 (Oquab et al., arXiv 2304.07193, appendix B.3): linear layers for a grid of
learning rates are trained side by side on the same batches, and one is chosen on validation images.
The layers share every product: L of them are one matrix of L·K columns.

Shapes: M rows, D width, K classes, L learning rates, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEARNING_RATES = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    *(1e-2, 2e-2, 5e-2, 0.1),
)
# Learning rates are meant for a batch of so many, and grow with it.
_REFERENCE_BATCH = 256
_ROWS = 4096


@dataclass(frozen=True)
class SgdSettings:
    """How the layers are trained.

    Attributes:
        learning_rates: the grid, for a batch of 256; scaled by batch_size / 256.
        epochs: passes over the rows; the rate falls to 0 along a cosine.
        batch_size: B.
        momentum: of SGD.
        weight_decay: times the weights, added to their gradient; the bias has none.
        seed: of the order of rows.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: int = 10
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(
                f"learning rates must be above 0, at least one, received {self.learning_rates}"
            )
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                "epochs and batch_size must be at least 1, received "
                f"{self.epochs} and {self.batch_size}"
            )
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                "momentum must be in [0, 1) and weight_decay at least 0, received "
                f"{self.momentum} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class LinearLayers:
    """L layers over standardised features: ``logits = ((x − mean)/std) · weight + bias``.

    Attributes:
        weight: float32 ``(D, L, K)``.
        bias: float32 ``(L, K)``.
        mean: float32 ``(D,)`` of the rows they were trained on.
        std: float32 ``(D,)``, 1 for a constant feature.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, rows: Tensor) -> Iterator[Tensor]:
        """``(B, L, K)`` of some rows at a time, on the CPU."""
        _, count, classes = self.weight.shape
        for part in torch.split(rows, _ROWS):
            x = (part.to(self.mean.device, torch.float32) - self.mean) / self.std
            yield (x @ self.weight.flatten(1) + self.bias.flatten()).view(-1, count, classes).cpu()


def train_layers(
    x: Tensor,
    y: Tensor,
    classes: int,
    settings: SgdSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LinearLayers:
    """Train one layer for every learning rate, all at once; weights start at 0.

    The loss is the mean cross-entropy of a batch, or for several labels an image the mean over
    images of the sum over classes of the binary one.

    Args:
        x: ``(M, D)``.
        y: int64 ``(M,)`` in [0, K), or ``(M, K)`` of 0 and 1.
        classes: K.
        settings: see there.
        device: where to train.
        progress: called with (step, steps).

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    if x.ndim != 2 or len(y) != len(x) or not len(x):
        raise ValueError(
            "x and y must be (M, D) and (M,) or (M, K), M > 0, received "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    mean, std = moments(x)
    mean, std = mean.to(device), std.to(device)
    rates = torch.tensor(settings.learning_rates, dtype=torch.float32, device=device)
    rates = rates * (settings.batch_size / _REFERENCE_BATCH)
    weight = torch.zeros(x.shape[1], len(rates), classes, device=device)
    bias = torch.zeros(len(rates), classes, device=device)
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = math.ceil(len(x) / settings.batch_size)
    total = settings.epochs * batches
    step = 0
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        for _ in range(settings.epochs):
            order = torch.randperm(len(x), generator=generator)
            for some in torch.split(order, settings.batch_size):
                rows = (x[some].to(device, torch.float32) - mean) / std
                logits = (rows @ weight.flatten(1) + bias.flatten()).view(len(some), *bias.shape)
                error = _error(logits, y[some].to(device)) / len(some)
                gradients = (
                    (rows.T @ error.flatten(1)).view_as(weight) + settings.weight_decay * weight,
                    error.sum(dim=0),
                )
                rate = rates * (0.5 * (1 + math.cos(math.pi * step / total)))
                for value, velocity, gradient in zip((weight, bias), speed, gradients, strict=True):
                    velocity.mul_(settings.momentum).add_(gradient)
                    value.sub_(rate[:, None] * velocity)
                step += 1
                if progress is not None:
                    progress(step, total)
    return LinearLayers(weight, bias, mean, std)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature, float32 ``(D,)`` out of float64 sums.

    Raises:
        ValueError: a value that is not finite.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for part in torch.split(x, _ROWS):
        total += part.to("cpu", torch.float64).sum(dim=0)
    mean = total / len(x)
    squares = torch.zeros_like(total)
    for part in torch.split(x, _ROWS):
        squares += (part.to("cpu", torch.float64) - mean).square().sum(dim=0)
    std = (squares / len(x)).sqrt()
    if not bool(torch.isfinite(std).all()):
        raise ValueError("the features of the train split must be finite, received NaN or infinity")
    # A constant feature's deviation is rounding noise, and would be blown up to unit size.
    noise = 10 * torch.finfo(torch.float32).eps * mean.abs()
    std = torch.where(std <= noise, 1.0, std)
    return mean.to(torch.float32), std.to(torch.float32)


def _error(logits: Tensor, y: Tensor) -> Tensor:
    """Gradient of the summed loss in the logits ``(B, L, K)``."""
    if y.ndim == 2:
        return logits.sigmoid_() - y[:, None, :].to(logits.dtype)
    error = logits.softmax(dim=2)
    index = y[:, None, None].expand(-1, logits.shape[1], 1)
    return error.scatter_add_(2, index, torch.full_like(index, -1, dtype=error.dtype))
