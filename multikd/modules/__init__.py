"""LightningModules: each says who is optimised and when."""

from multikd.modules.distillation import DistillationModule
from multikd.modules.ema import StudentAverage
from multikd.modules.records import StepRecord

__all__ = ["DistillationModule", "StepRecord", "StudentAverage"]
