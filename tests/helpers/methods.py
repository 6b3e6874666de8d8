"""Small modules of the methods that are LightningModules of their own, and shards for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
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
        options = {"img_size": size, "global_pool": "avg", "fc_norm": False, "depth": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=CLASSES, **options)
        encoder = BackboneEncoder(model, name=name, image_size=size)
        return TrainableTeacher(encoder, **{"resize": "none", **settings})


@cache
def _student(width: int, depth: int, seed: int, drop_path: float, num_classes: int) -> Any:
    return small.student(
        seed=seed,
        drop_path=drop_path,
        num_classes=num_classes,
        rungs=[0],  # not read here, and quickly planned
        model_args={"depth": depth, "embed_dim": width, "num_heads": 2},
    )


def student(
    width: int = 32, depth: int = 2, seed: int = 0, drop_path: float = 0.0, num_classes: int = 0
) -> Any:
    """A little ViT; each time a copy of its own."""
    return copy.deepcopy(_student(width, depth, seed, drop_path, num_classes))


def _adaptive(drop_path: float = 0.3, **more: Any) -> AdaptiveModule:
    settings: dict[str, Any] = {
        "teachers": {"one": teacher(), "two": teacher(seed=2)},
        "labels": 0.3,
        "response": 0.5,
        "drift": 0.1,
        "norm": "group",
    }
    if "student" not in more:
        more["student"] = student(drop_path=drop_path)
    return AdaptiveModule(**{**settings, **more})


def _influence(drop_path: float = 0.3, **more: Any) -> InfluenceModule:
    settings: dict[str, Any] = {"teacher": teacher(), "alpha": 0.7}
    if "student" not in more:
        more["student"] = student(drop_path=drop_path, num_classes=CLASSES)
    return InfluenceModule(**{**settings, **more})


def _mutual(drop_path: float = 0.3, **more: Any) -> MutualModule:
    if "students" not in more:
        more["students"] = {
            "a": student(drop_path=drop_path, num_classes=CLASSES),
            "b": student(width=16, depth=1, seed=4, num_classes=CLASSES),
        }
    return MutualModule(**more)


def _self(drop_path: float = 0.3, **more: Any) -> SelfDistillationModule:
    if "student" not in more:
        more["student"] = student(drop_path=drop_path, num_classes=CLASSES)
    return SelfDistillationModule(**{"features": 0.2, **more})


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
