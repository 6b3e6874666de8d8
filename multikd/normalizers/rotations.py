"""PHI-S and whitening: two choices of the matrix that makes a covariance harmless."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.normalizers.base import FeatureNormalizer, NormalizerFactory
from multikd.normalizers.covariance import CovarianceNormalizer
from multikd.normalizers.hadamard import construction, spreading_matrix
from multikd.normalizers.measured import read_statistics
from multikd.types import Widths

log = logging.getLogger(__name__)


class PHISNormalizer(CovarianceNormalizer):
    """PHI standardisation (arXiv 2410.01680, section 3): ``y' = φ⁻¹ H Uᵀ (y − μ)``.

    ``Σ = U Λ Uᵀ``, φ² the mean eigenvalue, H a normalised Hadamard matrix. Every output dimension
    has variance 1, and all errors are scaled by one number, so that the balance between dimensions
    is the teacher's own. ``y = μ + φ U Hᵀ y'`` undoes it exactly, also where Σ is singular.
    """

    def decompose(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """See ``CovarianceNormalizer``."""
        values, vectors = _eigen(covariance)
        rotation = vectors @ spreading_matrix(values).to(covariance).T
        # A teacher that says the same of every image is left as it is.
        scale = values.mean().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return rotation / scale, rotation.T * scale


class WhiteningNormalizer(CovarianceNormalizer):
    """Whitening without a turn (ZCA, Bell & Sejnowski 1997): ``y' = Σ^(−1/2) (y − μ)``.

    Output dimensions have variance 1 and are not correlated. Directions whose variance is below
    ``floor`` of the largest one are scaled as if it were that: their noise is not blown up, and
    they have less than variance 1.
    """

    # Directions that were not seen yet would be scaled by 1/√floor: 316 times too much.
    least = 2

    def __init__(self, widths: Widths, images: int, every: int | None, floor: float) -> None:
        super().__init__(widths, images, every)
        self.floor = floor

    def decompose(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """See ``CovarianceNormalizer``."""
        values, vectors = _eigen(covariance)
        top = values.max()
        roots = values.clamp(min=float(top) * self.floor).sqrt() if top > 0 else values + 1.0
        return (vectors / roots) @ vectors.T, (vectors * roots) @ vectors.T


@dataclass
class PHISNormalizers(NormalizerFactory):
    """PHI-S; a width without a Hadamard matrix is spread by plane rotations, and says so.

    Args:
        images: how many images (of all ranks) are measured before the transform is frozen.
        every: updates between two decompositions until then; None doubles the distance each time.
        statistics: a file of ``multikd teachers stats``: frozen from the first step.
    """

    images: int = 8192
    every: int | None = None
    statistics: str | None = None

    def __post_init__(self) -> None:
        _check(self.images, self.every)

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        for width in {width for width in widths if width is not None}:
            if construction(width) is None:
                log.warning(
                    "PHI-S: no Hadamard matrix of width %d is known here; a Hartley matrix with "
                    "plane rotations takes its place (variances are 1 all the same)",
                    width,
                )
        return PHISNormalizer(widths, self.images, self.every)

    def for_teacher(self, name: str, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return _measured(self.build(widths), self.statistics, name)


@dataclass
class WhiteningNormalizers(NormalizerFactory):
    """ZCA whitening.

    Args:
        images: how many images (of all ranks) are measured before the transform is frozen.
        every: updates between two decompositions until then; None doubles the distance each time.
        floor: least variance of a direction, as a share of the largest.
        statistics: a file of ``multikd teachers stats``: frozen from the first step.
    """

    images: int = 8192
    every: int | None = None
    floor: float = 1e-5
    statistics: str | None = None

    def __post_init__(self) -> None:
        _check(self.images, self.every)
        if not 0.0 < self.floor <= 1.0:
            raise ValueError(f"floor must be in (0, 1], received {self.floor}")

    def build(self, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return WhiteningNormalizer(widths, self.images, self.every, self.floor)

    def for_teacher(self, name: str, widths: Widths) -> FeatureNormalizer:
        """See ``NormalizerFactory``."""
        return _measured(self.build(widths), self.statistics, name)


def _measured(normalizer: FeatureNormalizer, path: str | None, teacher: str) -> FeatureNormalizer:
    if path is not None and isinstance(normalizer, CovarianceNormalizer):
        normalizer.set_statistics(read_statistics(path, teacher, normalizer.widths))
    return normalizer


def _check(images: int, every: int | None) -> None:
    if images < 2:
        raise ValueError(f"images must be 2 or more, received {images}")
    if every is not None and every < 1:
        raise ValueError(f"every must be 1 or more, or null, received {every}")


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, 0 or more, and eigenvectors whose largest component is positive."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return values.clamp(min=0.0), vectors * signs
