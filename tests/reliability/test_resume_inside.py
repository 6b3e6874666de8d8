"""Interrupted at any optimiser step and continued: the run is the uninterrupted one, bitwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import resuming

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
    ("name", "settings", "own"),
    [
        ("unic", {}, {}),
        ("whole_teachers", {"accumulate_grad_batches": 2}, {"views": 2}),
        ("dune", {"precision": "bf16-mixed", "val_check_interval": 2}, {}),
    ],
)
def test_from_every_step(folder: Path, tmp_path: Path, name: str, settings: Any, own: Any) -> None:
    """Checkpoints of every step, the last of an epoch included."""
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
    for step, path in sorted(found.items()):
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
