"""Projectors: from the student's widths to one teacher's.

A projector sees summary, patches and grid together, since some kinds mix them; it returns the
token types that its teacher has. The factories are typed objects, so that YAML can choose one by
``class_path`` and ``init_args``.
"""

from multikd.projectors.base import (
    Projector,
    ProjectorFactory,
    TokenwiseProjector,
    linear,
    summary_of,
)
from multikd.projectors.bottleneck import BottleneckProjector, to_map
from multikd.projectors.convolution import ConvProjector, ConvProjectors, ConvStage
from multikd.projectors.mlp import (
    LinearProjectors,
    MLPProjectors,
    Residual,
    ResidualMLPProjectors,
    mlp_weights,
)
from multikd.projectors.transformer import TransformerProjector, TransformerProjectors

__all__ = [
    "BottleneckProjector",
    "ConvProjector",
    "ConvProjectors",
    "ConvStage",
    "LinearProjectors",
    "MLPProjectors",
    "Projector",
    "ProjectorFactory",
    "Residual",
    "ResidualMLPProjectors",
    "TokenwiseProjector",
    "TransformerProjector",
    "TransformerProjectors",
    "linear",
    "mlp_weights",
    "summary_of",
    "to_map",
]
