from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset import tariterators

from multikd.data.index import (
    ShardIndex,
    build_index,
    index_path,
    read_index,
    split_name,
    without_mtime,
)


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    return [
        member
        for i in range(count)
        for member in (
            (f"{i:04d}.jpg", rng.bytes(size + i)),
            (f"{i:04d}.cls", str(i % 3).encode()),
        )
    ]


def test_offsets_and_sizes_are_those_of_the_bytes(tmp_path: Path) -> None:
    members = samples(5)
    shard = write_tar(tmp_path / "a.tar", members)
    index = build_index(shard)
    data = shard.read_bytes()
    found = {
        f"{index.key(i)}.{m.extension}": data[m.offset : m.offset + m.size]
        for i in range(len(index))
        for m in index.members(i)
    }
    assert found == dict(members)
    assert index.keys == [f"{i:04d}" for i in range(5)]
    assert index.size == len(data)
    assert not index.truncated
    assert index.faults == {}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    name = "ordner mit leerzeichen/" + "x" * 80
    if format != tarfile.USTAR_FORMAT:
        name = "größe/図 " + "x" * 150
    shard = write_tar(tmp_path / "a.tar", [(name + ".png", b"abc"), (name + ".cls", b"1")], format)
    index = build_index(shard)
    assert index.keys == [name]
    member = index.members(0)[0]
    assert shard.read_bytes()[member.offset : member.offset + member.size] == b"abc"
    assert read_index(shard).keys == [name]
    assert read_index(shard).keys == [name]  # from the stored one


def test_grouping_is_that_of_webdataset(tmp_path: Path) -> None:
    members = [
        ("dir.v1/a.jpg", b"1"),
        ("dir.v1/a.seg.PNG", b"2"),
        ("b.jpg", b"3"),
        ("dir/b.jpg", b"4"),
        ("README", b"5"),
        ("__meta__/x.json", b"7"),
        ("c.x.y.jpg", b"8"),
        ("c.cls", b"9"),
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    index = build_index(shard)
    ours = [(index.key(i), {m.extension for m in index.members(i)}) for i in range(len(index))]
    with shard.open("rb") as file:
        files = ({**f, "__url__": ""} for f in tariterators.tar_file_iterator(file))
        grouped = list(tariterators.group_by_keys(files))
    theirs = [(s["__key__"], {k for k in s if not k.startswith("__")}) for s in grouped]
    assert ours == theirs
    assert index.faults == {"no key or extension": 2}


def test_names_that_webdataset_would_take_otherwise() -> None:
    assert split_name("./a/b.tar.JPG") == ("a/b", "tar.jpg")
    assert split_name("noextension") is None
    assert split_name("a/._b.jpg") is None


def test_unsafe_members_are_counted_and_not_indexed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.jpg", "/etc/abs.jpg", "ok/../../x.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = build_index(path)
    assert index.keys == ["good"]
    assert index.faults == {"unsafe name": 3, "link": 2, "special file": 1}


def test_duplicates_are_counted(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("c.jpg", b"4"), ("c.jpg", b"5")]
    index = build_index(write_tar(tmp_path / "a.tar", members))
    assert index.keys == ["a", "b", "a", "c"]
    assert index.faults == {"duplicate key": 1, "duplicate member": 1}


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"x" * 100, "truncated"),
        (b"hello world, no tar at all. " * 100, "not a tar"),
        (b"\0" * 10240, "has no samples"),
        (b"\x1f\x8b\x08" + b"\0" * 600, "compressed with gzip.*sequential"),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 600, "compressed with zstd"),
    ],
)
def test_unusable_shards_are_named_in_one_sentence(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "bad shard.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_index(path)
    assert "bad shard.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the shard .*none\.tar"):
        read_index(tmp_path / "none.tar")


def test_every_cut_of_a_shard_is_noticed_and_whole_samples_stay(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(4))
    data, full = whole.read_bytes(), build_index(whole)
    ends = [max(m.offset + m.size for m in full.members(i)) for i in range(4)]
    cut = tmp_path / "cut.tar"
    last_end = -(-ends[-1] // 512) * 512
    for size in range(2600, last_end + 1, 100):
        cut.write_bytes(data[:size])
        index = build_index(cut)
        assert index.truncated, size
        # Every sample whose bytes are all there may stay; none whose bytes are not.
        assert len(index) <= sum(end <= size for end in ends), size
        assert len(index) >= sum(-(-end // 512) * 512 + 512 <= size for end in ends) - 1, size
        assert index.keys == full.keys[: len(index)]
        assert all(len(index.members(i)) == 2 for i in range(len(index))), size
    cut.write_bytes(data[:4000])
    with pytest.raises(ValueError, match=r"cut\.tar is truncated.*allow_truncated"):
        read_index(cut)
    assert len(read_index(cut, allow_truncated=True)) == 1


def test_garbage_in_the_middle_counts_as_truncated(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(4))
    third = build_index(path).members(2)[0].offset - 512
    data = bytearray(path.read_bytes())
    data[third : third + 512] = b"garbage!" * 64
    path.write_bytes(data)
    index = build_index(path)
    assert index.keys == ["0000", "0001"]
    assert f"byte {third} is no tar header" in index.truncated


def test_stored_index_is_used_until_the_shard_changes(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    read_index(shard)
    stored = index_path(shard)
    stamp = stored.stat().st_mtime_ns
    assert read_index(shard).keys == ["0000", "0001", "0002"]
    assert stored.stat().st_mtime_ns == stamp  # not made again
    write_tar(shard, [("other.jpg", b"x" * 700)])
    assert read_index(shard).keys == ["other"]
    before = shard.stat()
    write_tar(shard, [("again.jpg", b"x" * 700)])  # the same size (tars are padded)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 10))
    assert shard.stat().st_size == before.st_size
    assert read_index(shard).keys == ["again"]


def test_index_without_a_time_is_checked_against_the_headers(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    index_path(shard).write_bytes(without_mtime(build_index(shard)).to_bytes())
    os.utime(shard, (1, 1))  # as a copy that lost its time
    stamp = index_path(shard).stat().st_mtime_ns
    assert len(read_index(shard)) == 3
    assert index_path(shard).stat().st_mtime_ns == stamp
    size = shard.stat().st_size
    write_tar(shard, [("other.jpg", b"x" * 702), ("other.cls", b"1")])
    with shard.open("ab") as file:
        file.write(b"\0" * (size - shard.stat().st_size))
    assert shard.stat().st_size == size
    assert read_index(shard).keys == ["other"]


def test_read_only_folder_puts_the_index_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(2))
    import multikd.data.index as module

    write = module.write_atomically

    def refuse(path: Path, data: bytes) -> None:  # tests may run as root, whom no mode stops
        if path.parent == tmp_path:
            raise PermissionError("read-only")
        write(path, data)

    monkeypatch.setattr(module, "write_atomically", refuse)
    elsewhere = tmp_path / "indexes"
    assert len(read_index(shard, index_dir=elsewhere)) == 2
    assert not index_path(shard).exists()
    assert [p.name.endswith("-a.tar.index.npz") for p in elsewhere.iterdir()] == [True]
    assert len(read_index(shard)) == 2  # nowhere to store: in memory


def test_broken_or_hostile_stored_index_is_made_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", samples(3))
    good = build_index(shard)
    np.savez(tmp_path / "pickled.npz", header=np.array([{"a": 1}], dtype=object))
    beyond = ShardIndex(
        **{**vars(good), "member_offset": good.member_offset + good.size},
    ).to_bytes()
    np.savez(tmp_path / "list.npz", header=np.frombuffer(b"[1]", dtype=np.uint8))
    files = [(tmp_path / name).read_bytes() for name in ("pickled.npz", "list.npz")]
    for data in (b"", b"PK\x03\x04junk", beyond, *files):
        with pytest.raises(ValueError, match="not a usable shard index"):
            ShardIndex.from_bytes(data)
        index_path(shard).write_bytes(data)
        assert read_index(shard).keys == good.keys
        ShardIndex.from_bytes(index_path(shard).read_bytes())  # replaced by a sound one


def test_bytes_are_reproducible_and_complete(tmp_path: Path) -> None:
    index = build_index(write_tar(tmp_path / "a.tar", samples(3)))
    data = index.to_bytes()
    again = ShardIndex.from_bytes(data)
    assert again.to_bytes() == data
    assert again.members(2) == index.members(2)


def test_a_header_that_leads_backwards_ends_the_walk(tmp_path: Path) -> None:
    # Python before 3.11.14 and 3.12.12 follows a negative size backwards, for ever.
    def header(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    path = tmp_path / "x.tar"
    path.write_bytes(header("a.jpg", 10) + bytes(512) + header("b.jpg", -512) + bytes(2048))
    with pytest.raises(ValueError, match="leads backwards|truncated"):
        read_index(path)
