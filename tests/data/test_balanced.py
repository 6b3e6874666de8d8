"""Balanced batches and schedules of views: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.shard_maker import make_shards

from multikd.data.balanced import BalancedOrder
from multikd.data.module import DatasetSpec, ShardDataModule
from multikd.data.order import EpochOrder
from multikd.data.schedule import ViewSchedule
from multikd.data.views import LightViews, UnicViews

LENGTHS = [[50, 30], [7], [40, 1, 20]]
WEIGHTS = (2.0, 1.0, 1.0)


def order(batch: int = 12, **settings: Any) -> BalancedOrder:
    return BalancedOrder(LENGTHS, WEIGHTS, batch, ("a", "b", "c"), **settings)


@pytest.mark.parametrize("batch", [4, 12, 16])
def test_every_batch_holds_the_same_number_of_each_and_so_do_the_ranks(batch: int) -> None:
    made = order(batch)
    whole = made.length // batch
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    for epoch in (0, 3):
        found = made.locate(epoch, np.arange(whole * batch)).dataset.reshape(whole, batch)
        for row in found:
            assert np.bincount(row, minlength=3).tolist() == (shares * batch).tolist()
            for world in (2, 4):
                for part in row.reshape(world, -1):
                    off = np.abs(np.bincount(part, minlength=3) - shares * len(part))
                    assert off.max() <= 1


def test_counts_that_no_batch_can_hold_exactly_are_the_nearest_and_the_same() -> None:
    made = BalancedOrder(LENGTHS, (1.0, 1.0, 1.0), 16, ("a", "b", "c"))
    assert sorted(made.counts) == [5, 5, 6]
    found = made.locate(1, np.arange(144)).dataset.reshape(9, 16)
    assert {tuple(np.bincount(row, minlength=3)) for row in found} == {made.counts}


def test_a_data_set_runs_on_from_batch_to_batch_and_epoch_to_epoch() -> None:
    made, plain = order(seed=5), EpochOrder(LENGTHS[:1], seed=5)
    seen: list[int] = []
    for epoch in range(3):
        found = made.locate(epoch, np.arange(made.length))
        assert sum(made.quotas) == made.length
        for number in range(3):
            assert int((found.dataset == number).sum()) == made.quotas[number]
        seen += found.sample[found.dataset == 0].tolist()
    assert sorted(seen[:80]) == list(range(80))  # its own first pass, each sample once
    assert seen[:80] == plain.locate(0, np.arange(80)).sample.tolist()
    # Any places in any order, as after a resumption.
    places = np.array([17, 3, 99, 3])
    whole = made.locate(2, np.arange(made.length))
    some = made.locate(2, places)
    assert all(np.array_equal(a, b[places]) for a, b in zip(some, whole, strict=True))
    assert made.shards_ahead(2, 50)[0]


def test_a_batch_too_small_for_a_data_set() -> None:
    with pytest.raises(ValueError, match="a balanced batch of 2 images has none of data set 'c'"):
        order(2)


def test_views_alternate_by_the_number_of_the_batch() -> None:
    made = ViewSchedule(3, "alternate", (2.0, 1.0, 1.0), (None, 4, 2))
    drawn = [made.views(1, 0, n) for n in range(2000)]
    share = np.bincount([v for (v,) in drawn], minlength=3) / 2000
    assert np.abs(share - [0.5, 0.25, 0.25]).max() < 0.05
    assert drawn == [made.views(1, 0, n) for n in range(2000)]
    assert drawn != [made.views(1, 1, n) for n in range(2000)]
    assert drawn != [made.views(2, 0, n) for n in range(2000)]
    assert [made.shown(v, 8) for v in range(3)] == [8, 4, 2]
    assert ViewSchedule(2).views(1, 0, 7) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"view_mode": "alternate"}, "needs two or more views"),
        ({"view_mode": "both"}, "unknown view_mode 'both'"),
        ({"view_shares": [1.0]}, "set view_mode to alternate"),
        ({"view_images": [2, 3]}, "has 2 entries and train_views 1"),
        ({"view_images": [0]}, "must be 1 or more, or null"),
        ({"balanced": True}, "set data.train to a mixture"),
        (
            {"train": {"a": DatasetSpec("x", views=LightViews(64))}},
            r"views of data set 'a' have \[64\] px and train_views \[32\]",
        ),
        (
            {"train": {"a": DatasetSpec("x", views=LightViews(32, recorded=2))}},
            "has views of its own, and recorded views",
        ),
        (
            {"sequential": True, "epoch_batches": 2, "view_images": [2]},
            "the sequential mode shows all views",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShardDataModule(**{"train": "x", "train_views": LightViews(32), **settings})


# --- through the loader ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("balanced")
    make_shards(root / "a", [20, 13], name="a")
    make_shards(root / "b", [9], name="b")
    return root


def batches(folder: Path, rank: int, world: int, workers: int = 0, **settings: Any) -> list[Any]:
    sets = {
        "a": DatasetSpec(str(folder / "a"), 3.0),
        "b": DatasetSpec(str(folder / "b"), 1.0, views=settings.pop("own", None)),
    }
    data = ShardDataModule(sets, batch_size=8 // world, num_workers=workers, **settings)
    data._ranks = lambda: (rank, world)  # type: ignore[method-assign]
    loader = data.train_dataloader()
    loader.set_epoch(1)
    found = list(loader)
    data.teardown()
    return found


def test_the_loader_is_balanced_on_every_rank_and_alike_for_workers(folder: Path) -> None:
    settings = {"balanced": True, "train_views": LightViews(16)}
    whole = batches(folder, 0, 1, **settings)
    assert len(whole) == 5
    assert all(b.dataset.bincount().tolist() == [6, 2] for b in whole)
    assert all(b.origins == b.dataset.tolist() for b in whole)
    parts = [batches(folder, r, 2, workers=1, **settings) for r in range(2)]
    for one, a, b in zip(whole, *parts, strict=True):
        assert a.keys + b.keys == one.keys
        assert torch.equal(torch.cat([a.views[0], b.views[0]]), one.views[0])
        assert [sorted(x.origins).count(1) for x in (a, b)] == [1, 1]


def test_a_data_set_with_views_of_its_own(folder: Path) -> None:
    flipped = LightViews(16, None, flip=1.0)
    found = batches(folder, 0, 1, train_views=LightViews(16, None, flip=0.0), own=flipped)
    plain = batches(folder, 0, 1, train_views=LightViews(16, None, flip=0.0))
    for own, shared in zip(found, plain, strict=True):
        mirrored = own.dataset == 1
        assert torch.equal(own.views[0][mirrored], shared.views[0][mirrored].flip(-1))
        assert torch.equal(own.views[0][~mirrored], shared.views[0][~mirrored])
        assert own.view_parameters[:, 0, 4].tolist() == mirrored.float().tolist()
    # Of another layout of parameters.
    mixed = batches(folder, 0, 1, train_views=LightViews(16), own=UnicViews(16))
    assert mixed[0].view_parameters.shape == (8, 1, len(UnicViews.names))


def test_views_of_several_sizes_in_turn_and_together(folder: Path) -> None:
    views = [LightViews(16), LightViews(32), LightViews(24)]
    images = {"train_views": views, "view_images": [None, 3, 1]}
    together = batches(folder, 0, 1, **images)
    assert [tuple(v.shape) for v in together[0].views] == [
        (8, 3, 16, 16), (3, 3, 32, 32), (1, 3, 24, 24),
    ]  # fmt: skip
    assert together[0].view_numbers is None
    one = batches(folder, 0, 1, **images, view_mode="alternate")
    parts = [batches(folder, r, 2, **images, view_mode="alternate") for r in range(2)]
    sizes = {0: (16, 8), 1: (32, 3), 2: (24, 1)}
    numbers = [b.view_numbers[0] for b in one]
    assert len(set(numbers)) > 1
    for batch, a, b, number in zip(one, *parts, numbers, strict=True):
        assert a.view_numbers == b.view_numbers == (number,)  # alike on all ranks
        side, count = sizes[number]
        assert batch.views[0].shape == (count, 3, side, side)
        assert len(batch) == len(batch.keys) == count
        assert len(a) == len(b) == min(count, 4)
    # Of the images that a view shows, the pixels are those of the same view in the other mode.
    for batch, number, whole in zip(one, numbers, together, strict=True):
        assert batch.keys == whole.keys[: len(batch)]
        assert torch.equal(batch.views[0], whole.views[number][: len(batch)])
