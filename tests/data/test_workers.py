from __future__ import annotations

from pathlib import Path

import pytest
from shard_maker import make_shards

from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.data.workers import choose_workers, measure_loading, usable_cores


def test_workers_follow_the_cores_and_the_measured_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert choose_workers(0.01, 64, cores=32, ranks_here=4, on_cpu=False) == 7
    assert "one core loads 100 images/s" in caplog.text
    assert "7 workers, about 700 images/s" in caplog.text
    assert choose_workers(0.01, 64, cores=2, ranks_here=1, on_cpu=True) == 1
    assert choose_workers(0.01, 64, cores=2, ranks_here=2, on_cpu=True) == 0
    # Small images out of memory: another process would only cost.
    assert choose_workers(0.00001, 64, cores=32, ranks_here=1, on_cpu=False) == 0
    assert usable_cores() >= 1


def test_loading_is_measured_without_its_first_call() -> None:
    seen: list[int] = []
    assert measure_loading(seen.append, 5) > 0
    assert seen == [0, 0, 1, 2, 3, 4]


def test_auto_is_resolved_at_the_first_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path, [6])
    views = LightViews(16)
    data = ShardDataModule(train=shards, train_views=views, batch_size=2, num_workers="auto")
    data.setup("fit")
    with caplog.at_level("INFO"):
        loader = data.train_dataloader()
        data.train_dataloader()
    assert caplog.text.count("num_workers=auto") == 1
    assert loader.loader.num_workers == data.num_workers
    data.teardown()
    with pytest.raises(ValueError, match="num_workers must be at least 0"):
        ShardDataModule(train=shards, num_workers=-1)
