"""Faulty data: what is good is seen, what is not is counted, and all ranks take the same steps."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks

from multikd.callbacks import DataFaults
from multikd.data.index import read_index
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews


def data_of(folder: Path, batch: int = 4, **settings: Any) -> ShardDataModule:
    urls = sorted(map(str, folder.glob("*.tar")))
    made = {"train_views": LightViews(32), "batch_size": batch, "num_workers": 0, **settings}
    return ShardDataModule(urls, **{"max_fault_rate": 1.0, **made})


def scramble(path: Path) -> None:
    """Overwrite every image of a shard; its headers and its index stay right."""
    index = read_index(path)
    data = bytearray(path.read_bytes())
    for sample in range(len(index)):
        for member in index.members(sample):
            if member.extension == "png":
                data[member.offset : member.offset + member.size] = b"\x00" * member.size
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_good_samples_are_seen(workers: int, tmp_path: Path) -> None:
    broken = (0, 1, 9, 20, 21, 22, 39)
    make_shards(tmp_path, [16, 24], broken=broken)
    data = data_of(tmp_path, num_workers=workers)
    data.setup("fit")
    seen: Counter[int] = Counter()
    lost: Counter[str] = Counter()
    for batch in data.train_dataloader():
        faulty = {fault.key for fault in batch.faults}
        lost.update(faulty)
        # ``samples`` are the places' own; the good ones show themselves.
        for key, sample in zip(batch.keys, batch.samples.tolist(), strict=True):
            if f"s-{sample}" not in faulty:
                assert key == f"s-{sample}"
                seen[sample] += 1
            else:
                assert key != f"s-{sample}"
    data.teardown()
    assert seen == Counter(n for n in range(40) if n not in broken)
    assert lost == Counter(f"s-{n}" for n in broken)


def test_a_shard_of_nothing_but_broken_images_costs_its_samples(tmp_path: Path) -> None:
    urls = make_shards(tmp_path, [12, 40, 12])
    read_index(urls[1])
    scramble(Path(urls[1]))
    data = data_of(tmp_path)
    data.setup("fit")
    batches = list(data.train_dataloader())
    data.teardown()
    assert len(batches) == 16
    faults = [fault for batch in batches for fault in batch.faults]
    assert {fault.cause for fault in faults} == {"undecodable"}
    assert sorted(fault.key for fault in faults) == sorted(f"s-{n}" for n in range(12, 52))


def on_ranks(folder: Path, out: Path, kind: str) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    rate = 1.0 if kind == "shard" else 0.9
    data = data_of(folder, max_fault_rate=rate)
    counting, notes = DataFaults(every_n_batches=3), small.Notes()
    runner = small.ddp_trainer(out, notes, counting, max_epochs=2)
    result: dict[str, Any] = {"rank": rank, "text": ""}
    try:
        runner.fit(small.module(), datamodule=data)
        checkpoint: dict[str, Any] = {"callbacks": {}}
        counting.on_save_checkpoint(runner, runner.lightning_module, checkpoint)
        result["state"] = checkpoint["callbacks"][counting.state_key]
    except ValueError as error:
        result["text"] = str(error)
    return result | {"steps": len(notes.losses), "faults": counting.faults}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_whatever_is_broken(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    urls = make_shards(folder, [16, 32, 16], size=(32, 32))
    for url in urls:
        read_index(url)
    scramble(Path(urls[1]))
    first, second = run_ranks(on_ranks, 2, folder, tmp_path / "out", "shard", timeout=120)
    assert first["steps"] == second["steps"] == 16
    assert first["faults"] + second["faults"] == 64  # the shard's, in two epochs
    assert min(first["faults"], second["faults"]) > 0
    # The counts of both ranks are in both states, and every fault in the one file.
    assert first["state"] == second["state"]
    assert first["state"]["faults"] == 64
    assert first["state"]["samples"] == 128
    assert first["state"]["causes"] == {"undecodable": 64}
    assert first["state"]["shards"] == {urls[1]: 64}
    written = lines(tmp_path / "out" / "faults.jsonl")
    assert Counter(row["key"] for row in written) == {f"s-{n}": 2 for n in range(16, 48)}
    assert {row["rank"] for row in written} == {0, 1}
    again = DataFaults()
    again.load_state_dict(json.loads(json.dumps(first["state"])))
    assert (again.faults, again.samples) == (64, 128)


def test_a_sample_without_any_stand_in_ends_all_ranks_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (url,) = make_shards(folder, [64], size=(32, 32))
    read_index(url)
    # The first half cannot be read, so that some places have nothing good within reach.
    whole = tmp_path / "whole.tar"
    shutil.copy(url, whole)
    scramble(Path(url))
    good, index = whole.read_bytes(), read_index(url)
    data = bytearray(Path(url).read_bytes())
    for sample in range(36, 64):
        for member in index.members(sample):
            place = slice(member.offset, member.offset + member.size)
            data[place] = good[place]
    Path(url).write_bytes(data)
    first, second = run_ranks(on_ranks, 2, folder, tmp_path / "out", "lost", timeout=120)
    assert first["steps"] == second["steps"] > 0
    assert first["text"] == second["text"]
    assert "neither sample s-" in first["text"]
    assert "all of them stop" in first["text"]
    written = lines(tmp_path / "out" / "faults.jsonl")
    assert "no stand-in" in {row["cause"] for row in written}


def test_an_oversized_sample_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multikd.data import sources
    from multikd.data.decode import SampleFault

    urls = make_shards(tmp_path, [3])
    monkeypatch.setattr(sources, "_MOST_MEMBERS", 100)
    source = sources.ShardSource(urls)
    with pytest.raises(SampleFault, match="too large"):
        source.read_members(0, 1)
    assert source.read_members(0, 1, ["cls"]) == {"cls": b"1"}


def test_bytes_damaged_anywhere_cost_samples_never_the_run(tmp_path: Path) -> None:
    """A shard damaged after it was indexed: every place still gives a picture."""
    import random

    rng = random.Random(0)
    (url,) = make_shards(tmp_path, [24])
    whole = Path(url).read_bytes()
    index = read_index(url)
    for _ in range(12):
        module = data_of(tmp_path, batch=8)
        module.setup("fit")
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4, 12))):
            place = rng.randrange(len(data) - 40)
            data[place : place + 40] = rng.randbytes(40)
        Path(url).write_bytes(data)
        batches = list(module.train_dataloader())
        module.teardown()
        assert sum(len(batch) for batch in batches) == len(index)
        causes = {fault.cause for batch in batches for fault in batch.faults}
        assert causes <= {"undecodable", "truncated", "bad label", "no image", "empty", "too large"}
        Path(url).write_bytes(whole)
