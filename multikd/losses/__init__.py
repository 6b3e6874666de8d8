"""Objectives, dropping, balancing, and the terms beside the teachers'."""

from multikd.losses.balancing import (
    DynamicWeightAverage,
    FixedWeights,
    InverseLossScale,
    LossBalancer,
    UncertaintyWeights,
)
from multikd.losses.dropping import (
    HardestKept,
    NoDropping,
    RandomTeachers,
    TeacherDropper,
    hardest_kept,
    weigh,
)
from multikd.losses.feature import DistillationLoss, FeatureLoss
from multikd.losses.labels import LabelLoss, Term

__all__ = [
    "DistillationLoss",
    "DynamicWeightAverage",
    "FeatureLoss",
    "FixedWeights",
    "HardestKept",
    "InverseLossScale",
    "LabelLoss",
    "LossBalancer",
    "NoDropping",
    "RandomTeachers",
    "TeacherDropper",
    "Term",
    "UncertaintyWeights",
    "hardest_kept",
    "weigh",
]
