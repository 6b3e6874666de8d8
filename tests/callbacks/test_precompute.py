"""PrecomputeFeatures: the features of a cache are those of live teachers, and no teacher runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks
from lightning.pytorch import LightningDataModule
from torch import Tensor

from multikd.callbacks import PrecomputeFeatures
from multikd.data.cache import CacheStorage
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.losses import HardestKept, RandomTeachers
from multikd.modules import DistillationModule
from multikd.types import TokenFeatures

SAMPLES, VIEWS, BATCH = 22, 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precompute")
    make_shards(folder, [9, SAMPLES - 9])
    return folder


def data_of(folder: Path, cache: Path | None, **settings: Any) -> ShardDataModule:
    urls = sorted(map(str, folder.glob("*.tar")))
    made: dict[str, Any] = {
        "train_views": LightViews(32, recorded=VIEWS),
        "batch_size": BATCH,
        "num_workers": 0,
        "cache": None if cache is None else str(cache),
        "cache_dtype": "float32",
    }
    return ShardDataModule(urls, **{**made, **settings})


class Calls:
    """Counts how many images each teacher of a module was run on; can break off."""

    def __init__(self, module: DistillationModule, stop_after: int | None = None) -> None:
        self.images = dict.fromkeys(module.teacher_names, 0)
        self.stop_after = stop_after
        self._run = module.run_teacher
        module.run_teacher = self  # type: ignore[method-assign, assignment]

    def __call__(self, name: str, images: Tensor) -> TokenFeatures:
        if self.stop_after is not None and self.images[name] >= self.stop_after:
            raise RuntimeError("the power went out")
        self.images[name] += len(images)
        return self._run(name, images)


def fit(
    folder: Path, out: Path, cache: Path | None, make: Any = small.trainer, **settings: Any
) -> tuple[small.Notes, dict[str, int]]:
    module = small.module(
        dropper=settings.pop("dropper", HardestKept()),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05),
        teachers=settings.pop("teachers", small.teachers()),
    )
    calls = Calls(module, settings.pop("stop_after", None))
    notes = small.Notes()
    callbacks = [notes] if cache is None else [notes, PrecomputeFeatures(progress=False)]
    runner = make(out, *callbacks, max_epochs=3)
    runner.fit(module, datamodule=data_of(folder, cache, **settings))
    return notes, calls.images


def losses(notes: small.Notes) -> list[dict[str, Any]]:
    return [pytest.approx(row, rel=1e-5) for row in notes.losses]


def test_a_cached_run_equals_one_with_live_teachers(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    live, ran = fit(folder, tmp_path, None)
    assert ran == dict.fromkeys(ran, 3 * 20)  # five batches of four, three epochs
    first, ran = fit(folder, tmp_path, cache)
    assert ran == dict.fromkeys(ran, 1 + SAMPLES * VIEWS)  # one blank image for the shapes
    assert first.keys == live.keys
    assert first.losses == losses(live)
    second, ran = fit(folder, tmp_path, cache)
    assert ran == dict.fromkeys(ran, 0)
    assert second.losses == first.losses
    # Whole teachers dropped read the same cache.
    dropping = RandomTeachers(p=0.5, seed=1)
    live, _ = fit(folder, tmp_path, None, dropper=dropping)
    cached, ran = fit(folder, tmp_path, cache, dropper=dropping)
    assert cached.losses == losses(live)
    assert sum(ran.values()) == 0


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [
        (CacheStorage("float32"), 1e-5),
        (CacheStorage("float16"), 1e-2),
        (CacheStorage("int8"), 2e-2),
    ],
)
def test_less_precise_features_train_nearly_the_same(
    folder: Path, tmp_path: Path, storage: CacheStorage, tolerance: float
) -> None:
    live, _ = fit(folder, tmp_path, None)
    cached, ran = fit(folder, tmp_path, tmp_path / "cache", cache_storage=storage)
    assert cached.keys == live.keys
    assert cached.losses == [pytest.approx(row, rel=tolerance) for row in live.losses]
    examples = SAMPLES * VIEWS if storage.measured("summary") else 1
    assert ran == dict.fromkeys(ran, examples + SAMPLES * VIEWS)


def test_interrupted_it_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="the power went out"):
        fit(folder, tmp_path, cache, stop_after=1 + 3 * BATCH)
    notes, ran = fit(folder, tmp_path, cache)
    # Of a batch that was broken off, all teachers run again.
    assert ran == dict.fromkeys(ran, 1 + SAMPLES * VIEWS - 3 * BATCH)
    live, _ = fit(folder, tmp_path, None)
    assert notes.losses == losses(live)


def test_another_teacher_is_added_to_a_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fit(folder, tmp_path, cache, teachers=small.teachers(1))
    _, ran = fit(folder, tmp_path, cache, teachers=small.teachers(2))
    assert ran["cnn"] == 1 + SAMPLES * VIEWS


def test_a_cache_of_something_else_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fit(folder, tmp_path, cache, teachers=small.teachers(1))
    other = {"vit": small.teacher("test_vit", 48, seed=2)}
    with pytest.raises(ValueError, match="fingerprint of teacher 'vit'"):
        fit(folder, tmp_path, cache, teachers=other)
    with pytest.raises(ValueError, match="'policy'"):
        fit(
            folder, tmp_path, cache, teachers=small.teachers(1),
            train_views=LightViews(32, flip=0.1, recorded=VIEWS),
        )  # fmt: skip
    with pytest.raises(ValueError, match="'views'"):
        fit(
            folder, tmp_path, cache, teachers=small.teachers(1),
            train_views=LightViews(32, recorded=3),
        )  # fmt: skip


def test_a_teacher_on_the_students_grid_depends_on_its_patch(folder: Path, tmp_path: Path) -> None:
    """A cache of 16-pixel student patches is not one of 8-pixel patches."""

    def run(patch: int) -> None:
        module = small.module(
            teachers={"cnn": small.teacher("test_resnet", image_size=64, resize="grid")},
            student=small.student(patch_size=patch),
        )
        runner = small.trainer(tmp_path, PrecomputeFeatures(progress=False))
        runner.fit(module, datamodule=data_of(folder, tmp_path / "cache"))

    run(16)
    with pytest.raises(ValueError, match="fingerprint of teacher 'cnn'.*patches of 16 px.*of 8 px"):
        run(8)


def test_it_says_what_it_needs(folder: Path, tmp_path: Path) -> None:
    runner = small.trainer(tmp_path, PrecomputeFeatures())
    with pytest.raises(ValueError, match=r"set data\.init_args\.cache"):
        runner.fit(small.module(), datamodule=data_of(folder, None))
    other: LightningDataModule = small.Data([small.batch()])
    with pytest.raises(ValueError, match="works with multikd's ShardDataModule"):
        small.trainer(tmp_path, PrecomputeFeatures()).fit(small.module(), datamodule=other)


def on_ranks(folder: Path, out: Path) -> dict[str, Any]:
    live, _ = fit(folder, out, None, make=small.ddp_trainer, batch_size=2)
    cached, ran = fit(folder, out, out / "cache", make=small.ddp_trainer, batch_size=2)
    return {"live": live.losses, "cached": cached.losses, "ran": ran}


def test_ranks_share_the_work(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, folder, tmp_path)
    for rank in (first, second):
        assert rank["cached"] == [pytest.approx(row, rel=1e-5) for row in rank["live"]]
        assert all(count == 1 + SAMPLES * VIEWS / 2 for count in rank["ran"].values())
    # And the cache serves a run of one process.
    _, ran = fit(folder, tmp_path, tmp_path / "cache")
    assert sum(ran.values()) == 0
