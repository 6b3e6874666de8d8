"""DataFaults: broken samples are counted and written down, and too many stop every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks

from multikd.callbacks import DataFaults
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews

BROKEN = (3, 17, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_shards(folder, [16, 24], broken=BROKEN)
    return folder


def data_of(folder: Path, batch: int = 8, **settings: Any) -> ShardDataModule:
    urls = sorted(map(str, folder.glob("*.tar")))
    made = {"train_views": LightViews(32), "batch_size": batch, "num_workers": 0, **settings}
    return ShardDataModule(urls, **made)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_faults_are_counted_and_written_down(folder: Path, tmp_path: Path) -> None:
    memory, counting = small.Memory(), DataFaults(max_rate=0.2, every_n_batches=2)
    runner = small.trainer(tmp_path, counting, logger=memory, max_epochs=2)
    runner.fit(small.module(), datamodule=data_of(folder))
    assert (counting.samples, counting.faults) == (80, 6)
    assert counting.causes == {"undecodable": 6}
    assert memory.values("epoch/faults") == [3.0, 6.0]
    written = lines(tmp_path / "faults.jsonl")
    assert sorted(row["key"] for row in written) == sorted(f"s-{n}" for n in BROKEN * 2)
    assert {row["cause"] for row in written} == {"undecodable"}
    assert {Path(row["shard"]).name for row in written} == {"s-000.tar", "s-001.tar"}
    assert all(row["detail"] for row in written)
    assert {(row["set"], row["rank"]) for row in written} == {("train", 0)}
    assert [row["epoch"] for row in written] == [0, 0, 0, 1, 1, 1]
    assert sum(counting.shards.values()) == 6

    again = DataFaults()
    again.load_state_dict(json.loads(json.dumps(counting.state_dict())))
    assert (again.samples, again.faults, again.causes) == (80, 6, counting.causes)


def test_too_many_stop_the_run(folder: Path, tmp_path: Path) -> None:
    notes = small.Notes()
    runner = small.trainer(tmp_path, notes, DataFaults(0.05, every_n_batches=2, grace=30))
    with pytest.raises(ValueError, match=r"\d of (32|40) samples could not be read .\d undec"):
        runner.fit(small.module(), datamodule=data_of(folder))
    assert len(notes.losses) in (4, 5)  # after the grace, at the next look


def test_the_limit_is_the_data_modules_unless_given(folder: Path, tmp_path: Path) -> None:
    for rate, own, stops in ((0.5, None, False), (0.5, 0.05, True), (0.06, None, True)):
        runner = small.trainer(tmp_path, DataFaults(own, grace=30))
        data = data_of(folder, max_fault_rate=rate)
        if stops:
            with pytest.raises(ValueError, match=r"more than the limit of [56]\.0%"):
                runner.fit(small.module(), datamodule=data)
        else:
            runner.fit(small.module(), datamodule=data)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"max_rate must lie in \[0, 1\]"):
        DataFaults(1.5)
    with pytest.raises(ValueError, match="every_n_batches must be 1 or more"):
        DataFaults(every_n_batches=0)


def on_ranks(folder: Path, out: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    urls = sorted(map(str, folder.glob("*.tar")))
    # Rank 1 alone meets broken images, more than its own counter would take in a lone process.
    data = data_of(folder, batch=4, max_fault_rate=0.0)
    counting = DataFaults(max_rate=0.05, every_n_batches=1, grace=24)
    plain = data.train_dataloader

    def loader() -> Any:
        found = plain()
        shards = found.loader.dataset
        assemble = shards._assemble

        def without(*args: Any) -> Any:
            batch = assemble(*args)
            if rank == 0:
                batch.faults = []
            return batch

        shards._assemble = without
        return found

    data.train_dataloader = loader  # type: ignore[method-assign]
    assert urls
    notes = small.Notes()
    runner = small.ddp_trainer(out, notes, counting, max_epochs=3)
    try:
        runner.fit(small.module(), datamodule=data)
    except ValueError as error:
        return {"text": str(error), "steps": len(notes.losses), "faults": counting.faults}
    return {}


def test_on_two_ranks_both_stop_at_the_same_step(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, folder, tmp_path, timeout=60)
    assert first["text"] == second["text"]
    assert "samples could not be read" in first["text"]
    assert first["steps"] == second["steps"] >= 3
    assert (first["faults"], second["faults"] > 0) == (0, True)
    written = lines(tmp_path / "faults.jsonl")
    assert len(written) == second["faults"]
    assert {row["rank"] for row in written} == {1}
