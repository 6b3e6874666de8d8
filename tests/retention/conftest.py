"""A tiny run (two teachers, one student), tiny images, and the ways to name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fitting import Run, fit
from PIL import Image

from multikd.export import CardFacts, export_timm_folder
from multikd.students import StudentEncoder


def write_folder(root: Path, counts: dict[str, int], seed: int = 0, size: int = 40) -> Path:
    """Class folders of noisy PNGs, each class around a colour of its own."""
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = np.array([60 * number, 200 - 50 * number, 90], dtype=np.float64)
            noise = random.normal(0, 40, (size, size + 8, 3))
            pixels = (colour + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained for an epoch; EMA kept; heads for ``vit`` and ``net``."""
    from data.shard_maker import make_shards

    root = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(1)
    for name in ("test_vit2", "test_resnet"):
        export_timm_folder(
            StudentEncoder(name, image_size=32), root / name, card=CardFacts(licence="mit")
        )
    make_shards(root / "shards", [32])
    teachers = {
        name: {
            "class_path": "multikd.teachers.Teacher",
            "init_args": {"encoder": f"exported:{root / kind}", "dtype": "bfloat16"},
        }
        for name, kind in (("vit", "test_vit2"), ("net", "test_resnet"))
    }
    model = {
        "teachers": teachers,
        "student": {
            "class_path": "multikd.students.StudentEncoder",
            "init_args": {"name": "test_vit", "image_size": 32},
        },
        "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
        "ema_decay": 0.5,
    }
    return fit(root / "fit", model, root / "shards")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test``, three classes."""
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "train", {"ash": 14, "elm": 14, "oak": 14}, seed=1)
    write_folder(root / "test", {"ash": 7, "elm": 7, "oak": 7}, seed=2)
    return root
