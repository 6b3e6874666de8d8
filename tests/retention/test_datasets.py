"""Data sets: every source gives the same images, labels agree, metadata and targets fit."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from retention.conftest import write_folder

from multikd.data.views import EvalViews
from multikd.retention.datasets import DataSpec, open_data


def grey(count: int, side: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)


def idx(path: Path, values: np.ndarray) -> Path:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))
    return path


def tar_of(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def first(spec: DataSpec):
    return open_data("d", spec).splits["test"]


def test_idx_shards_and_folders_show_the_same_pixels(tmp_path: Path) -> None:
    images, labels = grey(5), np.array([0, 1, 1, 0, 2], dtype=np.uint8)
    files = idx(tmp_path / "i", images), idx(tmp_path / "l", labels)
    by_idx = first(DataSpec(test=f"idx:{files[0]}:{files[1]}"))
    tar_of(
        tmp_path / "x.tar",
        [(f"s{i}", {"png": encoded(images[i]), "cls": str(labels[i]).encode()}) for i in range(5)],
    )
    by_shard = first(DataSpec(test=str(tmp_path / "x.tar")))
    for i in range(5):
        place = tmp_path / "f" / "abc"[labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(encoded(images[i]))
    by_folder = first(DataSpec(test=str(tmp_path / "f")))
    assert by_idx.labels.tolist() == by_shard.labels.tolist() == [0, 1, 1, 0, 2]
    assert by_folder.classes == ("a", "b", "c")
    seen = {i: by_idx.pixels(i, (40, 40)) for i in range(5)}
    policy = EvalViews(40)
    for i in range(5):
        np.testing.assert_array_equal(seen[i], by_shard.pixels(i, (40, 40)))
        # And what training's evaluation shows.
        view = policy.apply(Image.fromarray(images[i]).convert("RGB"), np.zeros(0, np.float32))
        np.testing.assert_array_equal(seen[i], view.numpy())
        row = by_folder.keys.index(f"{'abc'[labels[i]]}/{i}.png")
        np.testing.assert_array_equal(seen[i], by_folder.pixels(row, (40, 40)))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_in_order_and_a_corrupt_image_is_named(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path, {"a": 6, "b": 5})
    (root / "a" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    split = first(DataSpec(test=str(root)))
    batches = list(split.batches((16, 16), batch_size=4, workers=workers))
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(11))
    assert [k for b in batches for k in b.keys] == list(split.keys)
    assert torch.cat([b.labels for b in batches]).tolist() == [0] * 6 + [1] * 5
    faults = [fault for batch in batches for fault in batch.faults]
    assert [fault.key for fault in faults] == ["a/003.png"]
    # Its place shows the next image, so that the pass goes on.
    np.testing.assert_array_equal(batches[0].views[0][3], split.pixels(4, (16, 16)))
    assert list(split.without([3]).keys) == [k for k in split.keys if k != "a/003.png"]


def test_the_fingerprint_follows_images_order_and_number_but_not_labels(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", {"a": 3, "b": 3})
    spec = DataSpec(test=str(root))
    before = first(spec).fingerprint()
    assert first(spec).fingerprint() == before
    assert first(DataSpec(test=str(root), limit=4)).fingerprint() != before
    renamed = DataSpec(test=str(root), classes=["b", "a"])
    assert first(renamed).fingerprint() == before
    assert first(renamed).labels.tolist() == [1, 1, 1, 0, 0, 0]
    (root / "a" / "001.png").write_bytes((root / "b" / "001.png").read_bytes())
    assert first(spec).fingerprint() != before


def test_test_classes_are_numbered_as_in_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ash": 2, "elm": 2, "oak": 2})
    write_folder(tmp_path / "test", {"elm": 1, "oak": 1})
    data = open_data("d", DataSpec(train=str(tmp_path / "train"), test=str(tmp_path / "test")))
    assert data.splits["test"].labels.tolist() == [1, 2]
    write_folder(tmp_path / "test", {"yew": 1})
    with pytest.raises(ValueError, match=r"d/test: unknown class 'yew'"):
        open_data("d", DataSpec(train=str(tmp_path / "train"), test=str(tmp_path / "test")))


def test_metadata_comes_from_a_table_or_from_json(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "x", {"a": 2})
    table = tmp_path / "t.csv"
    table.write_text("key,camera\n000,old\na/001.png,new\n", encoding="utf-8")
    split = first(DataSpec(test=str(root), metadata=str(table)))
    assert split.metadata == {"camera": ["old", "new"]}
    members = {"png": encoded(grey(1)[0]), "json": json.dumps({"label": 1, "site": "x"}).encode()}
    tar_of(tmp_path / "j.tar", [("k", members)])
    by_json = first(DataSpec(test=str(tmp_path / "j.tar")))
    assert by_json.metadata == {"site": ["x"]}
    assert by_json.labels.tolist() == [1]
    table.write_text("key,camera\nother,old\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of the images of d/test"):
        first(DataSpec(test=str(root), metadata=str(table)))
    table.write_text("name\nother\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needs a column 'key'"):
        first(DataSpec(test=str(root), metadata=str(table)))


def test_several_labels_an_image(tmp_path: Path) -> None:
    def member(labels: list[str]) -> dict[str, bytes]:
        return {"png": encoded(grey(1)[0]), "json": json.dumps({"labels": labels}).encode()}

    tar_of(tmp_path / "m.tar", [("0", member(["cat"])), ("1", member(["cat", "sofa"]))])
    split = first(DataSpec(test=str(tmp_path / "m.tar")))
    assert split.classes == ("cat", "sofa")
    assert split.labels.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_a_table_gives_several_labels_and_columns(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2})
    table = tmp_path / "t.csv"
    table.write_text("path,labels,site\na/000.png,cat;sofa,x\na/001.png,,y\n", encoding="utf-8")
    split = first(DataSpec(test=str(table)))
    assert split.labels.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert split.classes == ("cat", "sofa")
    assert split.metadata == {"site": ["x", "y"]}
    with pytest.raises(ValueError, match=r"label 'sofa' is outside the class list"):
        first(DataSpec(test=str(table), classes=["cat"]))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_dense_layouts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = random.integers(0, 4, (20, 30), dtype=np.uint8)
    root = tmp_path / "ade"
    save(root / "images" / "training" / "x.jpg", image)
    save(root / "annotations" / "training" / "x.png", mask)
    ade = first(DataSpec(test=f"ade20k:{root}:training"))
    expected = np.where(mask == 0, 255, mask.astype(int) - 1)[:, 5:25]
    np.testing.assert_array_equal(ade.target(0, (20, 20)), expected)
    assert ade.dense == "mask"
    assert ade.view(0, (20, 20)).shape == (20, 20, 3)

    voc = tmp_path / "voc"
    save(voc / "JPEGImages" / "x.jpg", image)
    palette = Image.fromarray(mask, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    (voc / "SegmentationClass").mkdir()
    palette.save(voc / "SegmentationClass" / "x.png")
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("x\n")
    np.testing.assert_array_equal(
        first(DataSpec(test=f"voc:{voc}:val")).target(0, (20, 20)), mask[:, 5:25]
    )

    depth = random.integers(0, 9000, (20, 30), dtype=np.uint16)
    scene = tmp_path / "nyu" / "kitchen"
    save(scene / "rgb_00001.jpg", image)
    save(scene / "sync_depth_00001.png", depth)
    nyu = first(DataSpec(test=f"nyud:{tmp_path / 'nyu'}"))
    assert nyu.dense == "depth"
    np.testing.assert_allclose(nyu.target(0, (20, 20)), depth[:, 5:25] / 1000, rtol=1e-6)


def test_dense_mistakes(tmp_path: Path) -> None:
    images, masks = tmp_path / "i", tmp_path / "m"
    save(images / "x.png", np.zeros((20, 30, 3), np.uint8))
    save(masks / "x.png", np.zeros((20, 20), np.uint8))
    spec = DataSpec(test=f"masks:{images}:{masks}", classes=["wall", "sky"])
    with pytest.raises(ValueError, match=r"mask of x is 20×20 and its image 30×20"):
        open_data("d", spec)
    save(masks / "x.png", np.full((20, 30), 7, np.uint8))
    with pytest.raises(ValueError, match=r"class 7, outside the 2 classes"):
        open_data("d", spec)
    (masks / "x.png").unlink()
    with pytest.raises(ValueError, match=r"every image needs its target"):
        open_data("d", spec)
