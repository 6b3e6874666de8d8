"""LightningModules: each says who is optimised and when."""

from multikd.modules.distillation import DistillationModule, StepRecord
from multikd.modules.ema import StudentAverage

__all__ = ["DistillationModule", "StepRecord", "StudentAverage"]
