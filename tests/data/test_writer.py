from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multikd.data.commands import run_write
from multikd.data.decode import decode_image, decode_label, find_image
from multikd.data.manifest import LOG, read_manifest
from multikd.data.origins import open_origin
from multikd.data.origins.idx import read_idx
from multikd.data.sources import ShardSource
from multikd.data.writer import write_shards
from multikd.errors import MissingExtraError
from multikd.files import file_lock


def image_bytes(number: int, format: str = "PNG", size: tuple[int, int] = (20, 12)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def image_folder(root: Path, per_class: int = 6) -> Path:
    """Three classes with awkward names; nested, hidden and foreign files; two broken images."""
    number = 0
    for name in ("zebra", "a cat", "größe 図"):
        (root / name / "deep er").mkdir(parents=True)
        for i in range(per_class):
            folder = root / name / "deep er" if i % 3 == 0 else root / name
            form, extension = [("PNG", "png"), ("JPEG", "JPG"), ("WEBP", "webp")][i % 3]
            (folder / f"im.{i} ü.{extension}").write_bytes(image_bytes(number, form))
            number += 1
    (root / "zebra" / ".hidden.png").write_bytes(b"x")
    (root / "zebra" / "notes.txt").write_text("no image")
    (root / ".git").mkdir()
    (root / ".git" / "x.png").write_bytes(image_bytes(0))
    (root / "zebra" / "broken.png").write_bytes(image_bytes(0)[:90])
    (root / "a cat" / "text.jpg").write_text("no image at all")
    return root


def shard_hashes(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.is_file()
    }


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    source = ShardSource(out)
    found = {}
    for position in range(len(source)):
        shard, sample = source.locate(position)
        members = source.read_members(shard, sample)
        found[source.key(shard, sample)] = (find_image(members), decode_label(members))
    source.close()
    return found


def test_image_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mein Ordner")
    report = write_shards(root, tmp_path / "out", samples_per_shard=7)
    assert report.classes == ["a cat", "größe 図", "zebra"]
    assert report.counts == [6, 6, 6]
    assert report.total == 18
    assert [record.samples for record in report.shards] == [7, 7, 4]
    assert {(Path(s.name).name, s.cause) for s in report.skipped} == {
        ("broken.png", "truncated"),
        ("text.jpg", "undecodable"),
    }
    found = contents(tmp_path / "out")
    originals = {
        path.read_bytes(): report.classes.index(path.relative_to(root).parts[0])
        for path in root.rglob("im*")
    }
    assert dict(found.values()) == originals  # bytes as they were, with their class
    assert all("." not in key and key.isascii() for key in found)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["total"] == 18
    assert manifest["skipped"] == {"truncated": 1, "undecodable": 1}
    assert '"größe 図"' in (tmp_path / "out" / "dataset.json").read_text(encoding="utf-8")
    assert "1 hidden, 1 no image's extension" in report.text()
    assert not (tmp_path / "out" / LOG).exists()
    json.dumps(report.as_dict())


def test_extension_is_that_of_the_true_format(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    (tmp_path / "in" / "c" / "wrong.png").write_bytes(image_bytes(0, "JPEG"))
    write_shards(tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["000000000-wrong.jpg", "000000000-wrong.cls"]


def test_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in", per_class=15)
    for workers in (0, 1, 2):
        write_shards(root, tmp_path / str(workers), samples_per_shard=10, workers=workers, resize=8)
    first = shard_hashes(tmp_path / "0")
    assert len([name for name in first if name.endswith(".tar")]) == 5
    assert shard_hashes(tmp_path / "1") == first
    assert shard_hashes(tmp_path / "2") == first


def test_seed_shuffle_and_limit(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    (root / "zebra" / "broken.png").unlink()
    (root / "a cat" / "text.jpg").unlink()

    def keys(name: str, **options: int | bool) -> list[str]:
        write_shards(root, tmp_path / name, **options)
        return list(contents(tmp_path / name))

    plain = keys("plain", shuffle=False)
    assert plain == sorted(plain)
    zero, one = keys("zero", seed=0), keys("one", seed=1)
    assert plain != zero != one
    assert sorted(zero) == sorted(one) == plain
    assert keys("limited", limit=5) == zero[:5]


def test_shards_are_bounded_by_size(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    report = write_shards(root, tmp_path / "out", size_mb=0.01)
    assert len(report.shards) > 3
    for record in report.shards:
        # A tar ends with two empty blocks and is padded to 10 KB.
        assert record.bytes <= 0.01e6 + 1024 + 10240
    alone = write_shards(root, tmp_path / "alone", size_mb=1e-6)
    assert {record.samples for record in alone.shards} == {1}


def test_resize_and_format(tmp_path: Path) -> None:
    root = tmp_path / "in" / "c"
    root.mkdir(parents=True)
    (root / "big.jpg").write_bytes(image_bytes(0, "JPEG", (60, 30)))
    (root / "small.png").write_bytes(image_bytes(1, "PNG", (9, 5)))
    (root / "tall.bmp").write_bytes(image_bytes(2, "BMP", (11, 100)))
    turned = Image.open(io.BytesIO(image_bytes(3, "PNG", (40, 20))))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)

    def written(name: str, **options: object) -> dict[str, tuple[str, tuple[int, int], bytes]]:
        write_shards(tmp_path / "in", tmp_path / name, **options)  # type: ignore[arg-type]
        return {
            key.partition("-")[2]: (
                str(Image.open(io.BytesIO(data)).format),
                decode_image(data).size,
                data,
            )
            for key, (data, _) in contents(tmp_path / name).items()
        }

    resized = written("resized", resize=10)
    assert {name: entry[:2] for name, entry in resized.items()} == {
        "big": ("JPEG", (20, 10)),
        "small": ("PNG", (9, 5)),
        "tall": ("PNG", (10, 91)),
        "turned": ("JPEG", (10, 20)),
    }
    assert resized["small"][2] == (root / "small.png").read_bytes()  # never enlarged
    assert {entry[0] for entry in written("webp", format="webp").values()} == {"WEBP"}
    jpeg = written("jpeg", format="jpeg", quality=30)
    assert {entry[0] for entry in jpeg.values()} == {"JPEG"}
    assert jpeg["big"][2] == (root / "big.jpg").read_bytes()  # already one


def test_enormous_images_are_skipped_by_their_header(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    (root / "zebra" / "bomb.png").write_bytes(image_bytes(0, "PNG", (400, 300)))
    report = write_shards(root, tmp_path / "out", max_pixels=100_000)
    assert [s.name for s in report.skipped if s.cause == "too large"] == ["zebra/bomb.png"]


def test_without_class_folders_there_are_no_labels(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(3):
        (root / f"{i}.png").write_bytes(image_bytes(i))
    report = write_shards(root, tmp_path / "out")
    assert "no class folders: the shards carry no labels" in report.text()
    assert report.unlabelled == 3
    assert {label for _, label in contents(tmp_path / "out").values()} == {-1}
    (root / "c").mkdir()
    (root / "c" / "x.png").write_bytes(image_bytes(4))
    mixed = write_shards(root, tmp_path / "mixed")
    assert "3 images lie outside the class folders" in mixed.text()
    assert (mixed.counts, mixed.unlabelled) == ([1], 3)


def test_folder_of_splits_is_pointed_out_and_links_do_not_loop(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "a.png").write_bytes(image_bytes(0))
    (root / "train" / "again").symlink_to(root)
    (root / "train" / "linked.png").symlink_to(root / "train" / "cat" / "a.png")
    (root / "train" / "dangling.png").symlink_to(root / "nowhere")
    report = write_shards(root, tmp_path / "out")
    assert f"did you mean {root / 'train'}?" in report.text()
    assert report.total == 2
    assert [s.cause for s in report.skipped] == ["missing"]


def test_class_numbers_can_be_those_of_another_set(tmp_path: Path) -> None:
    root = tmp_path / "val"
    for i, name in enumerate(("b", "d")):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(image_bytes(i))
    report = write_shards(root, tmp_path / "out", classes=["a", "b", "c", "d"])
    assert sorted(label for _, label in contents(tmp_path / "out").values()) == [1, 3]
    assert report.counts == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="unknown class 'd'"):
        write_shards(root, tmp_path / "none", classes=["a", "b"])
    text, facts = run_write(
        str(root), str(tmp_path / "cli"), classes_from=str(tmp_path / "out"), workers=0
    )
    assert facts["classes"] == ["a", "b", "c", "d"]
    assert "2 samples in 1 shards" in text


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    (tmp_path / "x.doc").touch()
    for source, message in (
        ("nowhere", "does not exist"),
        ("empty", "holds no images .*it is empty"),
        ("texts", "holds no images .*1 no image's extension"),
        ("broken", "none of the 1 images of the source can be read"),
        ("x.doc", "expected a folder, a .csv or a .parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path / source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))
    for options, message in (
        ({"samples_per_shard": 0}, "samples_per_shard must be 1"),
        ({"size_mb": 0.0}, "size_mb must be above 0"),
        ({"workers": -1}, "workers must be 0"),
        ({"limit": 0}, "limit must be 1"),
        ({"quality": 101}, "quality must lie in"),
        ({"resize": 0}, "resize must be"),
        ({"format": "tiff"}, "format must be one of jpeg, png, webp"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path / "broken", tmp_path / "out", **options)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write shards into"):
        write_shards(image_folder(tmp_path / "in"), tmp_path / "file" / "out")


def test_csv(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    images = sorted(root.rglob("im*"))
    table = tmp_path / "table.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "path"])
        for i, path in enumerate(images):
            relative = path.relative_to(tmp_path) if i % 2 else path
            writer.writerow([i, "" if i == 0 else path.relative_to(root).parts[0], relative])
        writer.writerow(["x", "zebra", "in/none.png"])
    report = write_shards(table, tmp_path / "out")
    assert report.classes == ["a cat", "größe 図", "zebra"]
    assert (report.total, report.unlabelled) == (18, 1)
    assert [s.cause for s in report.skipped] == ["missing"]
    expected = {
        path.read_bytes(): report.classes.index(path.relative_to(root).parts[0]) if i else -1
        for i, path in enumerate(images)
    }
    assert dict(contents(tmp_path / "out").values()) == expected


def test_labels_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(0))

    def listing(text: str) -> tuple[list[int], list[str]]:
        (tmp_path / "t.csv").write_text(text)
        found = open_origin(tmp_path / "t.csv").list_items()
        return found.labels, found.classes

    assert listing("path,label\na.png,2\na.png,0\n") == ([2, 0], ["0", "1", "2"])
    assert listing("path,label\na.png,2\na.png,n1\n") == ([0, 1], ["2", "n1"])
    assert listing("path\na.png\n") == ([-1], [])
    for text, message in (
        ("file,label\na.png,1\n", "needs a column 'path' .*'file', 'label'"),
        ("", "needs a column 'path' .*none"),
        ("path,label\n", "has no rows"),
        ("path,label\na.png\n", "line 2 has 1 fields, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            listing(text)
    (tmp_path / "t.csv").write_bytes(b"path\n\xff\xfe\n")
    with pytest.raises(ValueError, match="cannot read the table"):
        open_origin(tmp_path / "t.csv").list_items()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "a.png").write_bytes(image_bytes(0))
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"path": ["a.png", "a.png"], "label": [1, None], "n": [1, 2]}), table)
    listing = open_origin(table).list_items()
    assert (listing.labels, listing.classes) == ([1, -1], ["0", "1"])
    assert write_shards(table, tmp_path / "out").total == 2
    pq.write_table(pa.table({"file": ["a.png"]}), table)
    with pytest.raises(ValueError, match="needs a column 'path'"):
        open_origin(table).list_items()
    table.write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match="cannot read the table"):
        open_origin(table).list_items()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"multikd\[tables\]"):
        open_origin(table).list_items()


def idx_bytes(values: np.ndarray) -> bytes:  # type: ignore[type-arg]
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    return head + values.astype(np.uint8).tobytes()


def test_idx(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28))
    labels = np.arange(9) % 3
    images, targets = tmp_path / "im ages.gz", tmp_path / "labels"
    images.write_bytes(gzip.compress(idx_bytes(pixels)))
    targets.write_bytes(idx_bytes(labels))
    for separator in ":,":
        out = tmp_path / f"out{ord(separator)}"
        report = write_shards(f"idx:{images}{separator}{targets}", out, shuffle=False, workers=2)
        assert (report.classes, report.counts) == (["0", "1", "2"], [3, 3, 3])
        for i, (data, label) in enumerate(contents(out).values()):
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.mode, label) == ("PNG", "L", labels[i])
            np.testing.assert_array_equal(np.asarray(image), pixels[i])
    assert "no label file" in write_shards(f"idx:{images}", tmp_path / "plain").text()


def test_bad_idx(tmp_path: Path) -> None:
    good = idx_bytes(np.zeros((2, 4, 4)))
    path = tmp_path / "x"
    for data, message in (
        (good[:-1], "expected 32 bytes of data, received 31"),
        (good + b"x", "expected 32 bytes of data, received more"),
        (b"PNG", "does not begin like an IDX file"),
        (b"\0\0\x08\x03\0\0", "its header promises the shape|buffer size"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "its header promises the shape"),
        (gzip.compress(good)[:-12], "cannot read the IDX file"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_idx(str(path))
    with pytest.raises(ValueError, match="cannot read the IDX file.*No such file"):
        read_idx(str(tmp_path / "none"))
    path.write_bytes(good)
    (tmp_path / "labels").write_bytes(idx_bytes(np.zeros(3)))
    with pytest.raises(ValueError, match=r"has the shape \(3,\), expected \(2,\)"):
        open_origin(f"idx:{path}:{tmp_path / 'labels'}").list_items()
    with pytest.raises(ValueError, match="expected images"):
        open_origin(f"idx:{tmp_path / 'labels'}").list_items()


def mnist_like(root: Path) -> np.ndarray:  # type: ignore[type-arg]
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(12) % 10))
    return pixels


def test_torchvision(tmp_path: Path) -> None:
    pixels = mnist_like(tmp_path)
    report = write_shards(
        f"torchvision:FashionMNIST:{tmp_path}:test", tmp_path / "out", shuffle=False
    )
    assert report.classes[:2] == ["T-shirt/top", "Trouser"]
    assert report.counts == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    data = next(iter(contents(tmp_path / "out").values()))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels[0])
    for source, message in (
        ("torchvision:FashionMNITS:/x", "unknown torchvision data set.*'FashionMNIST'"),
        (f"torchvision:FashionMNIST:{tmp_path}:odd", "has the splits"),
        ("torchvision:FashionMNIST:/nowhere", "is not usable under"),
        ("torchvision:FashionMNIST", "expected torchvision:NAME:ROOT"),
    ):
        with pytest.raises(ValueError, match=message):
            open_origin(source).list_items()


def test_torchvision_sets_of_files_keep_their_bytes(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    shutil.rmtree(root / ".git")  # torchvision would take it for a class
    report = write_shards(f"torchvision:ImageFolder:{root}", tmp_path / "out")
    assert report.total == 18
    assert {d for d, _ in contents(tmp_path / "out").values()} == {
        p.read_bytes() for p in root.rglob("im*")
    }


class Stop(Exception):
    pass


def test_interrupted_write_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in", per_class=12)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"samples_per_shard": 5}
    write_shards(root, whole, **options)

    for stop_at in (3, 14, 30):

        def stop(done: int, total: int, at: int = stop_at) -> None:
            if done == at:
                raise Stop

        with pytest.raises(Stop):
            write_shards(root, cut, **options, progress=stop)
        assert not list(cut.glob("*tmp"))
        assert not (cut / "dataset.json").exists()
    # As after a kill: half a temporary shard, half a log line, a shard that was not logged.
    (cut / "shard-000005.tar.multikd-tmp").write_bytes(b"half")
    with (cut / LOG).open("a") as log:
        log.write('{"name": "shard-0000')
    stamps = {path: path.stat().st_mtime_ns for path in cut.glob("shard-00000[0-3].tar")}
    report = write_shards(root, cut, **options)
    assert report.kept_shards >= 4
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # kept, not rewritten
    assert shard_hashes(cut) == shard_hashes(whole)
    # A complete one is only looked at; a shard that was deleted since is written again.
    assert write_shards(root, cut, **options).kept_shards == len(report.shards)
    (cut / "shard-000002.tar").unlink()
    assert write_shards(root, cut, **options).kept_shards == 2
    assert shard_hashes(cut) == shard_hashes(whole)


def test_killed_process_leaves_what_can_be_continued(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in", per_class=100)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_shards(root, whole, samples_per_shard=10)
    code = (
        "import sys, time\n"
        "from multikd.data.writer import write_shards\n"
        "slow = lambda done, total: time.sleep(0.01)\n"
        "write_shards(sys.argv[1], sys.argv[2], samples_per_shard=10, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root), str(cut)])
    deadline = time.monotonic() + 60
    while not (cut / "shard-000003.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "dataset.json").exists()
    report = write_shards(root, cut, samples_per_shard=10)
    assert 3 <= report.kept_shards < len(report.shards)
    assert shard_hashes(cut) == shard_hashes(whole)


def test_mixing_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    out = tmp_path / "out"
    write_shards(root, out, samples_per_shard=7, seed=1)
    before = shard_hashes(out)
    with pytest.raises(ValueError, match=r"samples_per_shard was 7 and is now 8; seed was 1"):
        write_shards(root, out, samples_per_shard=8, seed=2)
    (root / "zebra" / "new.png").write_bytes(image_bytes(99))
    with pytest.raises(ValueError, match="the source has other images"):
        write_shards(root, out, samples_per_shard=7, seed=1)
    assert shard_hashes(out) == before
    (out / "mine.txt").write_text("mine")
    report = write_shards(root, out, samples_per_shard=100, overwrite=True)
    assert report.total == 19
    assert sorted(p.name for p in out.iterdir()) == [
        "dataset.json",
        "mine.txt",
        "shard-000000.tar",
        "shard-000000.tar.index.npz",
    ]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").touch()
    with pytest.raises(ValueError, match=r"holds .tar files but no dataset\.json"):
        write_shards(root, tmp_path / "foreign")


def test_second_writer_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with (
        file_lock(tmp_path / "out" / ".multikd-write.lock"),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        write_shards(root, tmp_path / "out")


def test_dead_worker_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multikd.data.writer as writer

    root = image_folder(tmp_path / "in")
    monkeypatch.setattr(writer, "_work", _die)
    with pytest.raises(RuntimeError, match="a worker process died"):
        write_shards(root, tmp_path / "out", workers=1)


def _die(items: list[tuple[int, str]]) -> None:
    os._exit(1)


def test_progress_counts_items(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    root = image_folder(tmp_path / "in")
    write_shards(root, tmp_path / "out", progress=lambda d, t: calls.append((d, t)))
    assert calls == [(i, 20) for i in range(1, 21)]


@pytest.mark.realdata
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    source = f"idx:{folder}/t10k-images-idx3-ubyte.gz:{folder}/t10k-labels-idx1-ubyte.gz"
    report = write_shards(source, tmp_path / "out", limit=500)
    assert report.total == 500
    assert len(report.classes) == 10
    assert min(report.counts) > 30
