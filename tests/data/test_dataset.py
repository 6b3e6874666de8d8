from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import make_shards

from multikd.data.cache import CacheSource
from multikd.data.dataset import NEIGHBOURS, RecordedDataset, SampleReader, ShardDataset
from multikd.data.faults import FaultCounter
from multikd.data.order import EpochOrder
from multikd.data.sources import ShardSource
from multikd.data.views import EvalViews, LightViews, Parameters, ViewPolicy

LENGTHS = [1, 30, 5, 14]


def dataset(
    urls: list[str], policies: list[ViewPolicy] | None = None, shuffle: bool = True, **settings: int
) -> ShardDataset:
    source = ShardSource(urls)
    order = EpochOrder([source.lengths], shuffle=shuffle)
    return ShardDataset(SampleReader([source]), order, policies or [LightViews(32)], **settings)


def test_a_batch_is_whole_and_right(tmp_path: Path) -> None:
    shards = dataset(make_shards(tmp_path, LENGTHS), [LightViews(32), EvalViews(28)])
    batch = shards.__getitems__([(2, position) for position in range(10, 22)])
    assert [view.shape for view in batch.views] == [(12, 3, 32, 32), (12, 3, 28, 28)]
    assert batch.views[0].dtype == torch.uint8
    assert batch.positions.tolist() == list(range(10, 22))
    located = shards.order.locate(2, np.arange(10, 22))
    assert batch.samples.tolist() == located.sample.tolist()
    assert batch.keys == [f"s-{number}" for number in located.sample]
    assert batch.labels.tolist() == (located.sample % 10).tolist()
    assert batch.view_parameters is not None
    assert batch.view_parameters.shape == (12, 2, 5)
    assert batch.recorded is not None
    assert set(batch.recorded.tolist()) == {-1}
    assert not batch.faults
    # What each view is a function of: recorded parameters and the image.
    image = shards.reader.read(0, int(batch.samples[4]), lambda sample: None)[0].image
    again = shards.policies[0].apply(image, batch.view_parameters[4, 0].numpy())
    assert torch.equal(again, batch.views[0][4])


def test_views_hang_on_position_not_on_the_batch(tmp_path: Path) -> None:
    urls = make_shards(tmp_path, LENGTHS)
    one, other = dataset(urls), pickle.loads(pickle.dumps(dataset(urls)))
    whole = one.__getitems__([(0, position) for position in range(50)])
    single = other[0, 37]
    assert torch.equal(single.views[0][0], whole.views[0][37])
    assert not torch.equal(dataset(urls, seed=1)[0, 37].views[0], single.views[0])


def test_a_fault_costs_only_its_sample(tmp_path: Path) -> None:
    broken = [7, 8, 30]  # 30 is the last of its shard: the next shard gives the neighbour
    sound = dataset(make_shards(tmp_path / "a", LENGTHS), shuffle=False)
    faulty = dataset(make_shards(tmp_path / "b", LENGTHS, broken=broken), shuffle=False)
    places = [(0, position) for position in range(50)]
    expected, batch = sound.__getitems__(places), faulty.__getitems__(places)
    neighbours = {7: 9, 8: 9, 30: 31}
    assert batch.positions.tolist() == list(range(50))
    assert batch.samples.tolist() == list(range(50))
    assert batch.keys == [f"s-{neighbours.get(number, number)}" for number in range(50)]
    assert batch.labels.tolist() == [neighbours.get(n, n) % 10 for n in range(50)]
    kept = [number for number in range(50) if number not in broken]
    assert torch.equal(batch.views[0][kept], expected.views[0][kept])
    assert [(fault.cause, fault.key) for fault in batch.faults] == [
        ("undecodable", "s-7"),
        ("undecodable", "s-8"),
        ("undecodable", "s-30"),
    ]
    assert batch.faults[0].shard.endswith("s-001.tar")
    again = faulty.__getitems__(places)
    assert torch.equal(again.views[0], batch.views[0])


def test_too_many_faults_in_a_row_stop(tmp_path: Path) -> None:
    count = NEIGHBOURS + 1
    shards = dataset(make_shards(tmp_path, [40], broken=range(5, 5 + count)), shuffle=False)
    assert shards[0, 6].keys == [f"s-{5 + count}"]
    with pytest.raises(ValueError, match=r"neither sample s-5 of .* nor any of the 16 after it"):
        shards[0, 5]
    small = dataset(make_shards(tmp_path / "b", [3], broken=range(3)), shuffle=False)
    with pytest.raises(ValueError, match="nor any of the 2 after it"):
        small[0, 0]


def test_a_lost_shard_costs_its_samples_not_the_run(tmp_path: Path) -> None:
    urls = make_shards(tmp_path, [5, 40, 3])
    shards = dataset(urls, shuffle=False)
    Path(urls[1]).unlink()
    batch = shards.__getitems__([(0, position) for position in range(48)])
    assert len(batch.faults) == 40
    assert {fault.cause for fault in batch.faults} == {"unreadable"}
    # The stand-ins are spread over the next shard.
    assert batch.keys[5:45] == [f"s-{45 + offset % 3}" for offset in range(40)]


class Failing(LightViews):
    """Fails on some images."""

    def apply(self, image: Image.Image, parameters: Parameters) -> torch.Tensor:
        if image.getpixel((0, 0))[0] % 4 == 0:  # type: ignore[index]
            raise RuntimeError("boom")
        return super().apply(image, parameters)


def test_a_view_that_fails_costs_only_its_sample(tmp_path: Path) -> None:
    urls = make_shards(tmp_path, LENGTHS)
    places = [(0, position) for position in range(50)]
    expected = dataset(urls, [EvalViews(28), LightViews(32)]).__getitems__(places)
    batch = dataset(urls, [EvalViews(28), Failing(32)]).__getitems__(places)
    lost = [row for row in range(50) if expected.views[0][row, 0, 0, 0] % 4 == 0]
    assert 0 < len(lost) < 25
    assert [fault.key for fault in batch.faults] == [expected.keys[row] for row in lost]
    assert {(f.cause, f.detail) for f in batch.faults} == {("augmentation", "RuntimeError: boom")}
    for row in set(range(50)) - set(lost):
        assert torch.equal(batch.views[1][row], expected.views[1][row])
    assert all(len(view) == 50 for view in batch.views)  # no half of a sample stays behind


def test_filler_is_marked_and_never_counts(tmp_path: Path) -> None:
    shards = dataset(make_shards(tmp_path, [6], broken=[4]), [EvalViews(28)], shuffle=False)
    batch = shards.__getitems__([(0, 4), (0, 5), (0, -1), (0, -1)])
    assert batch.positions.tolist() == [4, 5, -1, -1]
    assert batch.labels.tolist() == [5, 5, -1, -1]
    assert len(batch.faults) == 1
    assert shards.__getitems__([(0, -1)] * 2).labels.tolist() == [-1, -1]


def test_recorded_views_come_back(tmp_path: Path) -> None:
    shards = dataset(make_shards(tmp_path, LENGTHS), [LightViews(32, recorded=3)])
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for epoch in range(6):
        batch = shards.__getitems__([(epoch, position) for position in range(50)])
        assert batch.recorded is not None
        for row in range(50):
            name = (int(batch.samples[row]), int(batch.recorded[row]))
            assert torch.equal(seen.setdefault(name, batch.views[0][row]), batch.views[0][row])
    assert len(seen) == 50 * 3  # all of them over three epochs, and no other
    rows = np.array([4, 5, 149, 0])
    source = CacheSource("", (50,), 3, {}, 0)
    precompute = RecordedDataset(shards.reader, shards.policies[0], source, rows)
    batch = precompute.__getitems__([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert batch.recorded is not None
    names = zip(batch.samples.tolist(), batch.recorded.tolist(), strict=True)
    for row, name in enumerate(names):
        assert name == (rows[row] // 3, rows[row] % 3)
        assert torch.equal(batch.views[0][row], seen[name])


def test_images_kept_in_memory_are_the_same(tmp_path: Path) -> None:
    urls = make_shards(tmp_path, LENGTHS, broken=[3])
    source = ShardSource(urls)
    reader = SampleReader([source], keep=True)
    reader.preload(1e9)
    assert len(reader._kept) == 50
    kept = ShardDataset(reader, EpochOrder([source.lengths]), [LightViews(32)])
    places = [(0, position) for position in range(50)]
    expected = dataset(urls).__getitems__(places)
    for url in urls:
        Path(url).unlink()  # nothing is read again
    batch = kept.__getitems__(places)
    assert torch.equal(batch.views[0], expected.views[0])
    assert batch.faults == expected.faults
    again = ShardSource(make_shards(tmp_path / "again", [10]))
    with pytest.raises(ValueError, match="in_memory_gb"):
        SampleReader([again], keep=True).preload(10_000)  # ten of 28·28·3 bytes are more


def test_fault_counter_stops_past_its_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = dataset(make_shards(tmp_path, [40], broken=[1, 5, 9]), shuffle=False)
    batch = shards.__getitems__([(0, position) for position in range(40)])
    counter = FaultCounter(0.01)
    for _ in range(3):
        counter.add(batch)  # 9 of 120: fewer than 1 % of the least count of 1,000
    assert counter.causes == {"undecodable": 9}
    with pytest.raises(ValueError, match=r"12 of 160 samples could not be read \(12 undecodable\)"):
        counter.add(batch)
    assert [record.args[-1] for record in caplog.records] == [1, 10]  # type: ignore[index]
    with pytest.raises(ValueError, match="max_fault_rate=0"):
        FaultCounter(0).add(batch)
    # One rank that stopped alone would leave the others waiting: DataFaults judges over all.
    monkeypatch.setattr("multikd.data.faults.world_size", lambda: 2)
    together = FaultCounter(0)
    together.add(batch)
    assert together.causes == {"undecodable": 3}
    with pytest.raises(ValueError, match="must be in 0"):
        FaultCounter(1.5)
