from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shard_maker import make_shards, png

from multikd.data.commands import run_inspect
from multikd.data.inspection import inspect_shards
from multikd.data.writer import write_shards


def add_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "JPEG")
    return buffer.getvalue()


def test_everything_is_counted(tmp_path: Path) -> None:
    make_shards(tmp_path, [5, 4], broken=[2], size=(28, 30))
    add_shard(
        tmp_path / "t.tar",
        [
            ("big.jpg", jpeg((200, 100))),
            ("text.cls", b"1"),
            ("cut.png", png(1)[:-40]),
            ("label.png", png(2)),
            ("label.cls", b"dog"),
            ("s-0.png", png(3)),
        ],
    )
    (tmp_path / "u.tar").write_bytes(b"")
    data = (tmp_path / "s-001.tar").read_bytes()
    (tmp_path / "v.tar").write_bytes(data[:6000])
    calls: list[tuple[int, int]] = []
    report = inspect_shards(tmp_path, progress=lambda d, t: calls.append((d, t)), max_pixels=10_000)
    facts = report.as_dict()
    assert (report.shards, report.samples) == (4, 16)
    assert calls[-1] == (16, 16)
    assert report.causes == {
        "undecodable": 1,
        "too large": 1,
        "no image": 1,
        "truncated": 1,
        "bad label": 1,
        "unusable shard": 1,
        "truncated shard": 1,
    } | {
        "truncated": report.causes["truncated"],
        "undecodable": report.causes.get("undecodable", 0),
    }
    assert report.causes["truncated"] + report.causes.get("undecodable", 0) == 2
    assert facts["formats"] == {"PNG": 11}
    assert facts["width"] == {"min": 28, "median": 28, "max": 28}
    assert facts["height"] == {"min": 28, "median": 30, "max": 30}
    assert facts["index_faults"] == {"truncated shard": 1, "key in several shards": 3}
    assert facts["mb_per_second"] > 0
    assert facts["images_per_second"] > 0
    labels = {entry["label"]: entry["count"] for entry in facts["classes"]}
    assert labels[-1] == 3
    assert labels[1] == 2  # one of them has no image, but is labelled
    text = report.text()
    for words in ("16 samples in 4 shards", "u.tar", "is empty", "label: bad label", "no image"):
        assert words in text
    json.dumps(facts)


def test_limit_is_spread_over_all_shards(tmp_path: Path) -> None:
    report = inspect_shards(make_shards(tmp_path, [10, 10, 10]), limit=4)
    assert (report.samples, report.looked_at) == (30, 4)
    assert dict(report.labels) == {0: 2, 9: 2}
    assert "of which 4 were read" in report.text()
    assert inspect_shards(tmp_path, limit=99).looked_at == 30
    with pytest.raises(ValueError, match="limit must be 1"):
        inspect_shards(tmp_path, limit=0)


def test_class_names_come_from_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("cat", 3), ("größe", 2)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "in" / name / f"{i}.png").write_bytes(png(i))
    write_shards(tmp_path / "in", tmp_path / "out")
    text, facts = run_inspect([str(tmp_path / "out")])
    assert "classes  2: cat 3, größe 2" in text
    assert "broken   none" in text
    assert facts["classes"][0] == {"label": 0, "name": "cat", "count": 3}
    captured = capsys.readouterr()
    assert captured.out == ""  # the bar goes to stderr
    assert "reading samples" in captured.err


def test_nothing_to_inspect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .tar"):
        inspect_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 shards can be read; the last: .*is empty"):
        inspect_shards(tmp_path)
