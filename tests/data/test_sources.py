from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest
from shard_maker import make_shards

from multikd.data.decode import SampleFault, decode_label
from multikd.data.sources import ShardSource, expand_braces, expand_urls


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a", ["a"]),
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("a{008..011}", ["a008", "a009", "a010", "a011"]),
        ("{x,y}{1..2}", ["x1", "x2", "y1", "y2"]),
        ("{a,b{1..2}}z", ["az", "b1z", "b2z"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("a{}b", ["a{}b"]),
        ("a{b}c{1,2}", ["a{b}c1", "a{b}c2"]),
        ("a{1..", ["a{1.."]),
    ],
)
def test_braces(text: str, expected: list[str]) -> None:
    assert expand_braces(text) == expected


def test_braces_have_a_bound() -> None:
    with pytest.raises(ValueError, match="more than"):
        expand_braces("{0..99999999999}")


def test_expand_urls(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "a b", [1, 1, 1])
    pattern = str(tmp_path / "a b" / "s-{000..002}.tar")
    assert expand_urls(pattern) == shards
    assert expand_urls(str(tmp_path / "a b")) == shards
    assert expand_urls(tmp_path / "a b" / "s-00[01].tar") == shards[:2]
    assert expand_urls([shards[2], shards[0]]) == [shards[2], shards[0]]
    assert expand_urls("file://" + shards[0].replace(" ", "%20")) == shards[:1]
    assert expand_urls("https://h/a-{0..1}.tar?k=*") == [
        "https://h/a-0.tar?k=*",
        "https://h/a-1.tar?k=*",
    ]
    odd = tmp_path / "odd{1,2}[x].tar"
    shutil.copy(shards[0], odd)
    assert expand_urls(str(odd)) == [str(odd)]  # the file of that very name comes first


def test_urls_that_match_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").touch()
    cases: list[tuple[str | list[str], str]] = [
        (str(tmp_path / "x-{0..2}.tar"), "there is no shard .*x-0"),
        (str(tmp_path / "*.tar"), "no shard matches"),
        (str(tmp_path / "empty"), "holds no .tar: make shards with"),
        (str(tmp_path / "packed"), "'a.tar.gz' is compressed"),
        ([], "received an empty list"),
        ("", "received an empty string"),
        ("pipe:cat x.tar", "sequential mode"),
        ("s3://bucket/x.tar", "cannot read s3://"),
    ]
    for spec, message in cases:
        with pytest.raises(ValueError, match=message):
            expand_urls(spec)


def keys_and_labels(source: ShardSource) -> list[tuple[str, int]]:
    found = []
    for position in range(len(source)):
        shard, sample = source.locate(position)
        members = source.read_members(shard, sample)
        assert members["png"].startswith(b"\x89PNG")
        found.append((source.key(shard, sample), decode_label(members)))
    return found


def test_samples_of_unequal_shards(tmp_path: Path) -> None:
    source = ShardSource(make_shards(tmp_path, [3, 1, 7]))
    assert source.lengths.tolist() == [3, 1, 7]
    assert source.starts.tolist() == [0, 3, 4, 11]
    assert keys_and_labels(source) == [(f"s-{i}", i % 10) for i in range(11)]
    assert source.read_members(2, 6, ["cls"]) == {"cls": b"0"}
    assert source.faults == {}
    for shard, sample in ((0, 3), (0, -1)):
        with pytest.raises(IndexError):
            source.read_members(shard, sample)
    with pytest.raises(IndexError):
        source.locate(11)
    source.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is what is tested
def test_handles_are_bounded_pickled_and_forked(tmp_path: Path) -> None:
    source = ShardSource(make_shards(tmp_path, [2] * 6), open_files=2)
    expected = keys_and_labels(source)
    assert len(source._handles) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert keys_and_labels(copy) == expected
    copy.close()
    child = os.fork()
    if child == 0:
        os._exit(0 if keys_and_labels(source) == expected else 1)
    assert keys_and_labels(source) == expected
    assert os.waitpid(child, 0)[1] == 0
    source.close()


def test_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path) -> None:
    first = ShardSource(make_shards(tmp_path / "a", [3, 2]))
    same = ShardSource(make_shards(tmp_path / "b", [3, 2]))
    other = ShardSource(make_shards(tmp_path / "c", [2, 3]))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_bad_shards_are_found_before_reading(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4, 4])
    data = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(data[:6000])
    with pytest.raises(ValueError, match=r"s-001\.tar is truncated"):
        ShardSource(shards)
    source = ShardSource(shards, allow_truncated=True)
    assert 4 < len(source) < 8
    assert source.faults == {"truncated shard": 1}
    Path(shards[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"s-000\.tar is empty"):
        ShardSource(shards, allow_truncated=True)


def test_shard_that_changes_or_goes_away_costs_samples_not_the_run(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 2])
    source = ShardSource(shards)
    os.unlink(shards[0])
    make_shards(tmp_path, [0, 40])
    os.unlink(shards[0])
    with pytest.raises(SampleFault) as gone:
        source.read_members(0, 0)
    assert gone.value.cause == "unreadable"
    with pytest.raises(SampleFault) as changed:
        source.read_members(1, 0)
    assert changed.value.cause == "shard changed"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_held_at_the_fork_does_not_stop_the_child(tmp_path: Path) -> None:
    source = ShardSource(make_shards(tmp_path, [2]))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with source._lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the test runner does with it
        signal.alarm(5)
        try:
            source.read_members(0, 0)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0
