"""Small modules of the methods that are LightningModules of their own, and shards for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch

from helpers import training as small
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.modules import (
    AdaptiveModule,
    InfluenceModule,
    MutualModule,
    SelfDistillationModule,
)
from multikd.optim import WarmupCosine
from multikd.teachers import BackboneEncoder, TrainableTeacher

CLASSES = 10


def teacher(name: str = "test_vit", seed: int = 1, size: int = 32, **settings: Any) -> Any:
    """A random teacher whose classifier reads the mean of its patches."""
    options: dict[str, Any] = {}
    if "vit" in name:  # layer norms, so that ranks need not share batch statistics
        options = {"img_size": size, "global_pool": "avg", "fc_norm": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=CLASSES, **options)
        encoder = BackboneEncoder(model, name=name, image_size=size)
        return TrainableTeacher(encoder, **{"resize": "none", **settings})


def _adaptive(**more: Any) -> AdaptiveModule:
    settings: dict[str, Any] = {
        "teachers": {"one": teacher(), "two": teacher(seed=2)},
        "student": small.student(drop_path=0.3),
        "labels": 0.3,
        "response": 0.5,
        "drift": 0.1,
        "norm": "group",
    }
    return AdaptiveModule(**{**settings, **more})


def _influence(**more: Any) -> InfluenceModule:
    settings: dict[str, Any] = {
        "teacher": teacher(),
        "student": small.student(drop_path=0.3, num_classes=CLASSES),
        "alpha": 0.7,
        "held_out_batch": None,
    }
    return InfluenceModule(**{**settings, **more})


def _mutual(**more: Any) -> MutualModule:
    students = {
        "a": small.student(drop_path=0.3, num_classes=CLASSES),
        "b": small.student("test_vit2", num_classes=CLASSES, seed=4),
    }
    return MutualModule(**{"students": students, **more})


def _self(**more: Any) -> SelfDistillationModule:
    student = small.student(drop_path=0.3, num_classes=CLASSES)
    return SelfDistillationModule(**{"student": student, "features": 0.2, **more})


METHODS: dict[str, Callable[..., Any]] = {
    "adaptive": _adaptive,
    "influence": _influence,
    "mutual": _mutual,
    "self": _self,
}


def module(name: str, seed: int = 0, **more: Any) -> Any:
    """A module by name, the same for the same arguments."""
    settings: dict[str, Any] = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=2e-3),
        "schedule": WarmupCosine(warmup_epochs=1.5),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return METHODS[name](**{**settings, **more})


def data(train: Any, **settings: Any) -> ShardDataModule:
    """Small views, batches of five, and every fourth sample held out."""
    made = {
        "train_views": LightViews(32),
        "batch_size": 5,
        "num_workers": 0,
        "held_out": 4,
        **settings,
    }
    return ShardDataModule(train, **made)
