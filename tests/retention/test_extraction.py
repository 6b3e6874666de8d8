"""Extraction: one pass for everything, the same over ranks, resumable, never stale."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ddp import run_ranks
from helpers.fitting import Run

from multikd.retention import store as store_module
from multikd.retention.datasets import DataSpec, open_data
from multikd.retention.encoders import OWN, OpenOptions, open_encoders
from multikd.retention.extract import ExtractOptions, extract, plan, store_of
from multikd.retention.subject import EncoderSubject

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_ROWS", 8)


def opened(run: Run, photos: Path, cache: Path, heads: str = "all"):
    columns = open_encoders([str(run.checkpoint)], OpenOptions(heads=heads))  # type: ignore[arg-type]
    data = open_data("p", DataSpec(train=str(photos / "train"), size=32))
    options = ExtractOptions(cache, batch_size=5, workers=2, accelerator="cpu")
    wanted = [
        (column, data, "train", token, SIZE)
        for column in columns
        for token in ("summary", "patches")
    ]
    return columns, data, options, wanted


def test_one_pass_gives_every_head_and_both_tokens(run: Run, photos: Path, tmp_path: Path) -> None:
    columns, data, options, wanted = opened(run, photos, tmp_path)
    network = columns[0].network
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
    works = plan(wanted, options)
    assert len(works) == 1
    extract(works, options, progress=False)
    split = data.splits["train"]
    assert sum(calls) == len(split)
    pixels = np.stack([split.pixels(i, SIZE) for i in range(len(split))])
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels).float() / 255)
    for column in columns:
        subject = EncoderSubject(column, data, options)
        found = subject.features("train", ("summary", "patches"))
        answer = expected[column.member]
        torch.testing.assert_close(found.summary, answer.summary, rtol=1e-4, atol=1e-4)
        assert found.patches.dtype == np.float16
        assert isinstance(found.patches, np.memmap)
        assert found.grid == answer.grid
        torch.testing.assert_close(
            torch.from_numpy(np.array(found.patches)).float(), answer.patches, rtol=2e-3, atol=2e-3
        )
    calls.clear()
    assert plan(wanted, options) == []  # a second time nothing runs
    assert sum(calls) == 0


def test_interrupted_it_goes_on_after_the_last_whole_shard(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    columns, _, options, wanted = opened(run, photos, tmp_path)
    network = columns[0].network
    seen: list[int] = []

    def stop(module, images) -> None:
        seen.append(len(images[0]))
        if sum(seen) > 27:
            raise KeyboardInterrupt

    hook = network.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        extract(plan(wanted, options), options, progress=False)
    hook.remove()
    works = plan(wanted, options)
    assert works[0].spans == [(24, 32), (32, 40), (40, 42)]
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
    extract(works, options, progress=False)
    assert sum(calls) == 42 - 24
    assert plan(wanted, options) == []


def test_patches_asked_for_later_do_not_touch_the_summaries(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    columns, data, options, wanted = opened(run, photos, tmp_path, heads=())  # type: ignore[arg-type]
    extract(plan(wanted[:1], options), options, progress=False)
    path = store_of(columns[0], data.splits["train"], SIZE, "summary", options).data_path
    before = path.stat().st_mtime_ns
    works = plan(wanted, options)
    assert list(works[0].stores) == [(OWN, "patches")]
    extract(works, options, progress=False)
    assert path.stat().st_mtime_ns == before


def test_a_changed_weight_size_or_crop_is_never_read_stale(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    columns, data, options, _ = opened(run, photos, tmp_path, heads=())  # type: ignore[arg-type]
    first = EncoderSubject(columns[0], data, options).features("train").summary
    changed = tmp_path / "changed.ckpt"
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    for key, value in checkpoint["state_dict"].items():
        if key.startswith("average.student.model.") and value.is_floating_point():
            value.mul_(1.001)
    torch.save(checkpoint, changed)
    other = open_encoders([str(changed)], OpenOptions())[0]
    second = EncoderSubject(other, data, options).features("train").summary
    assert not torch.equal(first, second)
    images = torch.from_numpy(data.splits["train"].pixels(0, SIZE)[None].copy()).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(
            second[:1], other.network(images)[OWN].summary, rtol=1e-4, atol=1e-4
        )
    cropped = open_data("p", DataSpec(train=str(photos / "train"), size=32, crop=0.8))
    third = EncoderSubject(columns[0], cropped, options).features("train").summary
    assert not torch.equal(first, third)


def test_damaged_features_are_computed_again(run: Run, photos: Path, tmp_path: Path) -> None:
    columns, data, options, _ = opened(run, photos, tmp_path, heads=())  # type: ignore[arg-type]
    before = EncoderSubject(columns[0], data, options).features("train").summary
    path = store_of(columns[0], data.splits["train"], SIZE, "summary", options).data_path
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    after = EncoderSubject(columns[0], data, options).features("train").summary
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_corrupt_images_count_and_are_left_out_everywhere(run: Run, tmp_path: Path) -> None:
    from retention.conftest import write_folder

    root = write_folder(tmp_path / "bad", {"a": 6, "b": 6})
    (root / "b" / "002.png").write_bytes(b"")
    data = open_data("bad", DataSpec(test=str(root), size=32))
    column = open_encoders([str(run.checkpoint)], OpenOptions())[0]
    options = ExtractOptions(tmp_path / "cache", accelerator="cpu")
    subject = EncoderSubject(column, data, options)
    found = subject.features("test")
    assert found.faults == ["b/002.png"]
    assert len(found.summary) == len(subject.splits["test"]) == 11
    assert "b/002.png" not in subject.splits["test"].keys
    assert subject.splits["test"].labels.tolist() == [0] * 6 + [1] * 5
    strict = dataclasses.replace(data, spec=DataSpec(test=str(root), size=32, max_fault_rate=0.0))
    with pytest.raises(ValueError, match=r"1 of 12 images of bad/test can't be read"):
        EncoderSubject(
            column, strict, dataclasses.replace(options, cache=tmp_path / "other")
        ).features("test")


def digest_of(folder: Path) -> dict[str, str]:
    """What is in every store; names and content, without locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".bin", ".json")
    }


def on_rank(checkpoint: str, photos: str, cache: str) -> bool:
    """One of two gloo ranks, with Lightning's own DDP strategy."""
    from helpers.training import ddp_trainer

    torch.set_num_threads(1)
    store_module.SHARD_ROWS = 8
    fake = Run(Path(), {}, Path(checkpoint), Path())
    _, _, options, wanted = opened(fake, Path(photos), Path(cache))
    works = plan(wanted, options)
    torch.distributed.barrier()
    return extract(works, options, progress=False, trainer=ddp_trainer(cache))


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(run: Run, photos: Path, tmp_path: Path) -> None:
    _, _, options, wanted = opened(run, photos, tmp_path / "one")
    extract(plan(wanted, options), options, progress=False)
    goes_on = run_ranks(on_rank, 2, str(run.checkpoint), str(photos), str(tmp_path / "two"))
    assert goes_on == [True, False]
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two")
