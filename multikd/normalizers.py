"""Target normalisers: one teacher's features, standardised per token type.

Statistics are over images (summary) or images and patches (patches), on the teacher's own grid,
over all ranks, and live in float32 buffers. A step calls ``forward`` first and ``update`` after
it. The factories at the end are what YAML names.
"""

from __future__ import annotations

import math
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

    def std(self, fallback: Tensor) -> Tensor:
        """Unbiased deviation, float32; ``fallback`` where one observation tells none."""
        std = (self.m2 / (self.n - 1.0).clamp(min=1.0)).sqrt().float()
        return torch.where(self.n > 1.0, std, fallback)


class FeatureNormalizer(KeepsDtype):
    """Base, and the normaliser that changes nothing but the dtype.

    Buffers, all float32 and float32 for good (``.to(bfloat16)`` moves but does not round them):
    ``<token>_mean (D,)`` and ``<token>_std (D,)`` of each token type that the teacher has.

    Args:
        widths: of the teacher.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        for token in TOKEN_TYPES:
            width = getattr(widths, token)
            if width is not None:
                # The dtype is spelt out: under bf16-true the default one is bfloat16.
                self.register_buffer(f"{token}_mean", torch.zeros(width, dtype=torch.float32))
                self.register_buffer(f"{token}_std", torch.ones(width, dtype=torch.float32))

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
        """(scale, shift), each ``(D,)`` float32, with ``inverse(s) = s · scale + shift``."""
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
            return None if x is None else function(token, x)

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
            if x is not None:
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


class EMAStandardizer(FeatureNormalizer):
    """UNIC's (arXiv 2408.05088): ``(y − μ)/(σ + 1e-6)`` with exponential moving μ and σ.

    ``μ ← (1−m)μ + m μ_B``, the same for σ with ``σ_B + 1e-6``; m falls along a half cosine from 1
    at the first update toward ``momentum_end`` after ``total_steps``, and stays there. Starts at
    μ = 0, σ = 1. A dimension whose batch statistics are not finite is left as it was.
    """

    updates: Tensor

    def __init__(self, widths: Widths, momentum_end: float, total_steps: int | None) -> None:
        super().__init__(widths)
        self.momentum_end = momentum_end
        self.total_steps = total_steps
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``FeatureNormalizer``."""
        return self._standardize(features)

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """See ``FeatureNormalizer``."""
        return self._std(token) + EPS, self._mean(token)

    def momentum(self) -> Tensor:
        """m of the next update, float32 ``()``."""
        if self.total_steps is None:
            raise ValueError(
                "the momentum of this normaliser follows the length of the run, which is not "
                "known: set trainer.max_epochs or max_steps, or its total_steps"
            )
        progress = (self.updates.float() / self.total_steps).clamp(max=1.0)
        # From 1 downwards, so that the first update is exactly 1.
        return 1.0 - (1.0 - self.momentum_end) * 0.5 * (1.0 - torch.cos(math.pi * progress))

    @torch.no_grad()
    def update(self, features: TokenFeatures) -> None:
        """See ``FeatureNormalizer``."""
        if not self.training:
            return
        momentum = self.momentum()
        for token, moments in self._moments(features).items():
            std = self._std(token)
            _move(self._mean(token), moments.mean.float(), momentum)
            _move(std, moments.std(fallback=std - EPS) + EPS, momentum)
        self.updates += 1

    def rescale_updates(self, factor: float) -> None:
        """See ``FeatureNormalizer``; a length that the factory has set is in updates and stays."""
        if factor != 1.0:
            self.updates.copy_((self.updates.double() * factor).round().long())

    def set_total_steps(self, steps: int) -> None:
        """Length of the momentum schedule, unless the factory has set one."""
        if self.total_steps is None:
            self.total_steps = steps


class BatchStandardizer(FeatureNormalizer):
    """DUNE's (arXiv 2503.14405): batch statistics in training, running ones in evaluation.

    Training: ``(y − μ_B)/max(σ_B, 1e-3)`` over all ranks. Evaluation, ``inverse`` and ``affine``
    use moving averages of μ_B and σ_B with a fixed momentum.
    """

    FLOOR = 1e-3

    def __init__(self, widths: Widths, momentum: float) -> None:
        super().__init__(widths)
        self.momentum = momentum

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``FeatureNormalizer``."""
        if not self.training:
            return self._standardize(features)
        moments = self._moments(features)

        def standardize(token: TokenType, x: Tensor) -> Tensor:
            std = moments[token].std(fallback=self._std(token))
            return (x - moments[token].mean.float()) / std.clamp(min=self.FLOOR)

        return self._map(features, standardize)

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """See ``FeatureNormalizer``."""
        return self._std(token).clamp(min=self.FLOOR), self._mean(token)

    @torch.no_grad()
    def update(self, features: TokenFeatures) -> None:
        """See ``FeatureNormalizer``."""
        if not self.training:
            return
        for token, moments in self._moments(features).items():
            std, mean = self._std(token), self._mean(token)
            momentum = std.new_full((), self.momentum)
            _move(mean, moments.mean.float(), momentum)
            _move(std, moments.std(fallback=std), momentum)


class FixedStandardizer(FeatureNormalizer):
    """Exact statistics of the first ``images`` images, then frozen: ``(y − μ)/max(σ, 1e-6)``.

    Until then the statistics of the images so far; before the first, nothing is changed. The batch
    that reaches ``images`` counts whole. While it measures, each update waits for the device once.
    """

    images_seen: Tensor

    def __init__(self, widths: Widths, images: int) -> None:
        super().__init__(widths)
        self.images = images
        self._frozen = False
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        for token in TOKEN_TYPES:
            width = getattr(widths, token)
            if width is not None:
                # Means are kept as origin + offset: the offset is small, so float32 adds up many
                # batches without losing the digits that a large mean would cost.
                for kind in ("origin", "offset", "m2"):
                    zeros = torch.zeros(width, dtype=torch.float32)
                    self.register_buffer(f"{token}_{kind}", zeros)
                self.register_buffer(f"{token}_count", torch.zeros((), dtype=torch.int64))

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``FeatureNormalizer``."""
        return self._standardize(features)

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """See ``FeatureNormalizer``."""
        return self._std(token).clamp(min=EPS), self._mean(token)

    @torch.no_grad()
    def update(self, features: TokenFeatures) -> None:
        """See ``FeatureNormalizer``."""
        if not self.training or self._frozen:
            return
        # images_seen is the sum over ranks, so all ranks stop at the same step.
        self._frozen = int(self.images_seen) >= self.images
        if self._frozen:
            return
        # Patches alone: as many observations an image as there are patches.
        per_image = (
            1
            if features.summary is not None or features.patches is None
            else (features.patches.shape[1])
        )
        counts = [self._accumulate(t, m) for t, m in self._moments(features).items()]
        if counts:
            self.images_seen += counts[0] // per_image

    def _accumulate(self, token: TokenType, moments: Moments) -> Tensor:
        """Chan's formula for two sets, in the precision of ``moments``; what it counted ``()``."""
        origin, offset = self._buffer(token, "origin"), self._buffer(token, "offset")
        m2, count = self._buffer(token, "m2"), self._buffer(token, "count")
        finite = torch.isfinite(moments.mean + moments.m2).all()
        # A batch with a NaN counts as empty: nothing ever leaves these sums again.
        batch = Moments(*(torch.where(finite, column, 0.0) for column in moments))
        before = count.to(batch.n.dtype)
        total = before + batch.n
        origin.copy_(torch.where(count == 0, batch.mean.float(), origin))
        difference = batch.mean - origin - offset
        share = batch.n / total.clamp(min=1.0)
        m2 += batch.m2 + difference.square() * before * share
        offset += difference * share
        self._mean(token).copy_(origin.to(batch.mean.dtype) + offset)
        std = self._std(token)
        std.copy_(Moments(total, batch.mean, m2).std(fallback=std))
        counted = batch.n[0].long()
        count += counted
        return counted

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen = False  # the next update looks at what was loaded


class NormalizerFactory(ABC):
    """Makes the normaliser of one teacher from its widths."""

    @abstractmethod
    def build(self, widths: Widths) -> FeatureNormalizer:
        """A normaliser for a teacher of these widths."""


@dataclass
class EMAStandardizers(NormalizerFactory):
    """UNIC's running standardiser.

    Args:
        momentum_end: where the cosine of the momentum ends; the published value is 0.001.
        total_steps: length of that cosine in updates; None takes the length of the run.
    """

    momentum_end: float = 0.001
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum_end <= 1.0:
            raise ValueError(f"momentum_end must be in [0, 1], received {self.momentum_end}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more, received {self.total_steps}")

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return EMAStandardizer(widths, self.momentum_end, self.total_steps)


@dataclass
class BatchStandardizers(NormalizerFactory):
    """DUNE's batch standardiser.

    Args:
        momentum: of the running statistics that evaluation uses.
    """

    momentum: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"momentum must be in (0, 1], received {self.momentum}")

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return BatchStandardizer(widths, self.momentum)


@dataclass
class FixedStandardizers(NormalizerFactory):
    """Statistics measured once and kept.

    Args:
        images: how many images (of all ranks) are measured.
    """

    images: int = 8192

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"images must be 2 or more, received {self.images}")

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return FixedStandardizer(widths, self.images)


@dataclass
class NoNormalizers(NormalizerFactory):
    """Targets as the teachers give them, in float32."""

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return FeatureNormalizer(widths)


def _move(buffer: Tensor, value: Tensor, momentum: Tensor) -> None:
    """``buffer ← (1 − m) · buffer + m · value`` in place, where ``value`` is finite."""
    buffer.copy_(torch.where(torch.isfinite(value), torch.lerp(buffer, value, momentum), buffer))
