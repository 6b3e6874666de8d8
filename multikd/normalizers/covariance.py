"""Normalisers that know how a teacher's dimensions vary together, and so can rotate them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from multikd.distributed import broadcast_first, combine_covariance
from multikd.functional import batch_covariance, without_autocast
from multikd.normalizers.base import FeatureNormalizer
from multikd.normalizers.measured import Statistics
from multikd.types import TOKEN_TYPES, TokenFeatures, TokenType, Widths


class CovarianceNormalizer(FeatureNormalizer):
    """``y' = (y − μ) W`` with W from the covariance Σ of the first ``images`` images, then frozen.

    Σ is accumulated centred (Chan, Golub & LeVeque 1979) in float64, as sums over ranks; W is
    decomposed anew on a schedule while it measures, and for good at its end. Before the first
    decomposition nothing is changed. The batch that reaches ``images`` counts whole, and one with
    a NaN counts as empty. While it measures, each update waits for the device once.

    Buffers beside the base's: ``<token>_matrix`` W and ``<token>_inverse`` W⁻¹, float32 ``(D, D)``;
    ``<token>_centre (D,)`` and ``<token>_scatter (D, D)`` float64; counters.

    Args:
        widths: of the teacher.
        images: how many images (of all ranks) are measured.
        every: updates between two decompositions; None doubles the distance each time.
    """

    images_seen: Tensor
    updates: Tensor
    least = 0  # observations a dimension, below which a decomposition must wait for the end

    def __init__(self, widths: Widths, images: int, every: int | None = None) -> None:
        super().__init__(widths)
        self.images = images
        self.every = every
        self._frozen = False
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for token in TOKEN_TYPES:
            width = getattr(widths, token)
            if width is not None:
                for kind in ("matrix", "inverse"):
                    self.register_buffer(f"{token}_{kind}", torch.eye(width, dtype=torch.float32))
                self.register_buffer(f"{token}_centre", torch.zeros(width, dtype=torch.float64))
                scatter = torch.zeros(width, width, dtype=torch.float64)
                self.register_buffer(f"{token}_scatter", scatter)
                self.register_buffer(f"{token}_count", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def decompose(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """W and W⁻¹, float64 ``(D, D)``, of a covariance, float64 ``(D, D)``."""

    def forward(self, features: TokenFeatures) -> TokenFeatures:
        """See ``FeatureNormalizer``."""

        def rotate(token: TokenType, x: Tensor) -> Tensor:
            with without_autocast(x.device):
                matrix = self._buffer(token, "matrix")
                return (x - self._mean(token)) @ matrix.to(x.dtype)

        return self._map(features, rotate)

    def inverse(self, features: TokenFeatures) -> TokenFeatures:
        """See ``FeatureNormalizer``."""

        def undo(token: TokenType, x: Tensor) -> Tensor:
            with without_autocast(x.device):
                matrix, shift = self.affine(token)
                return x @ matrix.to(x.dtype) + shift

        return self._map(features, undo)

    def affine(self, token: TokenType) -> tuple[Tensor, Tensor]:
        """(matrix ``(D, D)``, shift ``(D,)``) float32 with ``inverse(s) = s @ matrix + shift``."""
        return self._buffer(token, "inverse"), self._mean(token)

    @torch.no_grad()
    def update(self, features: TokenFeatures) -> None:
        """See ``FeatureNormalizer``."""
        if not self.training or self._frozen:
            return
        # images_seen is a sum over ranks, so all ranks stop at the same step.
        seen = int(self.images_seen)
        self._frozen = seen >= self.images
        if self._frozen:
            return
        counted = torch.zeros_like(self.images_seen)
        for token in TOKEN_TYPES:
            x = self._checked(features, token)
            if x is not None and token not in self.raw:
                rows = self._accumulate(token, x.detach().flatten(0, -2))
                per_image = 1 if x.ndim == 2 else x.shape[1]
                counted = torch.maximum(counted, rows // per_image)
        self.images_seen += counted
        self.updates += 1
        over = int(self.images_seen) >= self.images
        if over or self._due(int(self.updates)):
            self._decompose(0 if over else self.least)

    def rescale_updates(self, factor: float) -> None:
        """See ``FeatureNormalizer``; ``every``, where the factory has set it, stays in updates."""
        if factor != 1.0:
            self.updates.copy_((self.updates.double() * factor).round().long())

    def set_statistics(self, statistics: Mapping[TokenType, Statistics]) -> None:
        """Take measured statistics in place of measuring; nothing is learnt from then on."""
        for token, of in statistics.items():
            self._buffer(token, "centre").copy_(of.mean)
            self._buffer(token, "scatter").copy_(of.covariance * max(of.n - 1, 1))
            self._buffer(token, "count").fill_(of.n)
        self.images_seen.fill_(max(self.images, 1))
        if not self.images_seen.is_meta:
            self._decompose()
        self._frozen = True

    def statistics(self, token: TokenType) -> Statistics:
        """What was measured so far, of one token type."""
        count = int(self._buffer(token, "count"))
        covariance = self._buffer(token, "scatter") / max(count - 1, 1)
        return Statistics(count, self._buffer(token, "centre").clone(), covariance)

    def _due(self, updates: int) -> bool:
        if self.every is None:
            return updates & (updates - 1) == 0
        return updates == 1 or updates % self.every == 0

    def _accumulate(self, token: TokenType, rows: Tensor) -> Tensor:
        """Add rows ``(n, D)`` of all ranks; how many were counted, int64 ``()``."""
        n, mean, scatter = combine_covariance(*batch_covariance(rows))
        finite = torch.isfinite(scatter.sum() + mean.sum())
        # A batch with a NaN counts as empty: nothing ever leaves these sums again.
        n, mean, scatter = (torch.where(finite, t, 0.0) for t in (n, mean, scatter))
        centre, total = self._buffer(token, "centre"), self._buffer(token, "scatter")
        count = self._buffer(token, "count")
        before = count.double()
        share = n / (before + n).clamp(min=1.0)
        difference = mean - centre
        total += scatter
        total.addr_(difference * (before * share), difference)
        centre += difference * share
        count += n.long()
        return n.long()

    def _decompose(self, least: int = 0) -> None:
        for token in TOKEN_TYPES:
            width = getattr(self.widths, token)
            if width is None or int(self._buffer(token, "count")) < max(2, least * width):
                continue
            count = self._buffer(token, "count").double()
            covariance = self._buffer(token, "scatter") / (count - 1.0)
            matrix, inverse = (m.to(covariance) for m in self.decompose(covariance))
            # Near-equal eigenvalues turn with the last bit: all ranks take the first one's.
            self._buffer(token, "matrix").copy_(broadcast_first(matrix.float()))
            self._buffer(token, "inverse").copy_(broadcast_first(inverse.float()))
            self._mean(token).copy_(self._buffer(token, "centre"))
            self._std(token).copy_(covariance.diagonal().clamp(min=0.0).sqrt())

    def state_restored(self) -> None:
        """See ``FeatureNormalizer``: the next update looks at what is there."""
        self._frozen = False
