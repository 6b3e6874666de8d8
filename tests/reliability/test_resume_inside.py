"""Interrupted at any optimiser step and continued: the run is the uninterrupted one, bitwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import resuming

from multikd.callbacks import PrecomputeFeatures
from multikd.data.views import LightViews

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

EPOCHS = 2  # of four batches of five


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inside")
    make_shards(folder, [9, 14])
    return folder


def steps_of(paths: list[Path]) -> dict[int, Path]:
    return {int(re.search(r"step=(\d+)", path.name)[1]): path for path in paths}  # type: ignore[index]


def shards_of(folder: Path, **settings: Any) -> Any:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return resuming.data(urls, val=urls, bank=urls, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "own", "steps"),
    [
        ("unic", {}, {}, range(1, 9)),
        ("whole_teachers", {"accumulate_grad_batches": 2}, {"views": 2}, (1, 2)),
        ("dune", {"precision": "bf16-mixed", "val_check_interval": 2}, {}, (2, 3)),
    ],
)
def test_from_every_step(
    folder: Path, tmp_path: Path, name: str, settings: Any, own: Any, steps: Any
) -> None:
    """Checkpoints of every step (of some steps), the last of an epoch included."""
    fit = {"max_epochs": EPOCHS, **settings}
    save = {"every_n_train_steps": 1}
    out = tmp_path / "whole"
    whole = resuming.run(
        resuming.module(name), shards_of(folder, **own), out, save=dict(save), **fit
    )
    accumulate = settings.get("accumulate_grad_batches", 1)
    assert len(whole.places) == 4 * EPOCHS
    found = steps_of(list(out.glob("*.ckpt")))
    assert sorted(found) == list(range(1, 4 * EPOCHS // accumulate + 1))
    for step in steps:
        path = found[step]
        done = step * accumulate
        torch.manual_seed(1234 + step)  # another process has another state
        resumed = resuming.run(
            resuming.module(name),
            shards_of(folder, **own),
            tmp_path / str(step),
            resume=path,
            **fit,
        )
        resuming.same_from(whole, resumed, divmod(done, 4))
        # A validation that was due after the step that was saved has not run before: it runs now.
        at = divmod(done, 4) if done % 4 else (done // 4 - 1, 4)
        assert resumed.validations == [v for v in whole.validations if v >= at]


class SaveAt(pl.Callback):
    """Writes a checkpoint after one batch, whatever is being accumulated."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


def test_between_the_batches_of_a_step(folder: Path, tmp_path: Path) -> None:
    """As a checkpoint that is written every n minutes, or by a validation, may be."""
    fit: dict[str, Any] = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2}
    path = tmp_path / "half.ckpt"
    saver = SaveAt(path, batch=4)
    whole = resuming.run(resuming.module("unic"), shards_of(folder), tmp_path, saver, **fit)
    torch.manual_seed(5)
    resumed = resuming.run(
        resuming.module("unic"), shards_of(folder), tmp_path / "r", resume=path, **fit
    )
    resuming.same_from(whole, resumed, (1, 1))


def test_with_features_from_a_cache(folder: Path, tmp_path: Path) -> None:
    def shards() -> Any:
        views = LightViews(32, recorded=2)
        return shards_of(folder, train_views=[views], cache=str(tmp_path / "features"))

    precompute = PrecomputeFeatures(progress=False)
    out = tmp_path / "whole"
    save = {"every_n_train_steps": 1}
    whole = resuming.run(
        resuming.module("unic"), shards(), out, precompute, save=save, max_epochs=EPOCHS
    )
    path = steps_of(list(out.glob("*.ckpt")))[6]
    resumed = resuming.run(
        resuming.module("unic"),
        shards(),
        tmp_path / "r",
        precompute,
        resume=path,
        max_epochs=EPOCHS,
    )
    resuming.same_from(whole, resumed, (1, 2))
