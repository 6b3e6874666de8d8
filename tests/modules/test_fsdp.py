"""FSDP2 (Lightning's ModelParallelStrategy) on two gloo ranks: a ViT student, data parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from multikd.callbacks import FiniteLossGuard, KNNProbe
from multikd.checkpoints import CHECKPOINT_KEY, load_student
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.losses import (
    HardestKept,
    LabelLoss,
    RandomTeachers,
    TeacherDropper,
    UncertaintyWeights,
)
from multikd.modules.sharding import repeated_blocks, shard_modules

CONFIG = """
model:
  class_path: multikd.modules.DistillationModule
  init_args:
    student:
      class_path: multikd.students.StudentEncoder
      init_args: {name: test_vit, image_size: 32, num_classes: 10}
"""


class ConfigNote(pl.Callback):
    """What ``multikd fit`` adds to a checkpoint."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {"version": "0", "config": CONFIG}


class Sharded(pl.Callback):
    """What was sharded, seen at a step."""

    def __init__(self) -> None:
        self.plain: list[str] = []
        self.units: list[str] = []
        self.gradients: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.plain = [n for n, p in module.named_parameters() if not isinstance(p, DTensor)]
        self.units = [n for n, m in module.named_modules() if isinstance(m, FSDPModule)]
        named = list(module.named_parameters())
        self.gradients = {n for n, p in named if p.requires_grad and p.grad is None}
        assert all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])


def fit(
    folder: Path, dropper: TeacherDropper, fsdp: bool, save: Path | None = None, **more: Any
) -> Any:
    module = small.module(
        {"num_classes": 10},
        dropper=dropper,
        balancer=UncertaintyWeights(),
        terms={"labels": LabelLoss(0.1)},
        ema_decay=0.9,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    )
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = ShardDataModule(
        urls, val=urls, bank=urls, train_views=LightViews(32), batch_size=4, num_workers=0
    )
    notes, sharded = small.Notes(), Sharded()
    settings: dict[str, Any] = {"gradient_clip_val": 0.5, "max_epochs": 2, "log_every_n_steps": 1}
    callbacks: list[pl.Callback] = [notes, KNNProbe(k=3), FiniteLossGuard(), ConfigNote()]
    if fsdp:
        settings["strategy"] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        callbacks.append(sharded)
    if save is not None:
        settings["enable_checkpointing"] = True
        callbacks.append(ModelCheckpoint(save, "{epoch}", save_top_k=-1))
    memory = small.Memory()
    runner = small.ddp_trainer(folder, *callbacks, logger=memory, **{**settings, **more})
    ckpt = None if save is None or not (save / "resume.ckpt").exists() else save / "resume.ckpt"
    runner.fit(module, datamodule=data, ckpt_path=ckpt)
    return {
        "losses": notes.losses,
        "plain": sharded.plain,
        "units": sharded.units,
        "without": sharded.gradients,
        "knn": memory.values("val/knn"),
        "norms": memory.values("train/grad_norm/student"),
    }


def scenarios(folder: Path) -> dict[str, Any]:
    found = {
        "ddp": fit(folder, HardestKept(), fsdp=False),
        "fsdp": fit(folder, HardestKept(), fsdp=True, save=folder / "run"),
        "whole": fit(folder, RandomTeachers(p=0.5, seed=1), fsdp=True),
        "whole_ddp": fit(folder, RandomTeachers(p=0.5, seed=1), fsdp=False),
    }
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "run" / "epoch=0.ckpt").rename(folder / "run" / "resume.ckpt")
    torch.distributed.barrier()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        shard_modules([nn.Linear(2, 2)], mesh)
    found["resumed"] = fit(folder, HardestKept(), fsdp=True, save=folder / "run")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    make_shards(folder, [25])
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(scenarios, 2, folder)


@pytest.mark.slow
def test_everything_trained_is_sharded_and_nothing_lacks_a_gradient(ranks: Any) -> None:
    for rank in ranks:
        assert rank["fsdp"]["plain"] == []
        units = rank["fsdp"]["units"]
        assert {"student", "ladder", "balancer", "average.student"} <= set(units)
        assert "student.model.blocks.0" in units
        assert "ladder.projectors.vit.0" in units
        assert not any(name.startswith("teachers") for name in units)
        assert not rank["fsdp"]["without"]
        assert not rank["whole"]["without"]


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "ddp"), [("fsdp", "ddp"), ("whole", "whole_ddp")])
def test_the_losses_are_those_of_ddp(ranks: Any, fsdp: str, ddp: str) -> None:
    for rank in ranks:
        assert len(rank[fsdp]["losses"]) == 6
        for got, expected in zip(rank[fsdp]["losses"], rank[ddp]["losses"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
        assert rank[fsdp]["knn"] == rank[ddp]["knn"]
        assert rank[fsdp]["norms"] == pytest.approx(rank[ddp]["norms"], rel=1e-3)


@pytest.mark.slow
def test_a_full_checkpoint_gives_the_student(ranks: Any, folder: Path) -> None:
    last = folder / "run" / "epoch=1.ckpt"
    assert last.is_file()
    averaged, raw = load_student(last), load_student(last, "raw")
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    assert set(averaged.teachers) == {"vit", "cnn", "next"}
    state = torch.load(last, weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith("teachers.")]
    weight = raw.student.model.blocks[0].mlp.fc1.weight  # type: ignore[index, union-attr]
    assert torch.equal(weight, state["student.model.blocks.0.mlp.fc1.weight"])  # type: ignore[arg-type]
    initial = small.student(num_classes=10).model.blocks[0].mlp.fc1.weight  # type: ignore[index, union-attr]
    assert not torch.equal(weight, initial)  # type: ignore[arg-type]
    assert torch.isfinite(raw.student(torch.rand(2, 3, 32, 32)).features.logits).all()


@pytest.mark.slow
def test_a_run_resumes(ranks: Any) -> None:
    for rank in ranks:
        assert rank["resumed"]["losses"] == rank["fsdp"]["losses"][3:]


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("test_vit", "model.blocks.0", 6),
        ("swin_tiny_patch4_window7_224", "model.layers.0", 4),
        ("test_convnext", "model.stages.0", 4),
        ("test_efficientnet", None, None),
        ("test_resnet", None, None),
    ],
)
def test_the_units_are_the_blocks(name: str, first: str | None, count: int | None) -> None:
    student = small.student(name, 64)
    names = {id(module): n for n, module in student.named_modules()}
    blocks = list(repeated_blocks(student))
    assert len(blocks) == (count or len(blocks)) > 1
    if first is not None:
        assert names[id(blocks[0])] == first
    inside = [id(m) for block in blocks for m in block.modules()]
    assert len(inside) == len(set(inside))  # none within another
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    assert parameters > 0.5 * sum(p.numel() for p in student.parameters())


def test_leaves_are_no_units() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(repeated_blocks(nn.ModuleDict({"a": plain}))) == []
