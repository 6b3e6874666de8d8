"""Two gloo ranks and one process with the same global batch: the same run.

Real shards, real Trainers, DDP as users get it (no ``find_unused_parameters``). The ranks are
started once; each scenario is a fit of its own.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews, UnicViews
from multikd.losses import (
    AngleLoss,
    DynamicWeightAverage,
    HardestKept,
    InverseLossScale,
    LabelLoss,
    LossSum,
    MSELoss,
    RandomTeachers,
    UncertaintyWeights,
)
from multikd.normalizers import (
    BatchStandardizers,
    EMAStandardizers,
    FixedStandardizers,
    WhiteningNormalizers,
)

GLOBAL_BATCH = 8
LENGTHS = [3, 21, 0, 17, 1]  # 42 samples: five batches of eight

SCENARIOS: dict[str, dict[str, Any]] = {
    # UNIC: hardest kept over the batch of all ranks, running statistics.
    "unic": {
        "dropper": lambda: HardestKept(normalize="batch"),
        "normalizers": EMAStandardizers(),
        "ema_decay": 0.9,
    },
    "whole_teachers": {
        "dropper": lambda: RandomTeachers(p=0.5, seed=1),
        "balancer": UncertaintyWeights,
        "normalizers": FixedStandardizers(images=24),
    },
    "inverse_scale": {
        "dropper": lambda: HardestKept(normalize="image"),
        "balancer": InverseLossScale,
        "normalizers": BatchStandardizers(),
        "terms": lambda: {"labels": LabelLoss(weight=0.1)},
    },
    # C-RADIOv4's summaries; whitening, since it is a continuous function of the covariance.
    "radio": {
        "normalizers": WhiteningNormalizers(images=24, floor=1e-2),
        "loss": LossSum({"summary": AngleLoss(), "patches": MSELoss(0.0, 1.0)}),
    },
    "two_epochs": {"balancer": DynamicWeightAverage, "epochs": 3, "views": 2, "accumulate": 2},
}


class Digests(pl.Callback):
    """A hash of everything that is trained, after every step; and what DDP was told."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.wrapped = self.searches = False

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.wrapped = isinstance(trainer.model, DistributedDataParallel)
        self.searches = getattr(trainer.model, "find_unused_parameters", False)
        digest = hashlib.sha256()
        for name, parameter in module.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().numpy().tobytes())
        self.digests.append(digest.hexdigest())


def fit(folder: Path, name: str, world: int) -> dict[str, Any]:
    """One scenario; on every rank the losses of its own images."""
    scenario = {"epochs": 1, "views": 1, "accumulate": 1, **SCENARIOS[name]}
    epochs, views, accumulate = (scenario.pop(k) for k in ("epochs", "views", "accumulate"))
    for key in ("dropper", "balancer", "terms"):
        if key in scenario:
            scenario[key] = scenario[key]()
    module = small.module(
        {"num_classes": 10 if "terms" in scenario else 0},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        **scenario,
    )
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    data = ShardDataModule(
        [str(path) for path in sorted(folder.glob("*.tar"))],
        val=[str(path) for path in sorted(folder.glob("*.tar"))],
        train_views=[UnicViews(32), LightViews(32)][:views],
        batch_size=GLOBAL_BATCH // world,
        eval_batch_size=20 // world,  # 42 images in 3 batches: the last is mostly filler
        num_workers=0,
        window_shards=2,
    )
    notes, digests = small.Notes(), Digests()
    make = small.trainer if world == 1 else small.ddp_trainer
    runner = make(
        folder,
        notes,
        digests,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=epochs,
    )
    runner.fit(module, datamodule=data)
    changed = [n for n, p in module.named_parameters() if not torch.equal(p, start[n])]
    assert len(changed) > 40
    return {
        "keys": notes.keys,
        "losses": notes.losses,
        "totals": notes.totals,
        "digests": digests.digests,
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "metrics": {k: float(v) for k, v in runner.callback_metrics.items()},
        "ddp": (digests.wrapped, digests.searches),
    }


def fit_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: fit(folder, name, world=2) for name in SCENARIOS}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, [n for n in LENGTHS if n], size=(40, 36))
    return folder


@pytest.fixture(scope="module")
def ranks(shards: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(fit_all, 2, shards)


@pytest.fixture(scope="module")
def alone(shards: Path) -> Any:
    return cache(lambda name: fit(shards, name, world=1))


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    assert all(row.keys() == rows[0].keys() for row in rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@pytest.mark.parametrize("name", SCENARIOS)
def test_losses_are_those_of_one_process(name: str, ranks: Any, alone: Any) -> None:
    one, (a, b) = alone(name), [rank[name] for rank in ranks]
    steps = 5 * SCENARIOS[name].get("epochs", 1)
    assert len(one["keys"]) == len(a["keys"]) == steps
    assert [x + y for x, y in zip(a["keys"], b["keys"], strict=True)] == one["keys"]
    expected = one["losses"]
    got = [mean(pair) for pair in zip(a["losses"], b["losses"], strict=True)]
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    for step, (row, reference) in enumerate(zip(got, expected, strict=True)):
        assert row == pytest.approx(reference, rel=1e-5, abs=1e-6), step
    totals = [(x + y) / 2 for x, y in zip(a["totals"], b["totals"], strict=True)]
    assert totals == pytest.approx(one["totals"], rel=1e-5, abs=1e-6)
    if "whole" in name:
        assert {len(row) for row in expected} & {1, 2}


@pytest.mark.parametrize("name", SCENARIOS)
def test_statistics_and_balancers_are_those_of_one_process(
    name: str, ranks: Any, alone: Any
) -> None:
    one = alone(name)["state"]
    kept = [
        key for key in one if key.startswith(("normalizers.", "losses.", "balancer.", "average."))
    ]
    assert any("summary_std" in key for key in kept)
    for rank in ranks:
        state: dict[str, Tensor] = rank[name]["state"]
        assert state.keys() == one.keys()
        for key in kept:
            tolerance = {"rtol": 1e-5, "atol": 1e-5 if "average" not in key else 2e-4}
            assert torch.allclose(state[key].double(), one[key].double(), **tolerance), key


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_every_step_all_ranks_hold_the_same(name: str, ranks: Any) -> None:
    a, b = (rank[name] for rank in ranks)
    assert a["digests"] == b["digests"]
    optimiser_steps = len(a["keys"]) // SCENARIOS[name].get("accumulate", 1)
    assert len(set(a["digests"])) >= optimiser_steps
    assert all(torch.equal(v, b["state"][k]) for k, v in a["state"].items())
    assert a["losses"] != b["losses"]  # of different images


@pytest.mark.parametrize("name", SCENARIOS)
def test_validation_is_that_of_one_process(name: str, ranks: Any, alone: Any) -> None:
    """42 images on two ranks of which one ends on nothing but filler."""
    one = alone(name)["metrics"]
    for rank in ranks:
        for key in (k for k in one if k.startswith(("val/", "epoch/"))):
            assert rank[name]["metrics"][key] == pytest.approx(one[key], rel=2e-4), key


def test_nobody_searches_for_unused_parameters(ranks: Any) -> None:
    assert {rank[name]["ddp"] for rank in ranks for name in SCENARIOS} == {(True, False)}
