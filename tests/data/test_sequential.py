from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shard_maker import make_shards

from multikd.data.module import ShardDataModule
from multikd.data.remote import RemoteCache
from multikd.data.sequential import SequentialShards, sequential_urls
from multikd.data.views import EvalViews, LightViews, UnicViews
from multikd.types import Batch


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("shards"), [6, 9, 4, 11])  # 30


def stream(urls: list[str], tmp_path: Path, **settings: Any) -> SequentialShards:
    made: dict[str, Any] = {"batch_size": 5, "epoch_batches": 6, **settings}
    remote = RemoteCache(tmp_path / "cache", 10**9)
    return SequentialShards(urls, [LightViews(16)], remote=remote, **made)


def test_reads_through_commands(urls: list[str], tmp_path: Path) -> None:
    piped = sequential_urls([f"pipe:cat '{url}'" for url in urls], allow_pipe=True)
    plain = list(stream(urls, tmp_path, shuffle_buffer=0))
    batches = list(stream(piped, tmp_path, shuffle_buffer=0))
    assert [key for batch in batches for key in batch.keys] == [f"s-{i}" for i in range(30)]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [i % 10 for i in range(30)]
    for one, other in zip(plain, batches, strict=True):
        assert torch.equal(one.views[0], other.views[0])
    positions = torch.cat([batch.positions for batch in batches])
    assert positions.tolist() == list(range(30))


def test_pipes_are_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs a shell command .* set allow_pipe"):
        sequential_urls("pipe:cat x.tar")
    with pytest.raises(ValueError, match="no shard"):
        sequential_urls([str(tmp_path / "none.tar")], allow_pipe=True)


def test_the_order_is_a_function_of_seed_and_epoch(urls: list[str], tmp_path: Path) -> None:
    def keys(epoch: int, **settings: Any) -> list[str]:
        shards = stream(urls, tmp_path, **settings)
        shards.set_epoch(epoch)
        return [key for batch in shards for key in batch.keys]

    first = keys(0)
    assert first == keys(0)
    assert sorted(first) == sorted(f"s-{i}" for i in range(30))
    assert first != keys(1)
    assert first != keys(0, seed=1)


def loaded(urls: list[str], rank: int, workers: int, epoch: int, **settings: Any) -> list[Batch]:
    made: dict[str, Any] = {"epoch_batches": 7, "batch_size": 3, **settings}
    module = ShardDataModule(
        urls, train_views=LightViews(16), num_workers=workers, sequential=True, **made
    )
    module._ranks = lambda: (rank, 2)  # type: ignore[method-assign]
    module.setup("fit")
    loader = module.train_dataloader()
    assert len(loader) == module.steps_per_epoch(2) == 7
    loader.set_epoch(epoch)
    batches = list(loader)
    module.teardown()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_have_equal_batches_of_their_own_shards(urls: list[str], workers: int) -> None:
    ranks = [loaded(urls, rank, workers, epoch=2) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [7, 7]
    keys = [{key for batch in batches for key in batch.keys} for batches in ranks]
    assert not keys[0] & keys[1]
    joined = [p for step in zip(*ranks, strict=True) for b in step for p in b.positions.tolist()]
    assert joined == list(range(7 * 2 * 3))
    again = loaded(urls, 0, workers, epoch=2)
    for one, other in zip(ranks[0], again, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.views[0], other.views[0])
    changed = loaded(urls, 0, workers, epoch=3)
    assert [batch.keys for batch in changed] != [batch.keys for batch in again]


def test_too_few_shards_are_refused(urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 shards for 5 ranks × 1 workers"):
        stream(urls, tmp_path, world=5)
    with pytest.raises(ValueError, match="4 shards for 2 ranks × 3 workers: use fewer"):
        loaded(urls, 0, 3, 0)


def test_faults_are_skipped_and_counted(tmp_path: Path) -> None:
    broken = make_shards(tmp_path, [12], broken=[2, 3])
    batches = list(stream(broken, tmp_path, shuffle_buffer=0, epoch_batches=2))
    assert [key for batch in batches for key in batch.keys] == [
        f"s-{number}" for number in (0, 1, 4, 5, 6, 7, 8, 9, 10, 11)
    ]
    assert [fault.key for fault in batches[0].faults] == ["s-2", "s-3"]
    everything = make_shards(tmp_path / "all", [40], broken=range(40))
    with pytest.raises(ValueError, match="samples of one batch cannot be read"):
        list(stream(everything, tmp_path))
    # Of two ranks, the one that found them goes on in step, and says why.
    two = make_shards(tmp_path / "two", [40, 40], broken=range(40))
    batches = list(stream(two, tmp_path, world=2, shuffle_buffer=0))
    (fault,) = [fault for batch in batches for fault in batch.faults]
    assert fault.cause == "no stand-in"
    assert "samples of one batch cannot be read" in fault.detail
    assert [batch.positions.tolist() for batch in batches] == [[-1] * 5] * 6
    assert {int(v) for batch in batches for v in batch.views[0].unique()} == {128}
    other = list(stream(two, tmp_path, rank=1, world=2, shuffle_buffer=0))
    assert [len(batch) for batch in other] == [len(batch) for batch in batches]
    assert not any(batch.faults for batch in other)


def test_streams_without_samples_stop(tmp_path: Path) -> None:
    nothing = make_shards(tmp_path, [0])
    with pytest.raises(ValueError, match="gave no samples"):
        list(stream(nothing, tmp_path))


def test_a_failing_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the shard pipe:false as a stream"):
        list(stream(["pipe:false"], tmp_path))


def test_all_policies_work(urls: list[str], tmp_path: Path) -> None:
    shards = stream(urls, tmp_path)
    shards.policies = (UnicViews(16), EvalViews(20))
    batch = next(iter(shards))
    assert [view.shape[-1] for view in batch.views] == [16, 20]
    assert batch.view_parameters is not None
    assert batch.view_parameters.shape == (5, 2, 14)
