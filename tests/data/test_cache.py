from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from multikd.data.cache import CacheDtype, CacheSource, FeatureCache, FeatureCacheWriter
from multikd.types import Batch, TokenFeatures

SOURCE = CacheSource(data="abc", samples=(5, 3), views=2, policy={"size": 8}, seed=0)
ROWS = 16


def features(rows: np.ndarray, patches: bool = True) -> TokenFeatures:
    """Features that tell their row."""
    value = torch.tensor(rows, dtype=torch.float32)[:, None]
    summary = value + torch.arange(4) / 4
    maps = value[:, None] * 2 + torch.arange(3) / 8 + torch.arange(6)[None, :, None]
    return TokenFeatures(summary, maps if patches else None, (2, 3) if patches else None)


def batch(rows: np.ndarray, filler: int = 0) -> Batch:
    dataset, sample, number = SOURCE.places_of(rows)
    positions = torch.arange(len(rows))
    if filler:
        positions[-filler:] = -1
    return Batch(
        views=[torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8)],
        labels=torch.zeros(len(rows), dtype=torch.int64),
        keys=[""] * len(rows),
        dataset=torch.from_numpy(dataset),
        positions=positions,
        samples=torch.from_numpy(sample),
        recorded=torch.from_numpy(number),
    )


def writer(folder: Path, dtype: CacheDtype = "float32", **change: object) -> FeatureCacheWriter:
    example = {"a": ("fa", features(np.arange(1))), "b/c": ("fb", features(np.arange(1), False))}
    return FeatureCacheWriter(folder, dataclasses.replace(SOURCE, **change), example, dtype)  # type: ignore[arg-type]


def fill(cache: FeatureCacheWriter, rows: np.ndarray) -> None:
    cache.put(batch(rows), "a", features(rows))
    cache.put(batch(rows), "b/c", features(rows, False))


def test_rows_and_places_are_inverse() -> None:
    rows = np.arange(ROWS)
    dataset, sample, number = SOURCE.places_of(rows)
    assert dataset.tolist() == [0] * 10 + [1] * 6
    assert sample.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1, 2, 2]
    assert number.tolist() == [0, 1] * 8
    np.testing.assert_array_equal(SOURCE.rows_of(dataset, sample, number), rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_written_comes_back(tmp_path: Path, dtype: CacheDtype) -> None:
    cache = writer(tmp_path / "c", dtype)
    fill(cache, np.arange(ROWS))
    cache.finish()
    rows = np.array([3, 15, 0, 3])
    found = FeatureCache(tmp_path / "c", SOURCE).get(rows)
    assert list(found) == ["a", "b/c"]
    kind = getattr(torch, dtype)
    for name, patches in (("a", True), ("b/c", False)):
        expected = features(rows, patches).to(dtype=kind)
        assert found[name].summary is not None
        assert found[name].summary.dtype == kind
        assert torch.equal(found[name].summary, expected.summary)
        assert found[name].grid == expected.grid
    assert found["a"].patches is not None
    assert torch.equal(found["a"].patches, features(rows).to(dtype=kind).patches)
    assert found["b/c"].patches is None


def test_a_killed_computation_continues(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    fill(cache, np.arange(6))
    cache.flush()
    fill(cache, np.arange(6, 9))  # put, but never recorded
    del cache
    again = writer(tmp_path)
    assert again.missing(["a", "b/c"]).tolist() == list(range(6, ROWS))
    with pytest.raises(ValueError, match=r"lacks 2 of the rows .*teacher 'a' \(first: 6\)"):
        FeatureCache(tmp_path, SOURCE).get([5, 6, 7])
    fill(again, np.arange(6, ROWS))
    again.finish()
    reader = FeatureCache(tmp_path, SOURCE)
    assert not len(reader.missing(["a", "b/c"]))
    assert torch.equal(reader.get([2])["a"].patches, features(np.array([2])).patches)  # type: ignore[arg-type]


def test_flushes_by_itself_now_and_then(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    for _ in range(32):
        fill(cache, np.arange(2))  # 64 puts
    assert FeatureCache(tmp_path, SOURCE).missing(["a"]).tolist() == list(range(2, ROWS))


def test_two_processes_write_disjoint_rows(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # a real second process; _exit keeps pytest's own ending out of it
        status = 1
        try:
            mine = writer(tmp_path)
            fill(mine, np.arange(1, ROWS, 2))
            mine.finish()
            status = 0
        finally:
            os._exit(status)
    mine = writer(tmp_path)
    fill(mine, np.arange(0, ROWS, 2))
    mine.finish()
    assert os.waitpid(child, 0)[1] == 0
    found = FeatureCache(tmp_path, SOURCE).get(np.arange(ROWS))
    assert torch.equal(found["a"].summary, features(np.arange(ROWS)).summary)  # type: ignore[arg-type]


def test_filler_places_are_left_out(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    rows = np.array([4, 5, 4, 4])
    cache.put(batch(rows, filler=2), "a", features(np.array([4, 5, 9, 9])))
    cache.finish()
    reader = FeatureCache(tmp_path, SOURCE)
    assert reader.missing(["a"]).tolist() == [r for r in range(ROWS) if r not in (4, 5)]
    assert torch.equal(reader.get([4], ["a"])["a"].summary, features(np.array([4])).summary)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "xyz"}, "'data' is abc there and xyz here"),
        ({"views": 3}, "'views' is 2 there and 3 here"),
        ({"policy": {"size": 9}}, "'policy'"),
        ({"samples": (5, 4)}, "'samples'"),
        ({"seed": 1}, "'seed' is 0 there and 1 here"),
    ],
)
def test_another_source_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    writer(tmp_path).finish()
    with pytest.raises(ValueError, match=words):
        FeatureCache(tmp_path, dataclasses.replace(SOURCE, **change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        writer(tmp_path, **change)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    writer(tmp_path).finish()
    with pytest.raises(ValueError, match="dtype of teacher 'a' is float32 there and float16 here"):
        writer(tmp_path, "float16")
    example = features(np.arange(1))
    with pytest.raises(ValueError, match="fingerprint of teacher 'a' is fa there and new here"):
        FeatureCacheWriter(tmp_path, SOURCE, {"a": ("new", example)}, "float32")
    reader = FeatureCache(tmp_path, SOURCE)
    reader.check({"a": "fa"})
    with pytest.raises(ValueError, match="fingerprint"):
        reader.check({"a": "new"})
    with pytest.raises(ValueError, match="no features of teacher 'd'"):
        reader.check({"d": "fd"})


def test_a_teacher_may_be_added(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    fill(cache, np.arange(ROWS))
    cache.finish()
    spec = {"d": ("fd", features(np.arange(1), False))}
    added = FeatureCacheWriter(tmp_path, SOURCE, spec, "bfloat16")
    assert len(added.missing(["a", "b/c"])) == 0
    assert len(added.missing(["a", "d"])) == ROWS
    assert sorted(FeatureCache(tmp_path, SOURCE).records) == ["a", "b/c", "d"]


def test_wrong_features_are_refused(tmp_path: Path) -> None:
    cache, rows = writer(tmp_path, "float16"), np.arange(2)
    with pytest.raises(ValueError, match=r"patches of teacher 'a' must be \(6, 3\)"):
        cache.put(batch(rows), "a", features(rows, False))
    huge = features(rows)
    huge.patches = huge.patches * 1e6 + 1e6  # type: ignore[operator]
    with pytest.raises(ValueError, match="not finite in float16"):
        cache.put(batch(rows), "a", huge)
    live = batch(rows)
    live.recorded = torch.full((2,), -1)
    with pytest.raises(ValueError, match="no recorded views"):
        cache.put(live, "a", features(rows))
    assert len(cache.missing(["a"])) == ROWS


def test_a_reader_may_travel_to_a_worker(tmp_path: Path) -> None:
    cache = writer(tmp_path)
    fill(cache, np.arange(ROWS))
    cache.finish()
    reader = FeatureCache(tmp_path, SOURCE)
    reader.get([1])
    sent = pickle.dumps(reader)
    assert len(sent) < 2000  # paths, not mapped files
    assert torch.equal(pickle.loads(sent).get([7])["a"].summary, features(np.array([7])).summary)


def test_no_cache_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FeatureCache(tmp_path, SOURCE)


def test_a_disk_without_the_room_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer(tmp_path / "made"), np.arange(4))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"needs .* GB more and the disk has 0\.0 GB"):
        writer(tmp_path / "new")
    assert not (tmp_path / "new" / "meta.json").exists()


def test_processes_of_equal_number_on_two_machines_do_not_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # containers count alike
    with ThreadPoolExecutor(8) as pool:
        for made in pool.map(lambda _: writer(tmp_path), range(32)):
            assert sorted(made.records) == ["a", "b/c"]
    assert [path.name for path in tmp_path.iterdir() if "meta" in path.name] == ["meta.json"]
