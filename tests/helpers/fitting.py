"""A short ``fit`` through the command that users call."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Run:
    """A finished ``fit``."""

    folder: Path
    config: dict[str, Any]
    checkpoint: Path
    shards: Path


def fit(folder: Path, model: dict[str, Any], shards: Path) -> Run:
    """Train one epoch over the shards, through the command that users call."""
    from multikd.fit import run_lightning

    checkpoints = {"dirpath": str(folder / "ckpt"), "save_last": True, "save_top_k": 0}
    config = {
        "seed_everything": 3,
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": str(folder),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": checkpoints,
                }
            ],
        },
        "model": {"class_path": "multikd.modules.DistillationModule", "init_args": model},
        "data": {
            "class_path": "multikd.data.module.ShardDataModule",
            "init_args": {
                "train": str(shards),
                "train_views": {
                    "class_path": "multikd.data.views.LightViews",
                    "init_args": {"size": 32},
                },
                "batch_size": 16,
                "num_workers": 0,
            },
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        # Lightning calls jsonargparse in a way that it deprecates; what we test comes after it.
        warnings.simplefilter("ignore")
        run_lightning(["fit", "--config", str(path)])
    return Run(folder, config, folder / "ckpt" / "last.ckpt", shards)
