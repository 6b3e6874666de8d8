from __future__ import annotations

import pytest

from multikd.data.sampler import FILLER, GlobalBatchSampler


def positions(sampler: GlobalBatchSampler) -> list[list[int]]:
    return [[position for _, position in places] for places in sampler]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_consecutive_global_batches(world: int) -> None:
    ranks = [positions(GlobalBatchSampler(50, 12 // world, r, world)) for r in range(world)]
    assert [len(batches) for batches in ranks] == [4] * world
    joined = [p for step in zip(*ranks, strict=True) for part in step for p in part]
    assert joined == list(range(48))  # the incomplete last batch is dropped


def test_evaluation_pads_to_equal_batches() -> None:
    ranks = [positions(GlobalBatchSampler(9, 4, r, 2, drop_last=False)) for r in range(2)]
    assert ranks[0] == [[0, 1, 2, 3], [8, FILLER, FILLER, FILLER]]
    assert ranks[1] == [[4, 5, 6, 7], [FILLER] * 4]


def test_epoch_travels_with_the_places() -> None:
    sampler = GlobalBatchSampler(4, 2)
    sampler.sampler.set_epoch(3)
    assert list(sampler) == [[(3, 0), (3, 1)], [(3, 2), (3, 3)]]


def test_resume_is_one_integer() -> None:
    sampler = GlobalBatchSampler(10**15, 2)  # O(1): walking there would take for ever
    sampler.resume(5, 10**14)
    assert next(iter(sampler)) == [(5, 2 * 10**14), (5, 2 * 10**14 + 1)]
    assert len(sampler) == 5 * 10**14
    assert next(iter(sampler)) == [(5, 0), (5, 1)]  # only the next iteration is shortened
    sampler.resume(5, 7)
    sampler.set_epoch(5)  # Lightning says the epoch again: the start stays
    assert sampler.start == 7
    sampler.set_epoch(6)
    assert sampler.start == 0
    with pytest.raises(ValueError, match="cannot resume after"):
        sampler.resume(0, len(sampler) + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((7, 4, 0, 2), "7 samples, fewer than one global batch of 8"),
        ((7, 0), "batch size"),
        ((7, 1, 2, 2), "rank"),
        ((0, 1), "no samples"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GlobalBatchSampler(*arguments)
