"""A small study of little teachers on drawn images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from data.shard_maker import make_shards

from multikd.ablation import commands
from multikd.ablation.plan import Run
from multikd.ablation.state import StudyFolder
from multikd.ablation.worker import work_on


@dataclass
class Place:
    """A folder with shards, weights, a base config and a study, and ways to change it."""

    root: Path

    def study(self, name: str = "changed", **change: Any) -> str:
        content = yaml.safe_load((self.root / "study.yaml").read_text(encoding="utf-8"))
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, **change}, sort_keys=False), encoding="utf-8")
        return str(path)


def _teacher(root: Path, kind: str) -> dict[str, Any]:
    return {
        "class_path": "multikd.teachers.Teacher",
        "init_args": {
            "encoder": f"timm:{kind}",
            "checkpoint": str(root / f"{kind}.pth"),
            "resize": "none" if kind == "test_resnet" else "own",
            "image_size": None if kind == "test_resnet" else 32,
            "dtype": "float32",
        },
    }


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    for kind, settings in (("test_vit", {"img_size": 32}), ("test_resnet", {})):
        torch.save(timm.create_model(kind, num_classes=0, **settings).state_dict(),
                   root / f"{kind}.pth")  # fmt: skip
    make_shards(root / "train", [24], size=(32, 32))
    make_shards(root / "test", [20], name="t", size=(32, 32))
    base = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
                    "limit_val_batches": 0},
        "model": {
            "class_path": "multikd.modules.DistillationModule",
            "init_args": {
                "teachers": {
                    "vit": _teacher(root, "test_vit"), "cnn": _teacher(root, "test_resnet"),
                },
                "student": {"class_path": "multikd.students.StudentEncoder",
                            "init_args": {"name": "test_vit", "image_size": 32, "rungs": [-1]}},
                "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
                "lr_batch": None,
            },
        },
        "data": {
            "class_path": "multikd.data.module.ShardDataModule",
            "init_args": {
                "train": str(root / "train"), "batch_size": 8, "num_workers": 0,
                "train_views": {"class_path": "multikd.data.views.LightViews",
                                "init_args": {"size": 32, "recorded": 1}},
            },
        },
    }  # fmt: skip
    tasks = {
        "data": {"drawn": {"train": str(root / "train"), "test": str(root / "test"), "size": 32}},
        # The second is finer than the share of so few images.
        "tasks": {
            "knn": {"protocol": "KNN", "data": "drawn", "ks": [3]},
            "map": {"protocol": "Retrieval", "data": "drawn"},
        },
    }
    study = {"base": str(root / "base.yaml"), "tasks": str(root / "tasks.yaml"), "seeds": [0, 1],
             "cache": {"dtype": "float32"}, "diagnose": 2}  # fmt: skip
    for name, content in (("base", base), ("tasks", tasks), ("study", study)):
        (root / f"{name}.yaml").write_text(
            yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
        )
    return Place(root)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are done in this process, which has everything imported."""

    class InProcess:
        def __init__(self, study: StudyFolder, count: int = 1) -> None:
            self.study = study

        def __call__(self, runs: Sequence[Run], progress: Callable[[], None]) -> None:
            work_on(self.study.out, [run.name for run in runs])
            progress()

    monkeypatch.setattr(commands, "Processes", InProcess)


WORTH = {"vit": 0.10, "cnn": 0.06}


def made_up(run: Run, out: Path, tasks: str, data: tuple[str, ...]) -> dict[str, Any]:
    """In place of training: a score that follows from the combination and the seed."""
    entry = {"metric": "top1", "unit": "%", "higher_is_better": True, "in_mean": True}
    if run.kind == "cache":
        return {"bytes_on_disk": 1000, "seconds": 1.0}
    if run.kind == "teachers":
        return {
            "scores": {n: {"knn": {"value": 0.5 + w, **entry}} for n, w in WORTH.items()},
            "costs": {n: {"encoder": n, "parameters": 10, "seconds_per_image": 0.001 * (i + 1),
                          "bytes": 10} for i, n in enumerate(WORTH)},
            "seconds": 1.0,
        }  # fmt: skip
    subset = run.combination.subset
    value = 0.3 + sum(WORTH[n] for n in subset) - 0.02 * (len(subset) == 2)
    value += 0.001 * run.seed + 0.004 * ("good" in run.combination.setting)
    return {"scores": {"knn": {"value": value, **entry}}, "seconds": 2.0,
            "diagnostics": {f"gradient/share/{n}": 1 / len(subset) for n in subset}}  # fmt: skip
