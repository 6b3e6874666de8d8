"""The embedded shards: what they hold, and that they are read like any others."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multikd.data.decode import decode_image, decode_label, find_image
from multikd.data.origins.idx import read_idx
from multikd.data.sources import ShardSource
from multikd.demo.embedded import CLASSES, embedded_shards, unpack_shards

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TOOL = Path(__file__).parents[2] / "tools" / "make_demo_shards.py"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return unpack_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def originals():
    if not DEBIAN.is_dir():
        if os.environ.get("MULTIKD_TESTS_MAY_NOT_SKIP_DATA"):
            pytest.fail(f"{DEBIAN} is missing, and here no test may skip for want of it")
        pytest.skip(f"needs Debian's package dataset-fashion-mnist ({DEBIAN})")
    return {
        split: tuple(
            read_idx(str(DEBIAN / f"{stem}-{what}-ubyte.gz"))
            for what in ("images-idx3", "labels-idx1")
        )
        for split, stem in (("train", "train"), ("test", "t10k"))
    }


def samples(urls):
    """(key, pixels, label) of every sample, through the ordinary reader."""
    source = ShardSource(urls)
    found = []
    for number in range(len(source)):
        shard, sample = source.locate(number)
        members = source.read_members(shard, sample)
        assert set(members) == {"png", "cls"}
        image = Image.open(io.BytesIO(find_image(members)))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
        assert decode_image(find_image(members)).mode == "RGB"
        found.append((source.key(shard, sample), np.asarray(image), decode_label(members)))
    source.close()
    return found


@pytest.mark.parametrize("split, shards, per_class", [("train", 4, 400), ("test", 1, 100)])
def test_balanced_unique_and_read_by_the_ordinary_reader(unpacked, split, shards, per_class):
    urls = getattr(unpacked, split)
    assert len(urls) == shards
    rows = samples(urls)
    assert Counter(label for _, _, label in rows) == dict.fromkeys(range(10), per_class)
    assert len({key for key, _, _ in rows}) == 10 * per_class
    # Every shard holds every class, so that a part of the data is a fair one.
    size = len(rows) // shards
    for start in range(0, len(rows), size):
        assert len({label for _, _, label in rows[start : start + size]}) == 10


def test_they_are_small_and_carry_their_licence():
    root = Path(str(embedded_shards()))
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert 2e6 < total < 2.7e6
    notice = " ".join((root / "NOTICE").read_text(encoding="utf-8").split())
    assert "Copyright © 2017 Zalando SE" in notice
    assert "Permission is hereby granted, free of charge, to any person obtaining a copy" in notice
    assert "The above copyright notice and this permission notice shall be included" in notice
    assert 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND' in notice


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_manifest_agrees(unpacked, split):
    urls = [Path(url) for url in getattr(unpacked, split)]
    manifest = json.loads((urls[0].parent / "dataset.json").read_text(encoding="utf-8"))
    assert tuple(manifest["classes"]) == CLASSES
    assert [(s["name"], s["bytes"]) for s in manifest["shards"]] == [
        (url.name, url.stat().st_size) for url in urls
    ]
    assert "/tmp" not in json.dumps(manifest)


def test_no_image_is_both_trained_on_and_tested(unpacked):
    digests = [
        {hashlib.sha256(pixels.tobytes()).digest() for _, pixels, _ in samples(urls)}
        for urls in (unpacked.train, unpacked.test)
    ]
    assert len(digests[1]) == 1000
    assert not digests[0] & digests[1]


def test_unpacking_again_touches_nothing_and_mends_what_is_broken(tmp_path):
    shards = unpack_shards(tmp_path)
    first, second = Path(shards.train[0]), Path(shards.train[1])
    whole = second.read_bytes()
    os.utime(first, ns=(1, 1))
    second.write_bytes(whole[:-1000])
    assert unpack_shards(tmp_path) == shards
    assert first.stat().st_mtime_ns == 1
    assert second.read_bytes() == whole
    assert (tmp_path / "NOTICE").is_file()


def test_webdataset_reads_the_packed_ones_as_they_are():
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = Path(str(embedded_shards())) / "test" / "shard-000000.tar.gz"
    with path.open("rb") as stream:  # its own opener leaves files open
        rows = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    assert len(rows) == 1000
    assert {int(row["cls"]) for row in rows} == set(range(10))


@pytest.mark.realdata
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_is_an_original_with_its_label(unpacked, originals, split):
    images, labels = originals[split]
    known = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for key, pixels, label in samples(getattr(unpacked, split)):
        assert known.get(pixels.tobytes()) == label, key


@pytest.mark.realdata
def test_the_tool_makes_these_very_shards(originals, tmp_path):
    spec = importlib.util.spec_from_file_location("make_demo_shards", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.make(DEBIAN, tmp_path)
    root = Path(str(embedded_shards()))
    names = {p.relative_to(root) for p in root.rglob("*") if p.is_file()} - {Path("NOTICE")}
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()} == names
    for name in names:
        made, kept = (tmp_path / name).read_bytes(), (root / name).read_bytes()
        if name.suffix == ".gz":
            # The compressed bytes are zlib's own, and differ between its releases.
            assert contents(made) == contents(kept), name
        else:
            assert without_sizes(made) == without_sizes(kept), name


def contents(packed):
    """Names, labels and pixels of a packed shard (PNG's compressed bytes are zlib's own too)."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".png"):
                data = np.asarray(Image.open(io.BytesIO(data))).tobytes()
            found.append((member.name, data))
    return found


def without_sizes(text):
    manifest = json.loads(text)
    del manifest["bytes"]
    for shard in manifest["shards"]:
        del shard["bytes"]
        shard.pop("sha256", None)  # of the tar, and so of PNG's compressed bytes
    return manifest
