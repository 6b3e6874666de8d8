"""Mean and std of an encoder's input, applied on the device in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

RGB = tuple[float, float, float]


def rgb(values: Sequence[float], what: str) -> RGB:
    """Three finite floats, or a ValueError that names ``what``."""
    try:
        red, green, blue = (float(value) for value in values)
        if not all(map(math.isfinite, (red, green, blue))):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        shown = str(values)[:80]
        raise ValueError(f"{what} must be three numbers (R, G, B), received {shown}") from error
    return (red, green, blue)


class Normalize(nn.Module):
    """``(images - mean) / std`` per channel, always computed in float32.

    The constants are rebuilt from Python numbers after every move, so that neither
    ``.bfloat16()`` (``bf16-true``) nor ``.to_empty()`` (meta device) can spoil them. They are in
    no state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._mean, self._std = rgb(mean, "mean"), rgb(std, "std")
        if min(self._std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, received {self._std}")
        self.register_buffer("mean", self._column(self._mean, "cpu"), persistent=False)
        self.register_buffer("std", self._column(self._std, "cpu"), persistent=False)

    @staticmethod
    def _column(values: RGB, device: torch.device | str) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.mean.device
        self.mean, self.std = self._column(self._mean, device), self._column(self._std, device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """``images``: float ``(B, 3, H, W)`` in [0, 1]; returns float32 of the same shape."""
        return (images.float() - self.mean) / self.std
