"""One adapter over timm for teachers and students: build, load, measure, read features.

Split by noun: ``build`` (models by name), ``weights`` (files), ``features`` (what a model says),
``measure`` (shapes found by a run without data), ``normalize`` (mean and std), ``limits`` (what a
stranger's model may ask for), ``kernels`` (quicker operators on a CPU).
"""

from multikd.backbones.build import build_model, is_skeleton, known_names, skeleton
from multikd.backbones.features import RungPlan, final_features, plan_rungs, rung_features
from multikd.backbones.limits import check_model_args
from multikd.backbones.measure import (
    dry_run,
    freeze_unread,
    meta_copy,
    native_size,
    reached_parameters,
    spec_from_model,
)
from multikd.backbones.normalize import Normalize
from multikd.backbones.weights import load_weights, read_state_dict

__all__ = [
    "Normalize",
    "RungPlan",
    "build_model",
    "check_model_args",
    "dry_run",
    "final_features",
    "freeze_unread",
    "is_skeleton",
    "known_names",
    "load_weights",
    "meta_copy",
    "native_size",
    "plan_rungs",
    "reached_parameters",
    "read_state_dict",
    "rung_features",
    "skeleton",
    "spec_from_model",
]
