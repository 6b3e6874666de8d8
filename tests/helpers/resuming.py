"""Runs that note every key, view, loss and weight, and go on from any of their checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers import training as small
from multikd.callbacks import DataFaults, FiniteLossGuard, KNNProbe, Throughput
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews, UnicViews
from multikd.losses import (
    DynamicWeightAverage,
    HardestKept,
    InverseLossScale,
    LabelLoss,
    RandomTeachers,
    UncertaintyWeights,
)
from multikd.modules import DistillationModule
from multikd.normalizers import BatchStandardizers, EMAStandardizers, FixedStandardizers
from multikd.optim import WarmupCosine

# Together they hold every kind of state. Drop path draws from torch's own generator.
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "unic": lambda: {
        "dropper": HardestKept(),
        "balancer": DynamicWeightAverage(),
        "normalizers": EMAStandardizers(),
        "ema_decay": 0.95,
    },
    "whole_teachers": lambda: {
        "dropper": RandomTeachers(p=0.5),
        "balancer": InverseLossScale(),
        "normalizers": FixedStandardizers(images=20),
        "ema_decay": 0.95,
    },
    "dune": lambda: {
        "balancer": UncertaintyWeights(),
        "normalizers": BatchStandardizers(),
        "terms": {"labels": LabelLoss()},
        "ema_decay": 0.5,
    },
}


@dataclass
class Steps:
    """What every batch of a run was; one row a batch on each list."""

    places: list[tuple[int, int]] = field(default_factory=list)  # (epoch, batch in the epoch)
    keys: list[list[str]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    views: list[str] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    logged: list[int] = field(default_factory=list)  # Lightning's step of the loggers
    validations: list[tuple[int, int]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    def rows(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        """Place → everything that was computed there."""
        columns = zip(
            *(self.keys, self.positions, self.views, self.losses, self.weights, self.rates),
            self.logged,
            strict=True,
        )
        return dict(zip(self.places, columns, strict=True))


class Record(pl.Callback):
    """Fills ``Steps``."""

    def __init__(self) -> None:
        self.steps = Steps()

    def on_train_batch_end(
        self, trainer: Any, module: Any, out: Any, batch: Any, index: int
    ) -> None:
        steps = self.steps
        steps.places.append((trainer.current_epoch, index))
        steps.keys.append(batch.keys)
        steps.positions.append(batch.positions.tolist())
        digest = hashlib.sha256()
        for view in batch.views:
            digest.update(view.numpy().tobytes())
        steps.views.append(digest.hexdigest())
        records = module.last_records
        steps.losses.append([x for r in records for x in [*r.losses.flatten().tolist(), r.total]])
        steps.losses[-1] = [float(x) for x in steps.losses[-1]]
        steps.weights.append([x for r in records for x in r.lambdas.tolist()])
        steps.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        steps.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        self.steps.validations.append((trainer.current_epoch, done))


def module(name: str, **more: Any) -> DistillationModule:
    """A little module of one of the ``MODELS``."""
    settings = MODELS[name]()
    classes = 10 if "terms" in settings else 0
    return small.module(
        {"drop_path": 0.3, "num_classes": classes},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3),
        schedule=WarmupCosine(warmup_epochs=1.5),
        **{"teachers": small.teachers(2), **settings, **more},
    )


def data(train: Any, views: int = 1, **settings: Any) -> ShardDataModule:
    """A data module of small views; batches of five unless told otherwise."""
    policies = [UnicViews(32), LightViews(32)][:views]
    made = {"train_views": policies, "batch_size": 5, "num_workers": 0, **settings}
    return ShardDataModule(train, **made)


def run(
    model: DistillationModule,
    shards: ShardDataModule,
    out: Path,
    *extra: pl.Callback,
    resume: Path | None = None,
    make: Callable[..., pl.Trainer] = small.trainer,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> Steps:
    """One fit; with ``save`` (arguments of a ModelCheckpoint) it writes checkpoints to ``out``."""
    record = Record()
    callbacks = [record, KNNProbe(k=3), FiniteLossGuard(), DataFaults(), Throughput(), *extra]
    if save is not None:
        name = save.pop("filename", "{epoch}-{step}")
        callbacks.append(ModelCheckpoint(out, name, save_top_k=-1, **save))
    trainer = make(out, *callbacks, enable_checkpointing=save is not None, **settings)
    try:
        trainer.fit(model, datamodule=shards, ckpt_path=resume)
    finally:
        shards.teardown()
    record.steps.state = {k: v.clone() for k, v in model.state_dict().items()}
    return record.steps


def same_from(whole: Steps, resumed: Steps, place: tuple[int, int]) -> None:
    """The resumed run is the whole one from ``place`` on, bit for bit."""
    assert resumed.places == [p for p in whole.places if p >= place]
    expected, got = whole.rows(), resumed.rows()
    for at, row in got.items():
        assert row == expected[at], at
    assert resumed.state.keys() == whole.state.keys()
    for key, value in whole.state.items():
        assert torch.equal(value, resumed.state[key]), key
