"""Target normalisers: one teacher's features, standardised per token type.

Statistics are over images (summary) or images and patches (patches), on the teacher's own grid,
over all ranks, and live in buffers that are never cast. A step calls ``forward`` first and
``update`` after it. The factories are what YAML names.
"""

from multikd.normalizers.base import (
    FeatureNormalizer,
    KeepsDtype,
    NoNormalizers,
    NormalizerFactory,
)
from multikd.normalizers.covariance import CovarianceNormalizer
from multikd.normalizers.rotations import (
    PHISNormalizer,
    PHISNormalizers,
    WhiteningNormalizer,
    WhiteningNormalizers,
)
from multikd.normalizers.standardize import (
    BatchStandardizer,
    BatchStandardizers,
    EMAStandardizer,
    EMAStandardizers,
    FixedStandardizer,
    FixedStandardizers,
    GlobalStandardizer,
    GlobalStandardizers,
)

__all__ = [
    "BatchStandardizer",
    "BatchStandardizers",
    "CovarianceNormalizer",
    "EMAStandardizer",
    "EMAStandardizers",
    "FeatureNormalizer",
    "FixedStandardizer",
    "FixedStandardizers",
    "GlobalStandardizer",
    "GlobalStandardizers",
    "KeepsDtype",
    "NoNormalizers",
    "NormalizerFactory",
    "PHISNormalizer",
    "PHISNormalizers",
    "WhiteningNormalizer",
    "WhiteningNormalizers",
]
