"""LightningModules: each says who is optimised and when."""

from multikd.modules.adaptive import AdaptiveModule
from multikd.modules.distillation import DistillationModule
from multikd.modules.ema import StudentAverage
from multikd.modules.influence import InfluenceModule
from multikd.modules.mutual import MutualModule
from multikd.modules.records import StepRecord
from multikd.modules.self_distillation import SelfDistillationModule

__all__ = [
    "AdaptiveModule",
    "DistillationModule",
    "InfluenceModule",
    "MutualModule",
    "SelfDistillationModule",
    "StepRecord",
    "StudentAverage",
]
