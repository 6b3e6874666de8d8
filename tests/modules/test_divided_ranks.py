"""Two gloo ranks against one process: data of single teachers, and teachers divided over ranks.

A partition is the same run as one process that gives each teacher the images of its group's ranks:
totals, statistics and weights agree to 1e-5.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks

from multikd import distributed as D
from multikd.data.module import DatasetSpec, ShardDataModule
from multikd.data.views import LightViews, UnicViews
from multikd.losses import AngleLoss, HardestKept, InverseLossScale, LossSum, MSELoss, NoDropping
from multikd.modules.allotment import Allotment
from multikd.normalizers import BatchStandardizers, EMAStandardizers, PHISNormalizers

GLOBAL_BATCH = 8
SCENARIOS: dict[str, dict[str, Any]] = {
    # No image of "scenes" in some batches, and often none on one of the ranks.
    "own": {
        "normalizers": EMAStandardizers(total_steps=20),
        "dropper": lambda: HardestKept(normalize="teacher"),
        "teacher_data": "own_and_generic",
        "balancer": InverseLossScale,
        "loss": lambda: LossSum({"summary": AngleLoss(), "patches": MSELoss(0.0, 1.0)}),
    },
    "partition": {
        "normalizers": BatchStandardizers(),
        "partition": [["cnn"], ["next", "vit"]],
        "balancer": InverseLossScale,
        "dropper": lambda: HardestKept(normalize="teacher"),
        "loss": lambda: LossSum({"summary": AngleLoss(), "patches": MSELoss(0.0, 1.0)}),
    },
    # Nothing is said of weights: the mean over teachers of their means.
    "partition_measures": {
        "normalizers": PHISNormalizers(images=12),
        "partition": [["cnn", "next"], ["vit"]],
    },
}


def fit(folder: Path, name: str, world: int) -> dict[str, Any]:
    scenario = dict(SCENARIOS[name])
    for key in ("dropper", "balancer", "loss"):
        if key in scenario:
            scenario[key] = scenario[key]()
    groups = scenario.get("partition")
    if world == 1 and groups:
        scenario.pop("partition")
        scenario.setdefault("dropper", NoDropping("teacher"))
    module = small.module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-2), **scenario)
    run: list[str] = []
    real = module.run_teacher
    module.run_teacher = lambda n, x: run.append(n) or real(n, x)  # type: ignore[method-assign,func-returns-value]
    if world == 1 and groups:
        half = GLOBAL_BATCH // 2
        of_ranks = (range(half), range(half, GLOBAL_BATCH))
        rows = {n: of_ranks[0 if n in groups[0] else 1] for n in module.teacher_names}
        module._allot = lambda b, names, images: Allotment(  # type: ignore[method-assign]
            {n: rows[n] for n in names}, len(b), images.device
        )
    sets = {
        "web": DatasetSpec(str(folder / "web"), 6.0),
        "scenes": DatasetSpec(str(folder / "scenes"), 1.0),
    }
    if name == "own":
        sets["web"].teachers, sets["scenes"].teachers = ["vit", "cnn"], ["next"]
    data = ShardDataModule(
        sets,
        val=str(folder / "scenes"),
        train_views=UnicViews(32),
        eval_views=LightViews(32, None),
        batch_size=GLOBAL_BATCH // world,
        num_workers=0,
        epoch_length=24,
    )
    notes = small.Notes()
    make = small.trainer if world == 1 else small.ddp_trainer
    trainer = make(folder, notes, check_val_every_n_epoch=2, max_epochs=2)
    trainer.fit(module, datamodule=data)
    kept: dict[str, Any] = {}
    module.on_save_checkpoint(kept)
    return {
        "totals": notes.totals,
        "losses": notes.losses,
        "keys": notes.keys,
        "run": sorted(set(run)),
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "facts": kept["teachers"],
    }


def fit_all(folder: Path) -> dict[str, Any]:
    found = {name: fit(folder, name, 2) for name in SCENARIOS}
    found["alone"] = refused(folder)
    return found


def refused(folder: Path) -> str:
    """Three groups and two ranks."""
    module = small.module(partition=[["vit"], ["cnn"], ["next"]])
    try:
        small.ddp_trainer(folder).fit(module, small.Data([small.batch()]))
    except ValueError as error:
        return f"{D.rank()}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    make_shards(folder / "web", [9, 14], size=(40, 36), name="w")
    make_shards(folder / "scenes", [5, 4], size=(40, 36), name="s")
    return folder


@pytest.fixture(scope="module")
def ranks(shards: Path) -> Any:
    return run_ranks(fit_all, 2, shards)


@pytest.fixture(scope="module")
def alone(shards: Path) -> Any:
    return cache(lambda name: fit(shards, name, world=1))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_one_process(name: str, ranks: Any, alone: Any) -> None:
    one, (a, b) = alone(name), [rank[name] for rank in ranks]
    assert [x + y for x, y in zip(a["keys"], b["keys"], strict=True)] == one["keys"]
    assert len(one["totals"]) == 6
    totals = [(x + y) / 2 for x, y in zip(a["totals"], b["totals"], strict=True)]
    assert totals == pytest.approx(one["totals"], rel=1e-5, abs=1e-6)
    for key, value in one["state"].items():
        assert torch.equal(a["state"][key], b["state"][key]), key
        assert torch.allclose(a["state"][key].double(), value.double(), rtol=1e-5, atol=2e-5), key
    for key in (k for k in one["metrics"] if k.startswith("epoch/loss")):
        for rank in (a, b):
            assert rank["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4), key
    assert a["facts"] == b["facts"] == one["facts"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "partition" in name])
def test_each_rank_runs_its_group_and_the_total_is_the_mean_of_their_means(
    name: str, ranks: Any
) -> None:
    a, b = (rank[name] for rank in ranks)
    groups = SCENARIOS[name]["partition"]
    assert a["run"] == sorted(groups[0])
    assert b["run"] == sorted(groups[1])
    if "dropper" in SCENARIOS[name]:
        return  # weights are not all 1
    for step, (x, y) in enumerate(zip(a["losses"], b["losses"], strict=True)):
        means = [x[n] for n in groups[0]] + [y[n] for n in groups[1]]
        total = (a["totals"][step] + b["totals"][step]) / 2
        assert total == pytest.approx(sum(means) / 3, rel=1e-5)


def test_validation_has_every_teacher_on_every_rank(ranks: Any) -> None:
    a, b = (rank["partition"]["metrics"] for rank in ranks)
    keys = {"val/loss", *(f"val/loss/{n}" for n in ("vit", "cnn", "next"))}
    assert keys <= a.keys()
    for key in keys:
        assert a[key] == b[key]
        assert a[key] > 0


def test_too_few_ranks(ranks: Any) -> None:
    for number, rank in enumerate(ranks):
        assert rank["alone"].startswith(f"{number}: partition has 3 groups and the run has 2")
        assert "nobody would run next" in rank["alone"]
