"""What every target normaliser shares: buffers, checks, moments over ranks, and the factory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from multikd.distributed import combine_moments
from multikd.functional import batch_moments, full_precision
from multikd.types import TOKEN_TYPES, TokenFeatures, TokenType, Widths

EPS = 1e-6


class KeepsDtype(nn.Module):
    """Parameters and buffers move between devices but are never cast.

    ``.to(bfloat16)``, ``.half()`` and Lightning's ``bf16-true`` leave running statistics as exact
    as they were: in bfloat16 a counter stops at 256, and a moving average stops at once. Only this
    module's own; its children go through their own ``_apply``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # From the original values: a round trip would have rounded them already.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(keep, recurse=False)  # type: ignore[no-untyped-call]
        return self


class Moments(NamedTuple):
    """Of one token type over all ranks, each ``(D,)``: observations, mean, centred squares."""

    n: Tensor
    mean: Tensor
    m2: Tensor

    def known_mean(self) -> Tensor:
        """The mean, float32; NaN where there was nothing to take it of."""
        return torch.where(self.n > 0, self.mean, torch.nan).float()

    def std(self, fallback: Tensor) -> Tensor:
        """Unbiased deviation, float32; ``fallback`` where one observation tells none."""
        std = (self.m2 / (self.n - 1.0).clamp(min=1.0)).sqrt().float()
        return torch.where(self.n > 1.0, std, fallback)


class FeatureNormalizer(KeepsDtype):
    """Base, and the normaliser that changes nothing but the dtype.

    Buffers keep their dtype for good (``.to(bfloat16)`` moves but does not round them): float32
    ``<token>_mean (D,)`` and ``<token>_std (D,)`` of each token type that the teacher has.

    Args:
        widths: of the teacher.

    Attributes:
        raw: token types that stay as the teacher gives them, for losses that read them so.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        self.raw: tuple[TokenType, ...] = ()
        for token in TOKEN_TYPES:
            width = getattr(widths, token)
            if width is not None:
                # The dtype is spelt out: under bf16-true the default one is bfloat16.
                self.register_buffer(f"{token}_mean", torch.zeros(width, dtype=torch.float32))
                self.register_buffer(f"{token}_std", torch.ones(width, dtype=torch.float32))

    def state_restored(self) -> None:
        """Called after buffers were set from outside (loaded, put back): forget what they said."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.state_restored()

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """Standardise with the current statistics.

        Args:
            features: raw features of the teacher, any float dtype.

        Returns:
            the same token types in float32 (float64 stays); grid and logits as they were.

        Raises:
            ValueError: for widths that are not the teacher's.
        """
        return self._map(features, lambda token, x: x)

    def inverse(self, features: TokenFeatures) -> TokenFeatures:
        """Standardised features back in the teacher's own units (running statistics)."""

        def undo(token: TokenType, x: Tensor) -> Tensor:
            scale, shift = self.affine(token)
            return x * scale + shift

        return self._map(features, undo)

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """(scale, shift), each ``(D,)`` float32, with ``inverse(s) = s · scale + shift``.

        A normaliser that rotates gives a matrix ``(D, D)`` for the scale: ``s @ scale + shift``.
        """
        return torch.ones_like(self._std(token)), torch.zeros_like(self._mean(token))

    def update(self, features: TokenFeatures) -> None:
        """Learn from one batch of raw features; does nothing in eval mode.

        All ranks must call it for the same steps, with the same token types.
        """

    def set_total_steps(self, steps: int) -> None:
        """How many updates the run will make; only schedules need it."""

    def rescale_updates(self, factor: float) -> None:
        """A run goes on with ``1/factor`` times the images an update; only schedules need it."""

    def _standardize(self, features: TokenFeatures) -> TokenFeatures:
        def standardize(token: TokenType, x: Tensor) -> Tensor:
            scale, shift = self.affine(token)
            return (x - shift) / scale

        return self._map(features, standardize)

    def _map(
        self, features: TokenFeatures, function: Callable[[TokenType, Tensor], Tensor]
    ) -> TokenFeatures:
        def of(token: TokenType) -> Tensor | None:
            x = self._checked(features, token)
            return x if x is None or token in self.raw else function(token, x)

        return TokenFeatures(
            summary=of("summary"), patches=of("patches"), grid=features.grid, logits=features.logits
        )

    def _checked(self, features: TokenFeatures, token: TokenType) -> Tensor | None:
        x: Tensor | None = getattr(features, token)
        if x is None:
            return None
        expected = getattr(self.widths, token)
        if x.shape[-1] != expected:
            raise ValueError(
                f"this normaliser was built for a {token} width of {expected}, received "
                f"{tuple(x.shape)}: build it from the widths of this teacher"
            )
        return full_precision(x)

    def _moments(self, features: TokenFeatures) -> dict[TokenType, Moments]:
        """Moments over all ranks, both token types in one collective."""
        tokens: list[TokenType] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for token in TOKEN_TYPES:
            x = self._checked(features, token)
            if x is not None and token not in self.raw:
                count, mean, m2 = batch_moments(x.detach(), tuple(range(x.ndim - 1)))
                tokens.append(token)
                parts.append((count.expand_as(mean), mean, m2))
        if not parts:
            return {}
        combined = combine_moments(*(torch.cat(row) for row in zip(*parts, strict=True)))
        sizes = [part[1].shape[0] for part in parts]
        columns = [torch.split(c, sizes) for c in combined]
        return {token: Moments(*(c[i] for c in columns)) for i, token in enumerate(tokens)}

    def _mean(self, token: TokenType) -> Tensor:
        return self._buffer(token, "mean")

    def _std(self, token: TokenType) -> Tensor:
        return self._buffer(token, "std")

    def _buffer(self, token: TokenType, kind: str) -> Tensor:
        if getattr(self.widths, token) is None:
            raise ValueError(f"this teacher has no {token}: its widths are {self.widths}")
        return cast(Tensor, getattr(self, f"{token}_{kind}"))


class NormalizerFactory(ABC):
    """Makes the normaliser of one teacher from its widths."""

    @abstractmethod
    def build(self, widths: Widths) -> FeatureNormalizer:
        """A normaliser for a teacher of these widths, that has learnt nothing."""

    def for_teacher(self, name: str, widths: Widths) -> FeatureNormalizer:
        """The normaliser of the teacher of this name, with what is known of it before training.

        Raises:
            ValueError: a file of statistics is named that does not hold this teacher.
        """
        return self.build(widths)


@dataclass
class NoNormalizers(NormalizerFactory):
    """Targets as the teachers give them, in float32."""

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return FeatureNormalizer(widths)
