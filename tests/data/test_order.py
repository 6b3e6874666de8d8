from __future__ import annotations

import numpy as np
import pytest

from multikd.data.counters import Stream, permutation, raw_words, uniforms
from multikd.data.order import EpochOrder

UNEQUAL = [1, 3000, 0, 7, 1, 250, 64, 1, 2, 999]


def test_raw_words_are_philox_and_stay_so() -> None:
    # Numbers pinned on first run: a change would silently change every order and view.
    again = np.random.Philox(key=(4 << 64) | 7, counter=(1 << 64) | (2 << 128) | (3 << 192))
    assert raw_words(4, 7, Stream.LIVE_VIEW, 1, 2, 3).tolist() == again.random_raw(4).tolist()
    drawn = uniforms(20000, 0, Stream.WINDOW, 5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01
    neighbour = uniforms(20000, 0, Stream.WINDOW, 6)
    assert abs(np.corrcoef(drawn, neighbour)[0, 1]) < 0.03
    assert sorted(permutation(100, 3, Stream.BLOCK).tolist()) == list(range(100))
    assert raw_words(1, -1, Stream.SHARDS).shape == (1,)  # any integer is a seed


@pytest.mark.parametrize("window", [1, 3, 16])
def test_every_sample_once_in_every_epoch(window: int) -> None:
    order = EpochOrder([UNEQUAL], seed=3, window_shards=window)
    starts = np.concatenate([[0], np.cumsum(UNEQUAL)])
    orders = []
    for epoch in (0, 1, 50):
        found = order.locate(epoch, np.arange(len(order)))
        assert sorted(found.sample.tolist()) == list(range(sum(UNEQUAL)))
        np.testing.assert_array_equal(starts[found.shard] + found.offset, found.sample)
        orders.append(found.sample)
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[0] == EpochOrder([UNEQUAL], seed=4).locate(0, np.arange(4325)).sample).sum() < 99


def test_is_a_function_of_seed_and_epoch_however_it_is_asked() -> None:
    whole = EpochOrder([UNEQUAL, [40, 3]], seed=1).locate(2, np.arange(4368))
    order = EpochOrder([UNEQUAL, [40, 3]], seed=1)
    for start in (4000, 0, 2048, 17):  # back and forth, across blocks and windows
        part = order.locate(2, np.arange(start, start + 300))
        order.locate(9, np.arange(50))
        for name in whole._fields:
            np.testing.assert_array_equal(
                getattr(part, name), getattr(whole, name)[start : start + 300]
            )
    backwards = order.locate(2, np.arange(4368)[::-1].copy())
    np.testing.assert_array_equal(backwards.sample[::-1], whole.sample)


def test_windows_keep_reads_local_and_memory_bounded() -> None:
    lengths = [100] * 40
    order = EpochOrder([lengths], seed=0, window_shards=4)
    found = order.locate(0, np.arange(len(order)))
    for window in range(10):
        assert len(np.unique(found.shard[window * 400 : (window + 1) * 400])) == 4
    assert len(np.unique(found.shard[:40])) > 1  # shuffled inside the window
    kept = order._streams[0]._windows
    assert len(kept) <= 4
    assert max(len(drawn) for drawn in kept.values()) == 400
    ahead = order.shards_ahead(0, 450)[0]
    assert ahead == list(dict.fromkeys(ahead))
    assert set(found.shard[400:1200].tolist()) == set(ahead)


def test_mixture_has_exact_quotas_and_spreads_them_evenly() -> None:
    order = EpochOrder([[500], [20], [300, 200]], weights=[0.5, 0.2, 0.31], epoch_length=5003)
    exact = np.array([0.5, 0.2, 0.31]) / 1.01 * 5003
    for epoch in (0, 3):
        datasets = order.locate(epoch, np.arange(5003)).dataset
        counts = np.bincount(datasets)
        assert counts.tolist() == list(order.quotas)
        assert (np.abs(counts - exact) < 1).all()
        for stop in (1024, 2048, 4096):  # at the end of every block the shares hold
            running = np.bincount(datasets[:stop], minlength=3)
            assert (np.abs(running - exact * stop / 5003) <= 2).all()
    assert (np.diff(datasets[:200]) != 0).sum() > 50  # interleaved, not one after the other


def test_small_sets_repeat_in_fresh_passes_and_large_ones_run_on() -> None:
    order = EpochOrder([[90, 10], [7]], weights=[1, 1], epoch_length=60)
    streams: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(10):
        found = order.locate(epoch, np.arange(60))
        for number in streams:
            streams[number] += found.sample[found.dataset == number].tolist()
    large, small = np.array(streams[0]).reshape(3, 100), np.array(streams[1][:294]).reshape(42, 7)
    assert all(sorted(one) == list(range(100)) for one in large.tolist())
    assert all(sorted(one) == list(range(7)) for one in small.tolist())
    assert len({tuple(one) for one in small.tolist()}) > 35


def test_many_sets_with_tiny_shares() -> None:
    weights = [1000.0, 1, 1, 1, 1, 1e-9]
    order = EpochOrder([[50]] * 6, weights=weights, epoch_length=3000)
    counts = np.bincount(order.locate(0, np.arange(3000)).dataset, minlength=6)
    assert counts.tolist() == list(order.quotas) == [2988, 3, 3, 3, 3, 0]


def test_unshuffled_is_file_order() -> None:
    order = EpochOrder([[2, 3], [4]], weights=[9, 1], shuffle=False)
    found = order.locate(7, np.arange(9))
    assert found.dataset.tolist() == [0] * 5 + [1] * 4
    assert found.shard.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert found.sample.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert order.shards_ahead(0, 3) == [[0, 1], [0]]
    several = EpochOrder([[5], [4, 4], [6]], shuffle=False)
    assert several.shards_ahead(0, 0) == [[0], [0, 1], []]  # not what is far away
    assert several.shards_ahead(0, 9) == [[], [0, 1], [0]]  # nor what is over
    assert several.shards_ahead(0, 18) == [[], [], [0]]
    assert EpochOrder([[5], [5]], weights=[1, 1e-9]).shards_ahead(0, 0) == [[0], []]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lengths": []}, "at least one data set"),
        ({"lengths": [[3], [0, 0]]}, "data set 1 of the mixture has no samples"),
        ({"lengths": [[3], [3]], "weights": [1, 0]}, "positive"),
        ({"lengths": [[3], [3]], "weights": [1]}, "expected 2 weights"),
        ({"lengths": [[3]], "window_shards": 0}, "window_shards"),
        ({"lengths": [[3]], "epoch_length": 0}, "epoch_length"),
        ({"lengths": [[3]], "epoch_length": 2, "shuffle": False}, "leave epoch_length out"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EpochOrder(**arguments)  # type: ignore[arg-type]


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        EpochOrder([[3]]).locate(0, [3])
