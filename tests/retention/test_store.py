"""Feature stores: what is in them, when they count, when they are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from multikd.retention import store as module
from multikd.retention.store import FeatureStore, RowFault, StoreKey

KEY = StoreKey("enc", "data", (32, 32), 1.0, "bicubic", "summary", "float32")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 4)


def rows(start: int, end: int, width: int = 3) -> np.ndarray:
    return np.arange(start * width, end * width, dtype=np.float32).reshape(-1, width)


def fill(store: FeatureStore, spans: list[tuple[int, int]] | None = None) -> None:
    for span in store.shards() if spans is None else spans:
        store.write(span, rows(*span), None, [])


def test_rows_come_back_and_shards_may_be_written_in_any_order(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, 10)
    assert store.missing() == [(0, 4), (4, 8), (8, 10)]
    fill(store, [(8, 10), (0, 4)])
    assert not store.complete
    again = FeatureStore(tmp_path, KEY, 10)
    assert again.missing() == [(4, 8)]
    with pytest.raises(ValueError, match="not complete"):
        again.read()
    fill(again, again.missing())
    assert FeatureStore(tmp_path, KEY, 10).complete
    np.testing.assert_array_equal(FeatureStore(tmp_path, KEY, 10).read(), rows(0, 10))


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "other"},
        {"data": "other"},
        {"size": (32, 48)},
        {"crop": 0.875},
        {"interpolation": "bilinear"},
        {"token": "patches"},
        {"dtype": "float16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_features_has_a_store_of_its_own(tmp_path: Path, change) -> None:
    fill(FeatureStore(tmp_path, KEY, 10))
    other = FeatureStore(tmp_path, dataclasses.replace(KEY, **change), 10)
    assert other.missing() == other.shards()
    assert FeatureStore(tmp_path, KEY, 11).meta is None


def test_a_damaged_shard_is_found_and_computed_again(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, 10)
    fill(store)
    with store.data_path.open("r+b") as file:
        file.seek(5 * 12 + 1)
        file.write(b"\xff")
    with pytest.raises(ValueError, match="1 shards .* damaged"):
        FeatureStore(tmp_path, KEY, 10).read()
    again = FeatureStore(tmp_path, KEY, 10)
    assert again.missing() == [(4, 8)]
    fill(again, [(4, 8)])
    np.testing.assert_array_equal(again.read(), rows(0, 10))


def test_rows_without_a_record_do_not_count(tmp_path: Path) -> None:
    """As after a kill between the rows and their record."""
    store = FeatureStore(tmp_path, KEY, 10)
    fill(store)
    next(store.folder.glob("summary-*4.json")).unlink()
    assert FeatureStore(tmp_path, KEY, 10).missing() == [(4, 8)]


def test_faults_are_kept_with_their_rows(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, 6)
    fault = RowFault(5, "b/5.png", "truncated", "cut")
    store.write((4, 6), rows(4, 6), None, [fault])
    store.write((0, 4), rows(0, 4), None, [])
    assert FeatureStore(tmp_path, KEY, 6).faults() == [fault]


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    key = dataclasses.replace(KEY, token="patches", dtype="float16")
    store = FeatureStore(tmp_path, key, 4, {"encoder": "big"})
    with pytest.raises(ValueError, match="patches of big .*float16: use --patch-dtype float32"):
        store.write((0, 4), np.full((4, 2, 3), 1e6, dtype=np.float32), (1, 2), [])
    assert store.missing() == [(0, 4)]
    wrong = FeatureStore(tmp_path, KEY, 4)
    with pytest.raises(ValueError, match="not finite"):
        wrong.write((0, 4), np.full((4, 3), np.nan, dtype=np.float32), None, [])


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ValueError, match="name another --cache"):
        fill(FeatureStore(tmp_path, KEY, 10))
