"""Every objective in the training module: two ranks, a kill and a resume, a cache, an export."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from multikd.callbacks import PrecomputeFeatures
from multikd.callbacks.precompute import settle_logits
from multikd.data.cache_record import CacheSource, TeacherRecord, write_meta
from multikd.data.cache_storage import CacheStorage
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.losses import (
    AttentionTransferTerm,
    Curriculum,
    HintTerm,
    LabelLoss,
    NoFeatureLoss,
    RandomTeachers,
    ResponseTerm,
    RKDTerm,
    SimilarityPreservingTerm,
    UncertaintyWeights,
)
from multikd.modules import DistillationModule
from multikd.teachers import Teacher
from multikd.teachers.encoder import BackboneEncoder
from multikd.types import TokenFeatures

EPOCHS = 2


@cache
def classifying(name: str, classes: int) -> Teacher:
    """A little teacher with a classifier, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        model = timm.create_model(name, num_classes=classes)
    return Teacher(BackboneEncoder(model, name=name, image_size=64))


def two() -> dict[str, Teacher]:
    return {"cnn": classifying("test_resnet", 10), "other": classifying("test_convnext", 7)}


# What is made anew for each run.
OBJECTIVES: dict[str, Any] = {
    "response": lambda: {
        "teachers": two(),
        "terms": {"response": ResponseTerm(alpha=0.5, own_heads=["other"])},
    },
    "hint": lambda: {
        "teachers": small.teachers(2),
        "terms": {"hint": HintTerm(teachers=["cnn"], rung=-2, layer=2), "l": LabelLoss()},
    },
    "attention": lambda: {"terms": {"at": AttentionTransferTerm(rungs=[0, -1]), "l": LabelLoss()}},
    "rkd": lambda: {"terms": {"rkd": RKDTerm(), "l": LabelLoss(kind="generalised")}},
    "similarity": lambda: {"terms": {"sp": SimilarityPreservingTerm(weight=10.0)}},
    "labels": lambda: {"teachers": {}, "terms": {"l": LabelLoss(kind="symmetric")}},
    "curriculum": lambda: {
        "teachers": {"a": classifying("test_resnet", 10), "b": classifying("test_vit2", 10)},
        "terms": {"response": ResponseTerm(temperature=2.0, decoupled=True)},
        "curriculum": Curriculum("disagreement", start=0.4, end=0.8),
    },
    # Beside a ladder of one teacher of two, of which whole ones are left out.
    "mixed": lambda: {
        "teachers": two(),
        "loss": None,
        "teacher_losses": {"other": NoFeatureLoss()},
        "dropper": RandomTeachers(p=0.6, seed=1),
        "balancer": UncertaintyWeights(),
        "terms": {
            "response": ResponseTerm(teachers={"other": 1.0}, own_heads=["other"]),
            "l": LabelLoss(),
        },
        "curriculum": Curriculum(teachers=["cnn"], start=0.5, end=1.0),
    },
}


def made(name: str) -> DistillationModule:
    return small.module(
        {"num_classes": 0 if name == "similarity" else 10},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        **{"loss": NoFeatureLoss(), **OBJECTIVES[name]()},
    )


class Stop(pl.Callback):
    """Breaks off in the middle of the second epoch, as a kill would."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.current_epoch == 1 and index == 1:
            raise KeyboardInterrupt


def fit(
    folder: Path,
    name: str,
    world: int = 1,
    callbacks: Any = (),
    resume: Path | None = None,
    cached: Path | None = None,
) -> dict[str, Any]:
    module = made(name)
    start = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = ShardDataModule(
        urls,
        val=None if cached else urls,  # which teachers see live
        train_views=LightViews(32, recorded=2),
        batch_size=8 // world,
        eval_batch_size=12 // world,
        num_workers=0,
        cache=None if cached is None else str(cached),
        cache_dtype="float32",
    )
    notes = small.Notes()
    make = small.trainer if world == 1 else small.ddp_trainer
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "check_val_every_n_epoch": EPOCHS}
    if any(isinstance(c, ModelCheckpoint) for c in callbacks):
        settings["enable_checkpointing"] = True
    runner = make(folder, notes, *callbacks, **settings)
    try:
        runner.fit(module, datamodule=data, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        data.teardown()
    same = [n for n, p in module.named_parameters() if n in start and torch.equal(p, start[n])]
    return {
        "totals": notes.totals,
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "metrics": {k: float(v) for k, v in runner.callback_metrics.items()},
        "same": same,
        "module": None if world > 1 else module,
    }


def fit_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: fit(folder, name, world=2) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terms")
    make_shards(folder, [9, 15], size=(40, 36))  # three batches of eight
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return cache(lambda name: fit(folder, name))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(fit_all, 2, folder)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_learn_as_one_process_does(name: str, ranks: Any, alone: Any) -> None:
    one, (a, b) = alone(name), [rank[name] for rank in ranks]
    assert len(one["totals"]) == 3 * EPOCHS
    assert not one["same"]  # whatever is trained has moved
    totals = [(x + y) / 2 for x, y in zip(a["totals"], b["totals"], strict=True)]
    assert totals == pytest.approx(one["totals"], rel=2e-4)
    assert all(torch.equal(v, b["state"][k]) for k, v in a["state"].items() if "running" not in k)
    if name != "labels":
        assert a["totals"] != b["totals"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_killed_run_goes_on_bit_for_bit(
    name: str, folder: Path, alone: Any, tmp_path: Path
) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    whole = alone(name)
    stopped = fit(folder, name, callbacks=[Stop(), saver()])
    assert stopped["totals"] == whole["totals"][:4]
    (checkpoint,) = tmp_path.glob("epoch=0*.ckpt")
    resumed = fit(folder, name, callbacks=[saver()], resume=checkpoint)
    assert resumed["totals"] == whole["totals"][3:]
    state: dict[str, Tensor] = resumed["state"]
    assert all(torch.equal(value, state[key]) for key, value in whole["state"].items())


@pytest.mark.parametrize("name", ["response", "curriculum", "mixed", "rkd"])
def test_a_cache_gives_what_live_teachers_give(
    name: str, folder: Path, alone: Any, tmp_path: Path
) -> None:
    def cached() -> dict[str, Any]:
        return fit(folder, name, callbacks=[PrecomputeFeatures(False)], cached=tmp_path / "cache")

    assert cached()["totals"] == pytest.approx(alone(name)["totals"], rel=1e-5)
    module = made(name)
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationModule, "run_teacher", lambda *args: ran.append(args))
        assert cached()["totals"] == pytest.approx(alone(name)["totals"], rel=1e-5)
    assert not ran
    assert bool(module.logits_of) == (name != "rkd")


def test_what_a_cache_does_not_keep_is_said_before_training(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="term 'hint' reads a layer of teacher 'cnn'"):
        settle_logits(made("hint"), folder)
    with pytest.raises(ValueError, match="keeps features of teachers, and this run has none"):
        settle_logits(made("labels"), folder)
    summary = torch.zeros(1, 4)
    kept = {
        "cnn": TeacherRecord.of("f", TokenFeatures(summary), CacheStorage()),
        "other": TeacherRecord.of("f", TokenFeatures(summary, logits=summary), CacheStorage()),
    }
    write_meta(tmp_path, CacheSource("data", (1,), 1, {}, 0), kept)
    with pytest.raises(ValueError, match="reads the logits of teacher 'cnn'.* does not keep"):
        settle_logits(made("response"), folder)
    module = small.module(teachers=two())
    settle_logits(module, folder)
    assert module.logits_of == {"other"}  # which the cache keeps, so that it can be gone on with
