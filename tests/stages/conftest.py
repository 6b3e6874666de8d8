"""Chains of tiny students on drawn images, trained in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablation.conftest import Place, place  # noqa: F401 (a fixture)

from multikd.fit import run_lightning
from multikd.runs.folder import CONFIG


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fits are done in this process, which has everything imported; their folders, in order."""
    done: list[str] = []

    def fit(folder: Path, packages: Sequence[str] = ()) -> None:
        done.append(folder.name)
        run_lightning(["fit", f"--config={folder / CONFIG}", "--resume", "auto"])

    monkeypatch.setattr("multikd.stages.run.fit_in_process", fit)
    monkeypatch.setattr("multikd.sizes.run.fit_in_process", fit)
    return done


def teacher(name: str) -> dict[str, Any]:
    """The export of a stage as the only teacher."""
    settings = {"encoder": f"exported:{{stage:{name}}}", "resize": "none", "dtype": "float32"}
    return {name: {"class_path": "multikd.teachers.Teacher", "init_args": settings}}


def write_chain(place: Place, path: Path, **change: Any) -> str:  # noqa: F811
    """Two teachers → a ViT; then on from it at a larger size, with it as the teacher."""
    bigger = {
        "model.student.checkpoint": "{stage:first}",
        "model.student.image_size": 48,
        "data.train_views.size": 48,
        "model.teachers": teacher("first"),
    }
    content = {
        "base": str(place.root / "base.yaml"),
        "settings": {"trainer.max_epochs": 2},
        # Written in another order than they run in.
        "stages": {"larger": {"settings": bigger}, "first": None},
    }
    path.write_text(yaml.safe_dump({**content, **change}, sort_keys=False), encoding="utf-8")
    return str(path)
