"""An epoch that goes on with other ranks, workers or batches: what is left comes exactly once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import resuming
from hypothesis import given, settings
from hypothesis import strategies as st

from multikd.data.module import ShardDataModule
from multikd.data.order import EpochOrder
from multikd.data.resuming import LoaderState
from multikd.data.sampler import FILLER, GlobalBatchSampler
from multikd.data.views import LightViews

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def drawn(samplers: list[GlobalBatchSampler], batches: int | None = None) -> list[list[list[int]]]:
    """For each batch the places of each rank; at most so many batches."""
    steps = [list(step) for step in zip(*samplers, strict=True)]
    return [[[p for _, p in rank] for rank in step] for step in steps[:batches]]


def state_of(sampler: GlobalBatchSampler, size: int, batches: int, accumulate: int) -> LoaderState:
    return LoaderState(
        epoch=3,
        batches=batches,
        position=sampler.consumed(batches),
        stop=sampler.stop(len(sampler)),
        batch_size=size,
        world=sampler.world,
        accumulate=accumulate,
        order={},
    )


layouts = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(
    shards=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda s: sum(s) >= 24),
    layouts=st.lists(layouts, min_size=1, max_size=3),
    data=st.data(),
)
def test_every_sample_of_an_epoch_exactly_once(
    shards: list[int], layouts: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Over (shards, ranks, batch sizes, position), interrupted up to three times."""
    order = EpochOrder([shards], seed=data.draw(st.integers(0, 99)))
    world, size, accumulate = data.draw(layouts_of())
    samplers = [GlobalBatchSampler(order.length, size, r, world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(3)
    whole = order.length // (world * size) * world * size
    seen: list[int] = []
    for next_world, next_size, next_accumulate in [*layouts, (0, 0, 0)]:
        left = len(samplers[0]) - samplers[0].start
        before = samplers[0].start
        count = data.draw(st.integers(0, left)) if next_world else left
        for step in drawn(samplers, count):
            assert len({len(rank) for rank in step}) == 1  # ranks stay in step
            fillers = sum(p == FILLER for rank in step for p in rank)
            assert fillers < world
            seen += [p for rank in step for p in rank if p != FILLER]
        if not next_world:
            break
        state = state_of(samplers[0], size, before + count, accumulate)
        assert state.position == len(seen)
        assert state.stop == whole
        if order.length < next_world * next_size:
            continue
        world, size, accumulate = next_world, next_size, next_accumulate
        samplers = [GlobalBatchSampler(order.length, size, r, world) for r in range(world)]
        for sampler in samplers:
            at = state.batches_before(size, world, accumulate)
            sampler.resume(3, at, state.position, state.stop)
            sampler.set_epoch(3)  # as Lightning says it again
    assert seen == list(range(whole))  # and in the order of the epoch
    located = order.locate(3, seen)
    assert len(set(located.sample.tolist())) == whole
    samplers[0].set_epoch(4)  # the next epoch is an ordinary one
    assert len(samplers[0]) == order.length // (world * size)
    assert [p for _, p in next(iter(samplers[0]))] == list(range(size))


def layouts_of() -> st.SearchStrategy[tuple[int, int, int]]:
    return layouts


def test_a_remainder_is_shared_by_two_batches() -> None:
    """Twelve of forty samples left for batches of eight on each of two ranks … of eight in all."""
    samplers = [GlobalBatchSampler(40, 4, rank, 2) for rank in range(2)]
    for sampler in samplers:
        sampler.resume(0, 3, position=19, stop=40)
    assert len(samplers[0]) == 3 + 3  # 21 left: 8, 7 and 6
    sizes = [[sum(p != FILLER for p in rank) for rank in step] for step in drawn(samplers)]
    assert sizes == [[4, 4], [4, 3], [3, 3]]
    with pytest.raises(ValueError, match="cannot resume after 41 of 40 samples"):
        samplers[0].resume(0, 3, position=41, stop=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    make_shards(folder, [9, 14])
    return folder


@settings(max_examples=100, deadline=None)
@given(
    worlds=st.sampled_from([(2, 1), (1, 2), (1, 1), (2, 2)]),
    workers=st.sampled_from([(0, 0)] * 9 + [(0, 2)]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    cut=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_the_loader_itself(
    folder: Path,
    worlds: tuple[int, int],
    workers: tuple[int, int],
    sizes: tuple[int, int],
    cut: float,
    seed: int,
) -> None:
    """Real shards, ranks and workers: every key of the epoch once, before and after the change."""
    first = Loaders(folder, worlds[0], sizes[0], workers[0], seed)
    batches = first.read()
    done = max(1, int(cut * len(batches)))  # 0 would be the beginning of an epoch
    state = first.state(done)
    second = Loaders(folder, worlds[1], sizes[1], workers[1], seed, state)
    seen = [key for batch in batches[:done] for key in batch]
    rest = [key for batch in second.read() for key in batch]
    assert seen + rest == [key for batch in batches for key in batch]
    assert len(seen + rest) == len(set(seen + rest)) == state.stop


class Loaders:
    """One data module a rank, as the ranks' processes have them."""

    def __init__(
        self,
        folder: Path,
        world: int,
        size: int,
        workers: int,
        seed: int,
        resumed: LoaderState | None = None,
    ) -> None:
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        self.world, self.size, self.ranks = world, size, []
        for rank in range(world):
            data = ShardDataModule(
                urls, train_views=LightViews(8), batch_size=size, num_workers=workers, seed=seed
            )
            place = {"global_rank": rank, "world_size": world}
            rules = {"limit_train_batches": 1.0, "accumulate_grad_batches": 1}
            data.trainer = SimpleNamespace(**place, **rules)  # type: ignore[assignment]
            if resumed is not None:
                data.load_state_dict(resumed.state_dict())
            self.ranks.append(data)

    def read(self) -> list[list[str]]:
        """Keys of each global batch; fillers left out."""
        steps: list[list[str]] = []
        loaders = [data.train_dataloader() for data in self.ranks]
        for parts in zip(*loaders, strict=True):
            assert len({len(part) for part in parts}) == 1  # ranks stay in step
            rows = [zip(p.keys, p.positions.tolist(), strict=True) for p in parts]
            steps.append([key for row in rows for key, place in row if place != FILLER])
        for data in self.ranks:
            data.teardown()
        return steps

    def state(self, done: int) -> LoaderState:
        span = self.size * self.world
        order = self.ranks[0].order_identity()
        return LoaderState(0, done, done * span, 23 // span * span, self.size, self.world, 1, order)


@pytest.mark.parametrize(("size", "accumulate"), [(3, 2)])
def test_a_run_goes_on_with_another_batch(
    folder: Path, tmp_path: Path, size: int, accumulate: int
) -> None:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    fit: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    model = resuming.module("unic", lr_batch=5)
    whole = resuming.run(
        model, resuming.data(urls), tmp_path / "w", save={"every_n_train_steps": 1}, **fit
    )
    path = tmp_path / "w" / "epoch=0-step=2.ckpt"
    torch.manual_seed(99)
    resumed = resuming.run(
        resuming.module("unic", lr_batch=5),
        resuming.data(urls, batch_size=size),
        tmp_path / "r",
        resume=path,
        **fit,
        accumulate_grad_batches=accumulate,
    )
    first = [i for i, (epoch, _) in enumerate(resumed.places) if epoch == 0]
    keys = [key for i in first for key in resumed.keys[i]]
    assert keys == [key for batch in whole.keys[2:4] for key in batch]
    per_epoch = 23 // size
    assert len(resumed.places) - len(first) == per_epoch
    second = [k for i in range(len(first), len(resumed.places)) for k in resumed.keys[i]]
    assert second[:20] == [key for batch in whole.keys[4:] for key in batch][: len(second)]
    # The schedule goes by samples: the rate, scaled with the batch, ends where it should.
    ratio = size * accumulate / 5
    assert resumed.rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert max(resumed.rates) <= 2e-3 * ratio * 1.001
    assert max(resumed.rates) > 1e-3 * ratio
