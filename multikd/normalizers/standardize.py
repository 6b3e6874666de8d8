"""Standardisers of single dimensions: UNIC's running one, DUNE's batch one, fixed statistics.

The factories at the end are what YAML names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.normalizers.base import EPS, FeatureNormalizer, Moments, NormalizerFactory
from multikd.normalizers.measured import Statistics, read_statistics
from multikd.types import TOKEN_TYPES, TokenFeatures, TokenType, Widths


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
        self._own_length = total_steps is not None
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
            _move(self._mean(token), moments.known_mean(), momentum)
            _move(std, moments.std(fallback=std - EPS) + EPS, momentum)
        self.updates += 1

    def rescale_updates(self, factor: float) -> None:
        """See ``FeatureNormalizer``; a length that the factory has set is in updates and stays."""
        if factor != 1.0 and not self._own_length:
            self.updates.copy_((self.updates.double() * factor).round().long())

    def set_total_steps(self, steps: int) -> None:
        """Length of the momentum schedule, unless the factory has set one."""
        if self.total_steps is None:
            self.total_steps = steps


class BatchStandardizer(FeatureNormalizer):
    """DUNE's (arXiv 2503.14405): batch statistics in training, running ones in evaluation.

    Training: ``(y − μ_B)/max(σ_B, 1e-3)`` over all ranks. Evaluation, ``inverse`` and ``affine``
    use moving averages of μ_B and σ_B with a fixed momentum. A dimension whose batch statistics are
    not finite takes the running ones: one broken image makes no target of the others NaN.
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
            mean = moments[token].mean.float()
            finite = torch.isfinite(mean) & torch.isfinite(std)
            mean = torch.where(finite, mean, self._mean(token))
            std = torch.where(finite, std, self._std(token))
            return (x - mean) / std.clamp(min=self.FLOOR)

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
            _move(mean, moments.known_mean(), momentum)
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
            if (features.summary is not None and "summary" not in self.raw)
            or features.patches is None
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

    def set_statistics(self, statistics: Mapping[TokenType, Statistics]) -> None:
        """Take measured statistics in place of measuring; nothing is learnt from then on."""
        for token, of in statistics.items():
            variance = of.covariance.diagonal().clamp(min=0.0)
            self._buffer(token, "origin").copy_(of.mean)
            self._buffer(token, "offset").zero_()
            self._buffer(token, "m2").copy_(variance * (of.n - 1))
            self._buffer(token, "count").fill_(of.n)
            self._mean(token).copy_(of.mean)
            self._std(token).copy_(variance.sqrt())
        self.images_seen.fill_(self.images)
        self._frozen = True

    def state_restored(self) -> None:
        """See ``FeatureNormalizer``: the next update looks at what is there."""
        self._frozen = False


class GlobalStandardizer(FixedStandardizer):
    """One deviation for all dimensions: ``(y − μ)/σ`` with ``σ² = mean over D of σ_d²``.

    The balance between dimensions stays the teacher's own (as with PHI-S, but without its
    rotation, so single dimensions have another variance than 1).
    """

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """See ``FeatureNormalizer``."""
        std = self._std(token)
        scale = std.double().square().mean().sqrt().float().clamp(min=EPS)
        return scale.expand_as(std), self._mean(token)


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
    """Statistics of each dimension, measured once and kept.

    Args:
        images: how many images (of all ranks) are measured.
        statistics: a file of ``multikd teachers stats``: nothing is measured in training.
    """

    images: int = 8192
    statistics: str | None = None

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"images must be 2 or more, received {self.images}")

    def build(self, widths: Widths) -> FixedStandardizer:
        """See ``NormalizerFactory``."""
        return FixedStandardizer(widths, self.images)

    def for_teacher(self, name: str, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        normalizer = self.build(widths)
        if self.statistics is not None:
            normalizer.set_statistics(read_statistics(self.statistics, name, widths))
        return normalizer


@dataclass
class GlobalStandardizers(FixedStandardizers):
    """A mean of each dimension and one deviation for all, measured once and kept.

    Args:
        images: how many images (of all ranks) are measured.
        statistics: a file of ``multikd teachers stats``: nothing is measured in training.
    """

    def build(self, widths: Widths) -> GlobalStandardizer:
        """See ``NormalizerFactory``."""
        return GlobalStandardizer(widths, self.images)


def _move(buffer: Tensor, value: Tensor, momentum: Tensor) -> None:
    """``buffer ← (1 − m) · buffer + m · value`` in place, where ``value`` is finite."""
    buffer.copy_(torch.where(torch.isfinite(value), torch.lerp(buffer, value, momentum), buffer))
