"""Objectives, dropping, balancing, and the terms beside the teachers'."""

from multikd.losses.angle import AngleLoss
from multikd.losses.balancing import (
    DynamicWeightAverage,
    FixedWeights,
    InverseLossScale,
    LossBalancer,
    UncertaintyWeights,
)
from multikd.losses.combined import LossSum
from multikd.losses.dropping import (
    HardestKept,
    NoDropping,
    RandomTeachers,
    TeacherDropper,
    hardest_kept,
    weigh,
)
from multikd.losses.feature import DistillationLoss, FeatureLoss, MSELoss
from multikd.losses.labels import LabelLoss, Term
from multikd.losses.relation import GramLoss
from multikd.losses.shift import ShiftEquivariantMSE

__all__ = [
    "AngleLoss",
    "DistillationLoss",
    "DynamicWeightAverage",
    "FeatureLoss",
    "FixedWeights",
    "GramLoss",
    "HardestKept",
    "InverseLossScale",
    "LabelLoss",
    "LossBalancer",
    "LossSum",
    "MSELoss",
    "NoDropping",
    "RandomTeachers",
    "ShiftEquivariantMSE",
    "TeacherDropper",
    "Term",
    "UncertaintyWeights",
    "hardest_kept",
    "weigh",
]
