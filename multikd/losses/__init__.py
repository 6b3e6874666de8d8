"""Objectives, dropping, balancing, and the terms beside the teachers'."""

from multikd.losses.angle import AngleLoss
from multikd.losses.balancing import (
    DynamicWeightAverage,
    FixedWeights,
    InverseLossScale,
    LossBalancer,
    UncertaintyWeights,
)
from multikd.losses.batch_relation import RKDTerm, SimilarityPreservingTerm
from multikd.losses.combined import LossSum
from multikd.losses.curriculum import Curriculum
from multikd.losses.dropping import (
    HardestKept,
    NoDropping,
    RandomTeachers,
    TeacherDropper,
    hardest_kept,
    weigh,
)
from multikd.losses.feature import DistillationLoss, FeatureLoss, MSELoss, NoFeatureLoss
from multikd.losses.labels import LabelLoss
from multikd.losses.layers import AttentionTransferTerm, HintTerm
from multikd.losses.relation import GramLoss
from multikd.losses.response import ResponseTerm
from multikd.losses.retention import RetentionTerm
from multikd.losses.shift import ShiftEquivariantMSE
from multikd.losses.term import TeacherTerm, Term

__all__ = [
    "AngleLoss",
    "AttentionTransferTerm",
    "Curriculum",
    "DistillationLoss",
    "DynamicWeightAverage",
    "FeatureLoss",
    "FixedWeights",
    "GramLoss",
    "HardestKept",
    "HintTerm",
    "InverseLossScale",
    "LabelLoss",
    "LossBalancer",
    "LossSum",
    "MSELoss",
    "NoDropping",
    "NoFeatureLoss",
    "RKDTerm",
    "RandomTeachers",
    "ResponseTerm",
    "RetentionTerm",
    "ShiftEquivariantMSE",
    "SimilarityPreservingTerm",
    "TeacherDropper",
    "TeacherTerm",
    "Term",
    "UncertaintyWeights",
    "hardest_kept",
    "weigh",
]
