"""A run stopped between two epochs goes on as if it had not been: bit for bit on a CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from multikd.callbacks import DataFaults, FiniteLossGuard, KNNProbe, Throughput
from multikd.data.module import ShardDataModule
from multikd.data.views import UnicViews
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
from multikd.modules import DistillationModule
from multikd.normalizers import (
    BatchStandardizers,
    EMAStandardizers,
    FixedStandardizers,
    PHISNormalizers,
)
from multikd.optim import WarmupCosine

EPOCHS = 3  # dynamic weight average looks two epochs back

# Together they hold every kind of state. Drop path draws from torch's own generator.
RUNS: dict[str, dict[str, Any]] = {
    "unic": {
        "dropper": lambda: HardestKept(),
        "balancer": DynamicWeightAverage,
        "normalizers": EMAStandardizers(),
        "ema_decay": 0.95,
    },
    "whole_teachers": {
        "dropper": lambda: RandomTeachers(p=0.5),
        "balancer": InverseLossScale,
        "normalizers": FixedStandardizers(images=20),
        "accumulate": 2,
        "ema_decay": 0.95,
    },
    "dune": {
        "balancer": UncertaintyWeights,
        "normalizers": BatchStandardizers(),
        "terms": lambda: {"labels": LabelLoss()},
        "ema_decay": 0.5,
        "precision": "bf16-mixed",
    },
    "radio": {
        "normalizers": PHISNormalizers(images=36),
        "loss": LossSum({"summary": AngleLoss(), "patches": MSELoss(0.0, 1.0)}),
        "precision": "bf16-mixed",
    },
}


def made(name: str) -> tuple[DistillationModule, dict[str, Any]]:
    run = dict(RUNS[name])
    for key in ("dropper", "balancer", "terms"):
        if key in run:
            run[key] = run[key]()
    settings = {
        "accumulate_grad_batches": run.pop("accumulate", 1),
        "precision": run.pop("precision", "32-true"),
    }
    module = small.module(
        {"drop_path": 0.3, "num_classes": 10 if "terms" in run else 0},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3),
        schedule=WarmupCosine(warmup_epochs=1.5),
        **run,
    )
    return module, settings


class Stop(pl.Callback):
    """Breaks off in the middle of an epoch, as a kill would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.current_epoch == self.epoch and index == 1:
            raise KeyboardInterrupt


def fit(
    folder: Path,
    name: str,
    out: Path,
    *extra: pl.Callback,
    resume: Path | None = None,
    **settings: Any,
) -> tuple[small.Notes, dict[str, Tensor]]:
    module, own = made(name)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = ShardDataModule(
        urls, val=urls, bank=urls, train_views=UnicViews(32), batch_size=5, num_workers=0
    )
    notes = small.Notes()
    saver = ModelCheckpoint(out, "{epoch}", save_top_k=-1, **settings)
    callbacks = [notes, KNNProbe(k=3), FiniteLossGuard(), DataFaults(), Throughput(), *extra, saver]
    runner = small.trainer(out, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True, **own)
    try:
        runner.fit(module, datamodule=data, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        data.teardown()
    return notes, {k: v.clone() for k, v in module.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_shards(folder, [9, 14])  # four batches of five
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: fit(folder, name, tmp_path_factory.mktemp(name)))


# Where checkpoints are written: at the end of the epoch; after the validation before that end
# (Lightning's own choice with check_val_every_n_epoch, as in the demo); after the last batch.
MOMENTS: dict[str, dict[str, Any]] = {
    "epoch_end": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
    "last_batch": {"every_n_train_steps": 4},
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("unic", "epoch_end"),
        ("unic", "validation"),
        ("unic", "last_batch"),
        ("whole_teachers", "epoch_end"),
        ("whole_teachers", "validation"),
        ("dune", "epoch_end"),
        ("radio", "last_batch"),
    ],
)
def test_a_resumed_run_repeats_the_losses(
    folder: Path, uninterrupted: Any, tmp_path: Path, name: str, moment: str
) -> None:
    whole, final = uninterrupted(name)
    assert len(whole.losses) == 4 * EPOCHS
    stopped, _ = fit(folder, name, tmp_path / "stopped", Stop(epoch=2), **MOMENTS[moment])
    assert len(stopped.losses) == 4 * 2 + 1
    assert stopped.losses == whole.losses[:9]
    torch.manual_seed(1234)  # another process has another state
    torch.rand(7)
    (checkpoint,) = (tmp_path / "stopped").glob("epoch=1*.ckpt")
    resumed, again = fit(folder, name, tmp_path / "stopped", resume=checkpoint, **MOMENTS[moment])
    assert resumed.keys == whole.keys[8:]
    assert resumed.losses == whole.losses[8:]
    assert resumed.totals == whole.totals[8:]
    assert resumed.weights == whole.weights[8:]
    if name == "unic":  # two whole epochs are needed before weights differ
        assert all(weights == [1.0] * 3 for weights in whole.weights[:8])
        assert all(weights != [1.0] * 3 for weights in whole.weights[8:])
    assert final.keys() == again.keys()
    for key, value in final.items():
        assert torch.equal(value, again[key]), key


def test_drop_path_is_drawn_anew_each_batch_and_run(tmp_path: Path) -> None:
    """Seeding each batch must not make batches, epochs or runs of another seed alike."""
    draws: dict[int, list[Tensor]] = {}

    class Draw(pl.Callback):
        def on_after_backward(self, trainer: Any, module: Any) -> None:
            draws[int(module.seed)].append(torch.rand(4))

    for seed in (0, 1):
        module = small.module(seed=seed)
        draws[int(module.seed)] = []
        data = small.Data([small.batch()] * 2)
        small.trainer(tmp_path, Draw(), max_epochs=3).fit(module, datamodule=data)
    seen = [tuple(draw.tolist()) for row in draws.values() for draw in row]
    assert len(draws) == 2
    assert len(set(seen)) == 2 * 3 * 2


def test_loading_is_strict(tmp_path: Path) -> None:
    module = small.module(ema_decay=0.9)
    state = module.state_dict()
    assert not [key for key in state if key.startswith("teachers.")]
    small.module(ema_decay=0.9, seed=5).load_state_dict(state)  # teachers are not missed
    for lost in (
        "student.model.patch_embed.proj.weight",
        "ladder.projectors.cnn.0.summary.weight",
        "normalizers.vit.patches_std",
        "average.student.model.pos_embed",
        "seed",
    ):
        assert lost in state
        part = {k: v for k, v in state.items() if k != lost}
        with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
            module.load_state_dict(part)
    with pytest.raises(RuntimeError, match="Unexpected key.*teachers"):
        module.load_state_dict({**state, "teachers.vit.weight": torch.zeros(1)})


def test_a_checkpoint_of_another_set_of_teachers_is_refused(tmp_path: Path) -> None:
    module = small.module(teachers=small.teachers(2))
    runner = small.trainer(tmp_path)
    runner.fit(module, datamodule=small.Data([small.batch()]))
    runner.save_checkpoint(tmp_path / "two.ckpt")
    other = small.trainer(tmp_path, max_epochs=2)
    with pytest.raises(RuntimeError, match=r"Missing key.*ladder\.projectors\.next"):
        other.fit(
            small.module(), datamodule=small.Data([small.batch()]), ckpt_path=tmp_path / "two.ckpt"
        )
