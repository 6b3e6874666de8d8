"""Pictures for the page: the right neighbours, the right components, and no other file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.subjects import MemorySplit, MemorySubject, PooledPixels, fixed
from PIL import Image
from sklearn.decomposition import PCA

from multikd.retention.gallery import (
    Gallery,
    component_maps,
    neighbours,
    patch_components,
)


class ViewSplit(MemorySplit):
    """With single images, nearest pixel."""

    def view(self, index: int, size: Any) -> Any:
        image = self.images[index].permute(1, 2, 0).numpy()
        rows = np.arange(size[0]) * image.shape[0] // size[0]
        columns = np.arange(size[1]) * image.shape[1] // size[1]
        return image[rows][:, columns]


def flat(colours: list[tuple[int, int, int]]) -> torch.Tensor:
    """Images of one colour each, uint8 (M, 3, 32, 32)."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 32, 32).clone()


def opened(gallery: Gallery, name: str) -> Any:
    data = gallery.read(name)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def subject() -> MemorySubject:
    train = ViewSplit(
        flat([(250, 0, 0), (0, 250, 0), (0, 0, 250), (240, 20, 0)]),
        torch.tensor([0, 1, 2, 1]), classes=["red", "green", "blue"],
    )  # fmt: skip
    test = ViewSplit(flat([(0, 200, 10), (200, 0, 0)]), torch.tensor([1, 0]),
                     classes=["red", "green", "blue"])  # fmt: skip
    return MemorySubject({"train": train, "test": test}, encoder=PooledPixels())


def test_the_nearest_images_are_shown_with_their_classes(
    subject: MemorySubject, tmp_path: Path
) -> None:
    gallery = Gallery(tmp_path)
    found = neighbours(subject, gallery, rows=2, columns=2)
    assert found is not None
    first, second = found["queries"]
    assert [first["class"], second["class"]] == ["red", "green"]  # one of each class, by label
    assert [n["class"] for n in first["neighbours"]] == ["red", "green"]  # (240, 20, 0) is "green"
    assert second["neighbours"][0]["class"] == "green"
    assert first["neighbours"][0]["similarity"] == pytest.approx(1.0, abs=1e-4)
    assert opened(gallery, first["picture"])[0, 0].tolist() == [200, 0, 0]
    assert opened(gallery, first["neighbours"][1]["picture"])[0, 0].tolist() == [240, 20, 0]
    # Named after their content: the same picture is there once.
    again = neighbours(subject, gallery, rows=2, columns=2)
    assert again == found
    assert len(list((tmp_path / "pictures").iterdir())) == len(
        {n["picture"] for q in found["queries"] for n in [q, *q["neighbours"]]}
    )


def test_without_labels_or_without_a_train_split(subject: MemorySubject, tmp_path: Path) -> None:
    for split in subject.splits.values():
        split.labels = None
    found = neighbours(subject, Gallery(tmp_path), rows=6, columns=9)
    assert found is not None
    assert len(found["queries"]) == 2
    assert all(q["class"] is None for q in found["queries"])
    assert all(len(q["neighbours"]) == 4 for q in found["queries"])
    del subject.splits["train"]
    assert neighbours(subject, Gallery(tmp_path)) is None


def test_components_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 4 * 5, 7, generator=generator) * torch.arange(1, 8)
    maps, explained = component_maps(patches, (4, 5))
    rows = patches.flatten(0, 1).double().numpy()
    reference = PCA(3, svd_solver="full").fit(rows)
    assert explained == pytest.approx(reference.explained_variance_ratio_.tolist(), abs=1e-9)
    projected = reference.transform(rows)
    for component in range(3):
        drawn = np.stack(maps)[..., component].ravel().astype(float)
        inner = (drawn > 0) & (drawn < 255)
        match = np.corrcoef(drawn[inner], projected[inner, component])[0, 1]
        assert abs(match) > 0.9999
        loading = reference.components_[component]
        positive = loading[np.abs(loading).argmax()] > 0
        assert (match > 0) == positive, "the sign is that of the largest loading"


def test_patches_that_do_not_differ_are_grey_and_few_components_do_not_fail() -> None:
    maps, explained = component_maps(torch.ones(2, 4, 5), (2, 2))
    assert explained == [0.0, 0.0, 0.0]
    assert all((m == 128).all() for m in maps)
    maps, explained = component_maps(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), (2, 2))
    assert explained == [1.0, 0.0, 0.0]
    assert (maps[0][..., 1:] == 128).all()
    with pytest.raises(ValueError, match=r"patches must be \(B, 2·3, D\)"):
        component_maps(torch.ones(1, 4, 2), (2, 3))
    with pytest.raises(ValueError, match="must be finite"):
        component_maps(torch.full((1, 4, 2), torch.nan), (2, 2))


def test_a_map_has_one_pixel_a_patch(subject: MemorySubject, tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[..., :16] = torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None]
    subject.splits["test"] = ViewSplit(images)
    gallery = Gallery(tmp_path)
    found = patch_components(subject, gallery)
    assert found is not None
    assert found["grid"] == [4, 4]
    drawn = opened(gallery, found["images"][0]["map"])
    assert drawn.shape == (4, 4, 3)
    # Left and right differ in the first component and in nothing else.
    assert (drawn[:, :2, 0] == 255).all()
    assert (drawn[:, 2:, 0] == 0).all()
    assert (drawn[..., 1:] == 128).all()


def test_a_map_of_four_squares_is_not_drawn(subject: MemorySubject, tmp_path: Path) -> None:
    subject.encoder = PooledPixels(patch=16)
    assert patch_components(subject, Gallery(tmp_path)) is None


def test_features_that_are_not_finite_are_refused(subject: MemorySubject, tmp_path: Path) -> None:
    summaries = {name: torch.full((len(s), 3), torch.nan) for name, s in subject.splits.items()}
    broken = MemorySubject(subject.splits, features=fixed(**summaries), name="broken")
    with pytest.raises(ValueError, match="must be finite"):
        neighbours(broken, Gallery(tmp_path))
    assert patch_components(broken, Gallery(tmp_path)) is None  # it has no patch tokens


def test_only_pictures_of_the_folder_are_read(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    name = gallery.add(np.zeros((2, 2, 3), dtype=np.uint8))
    assert gallery.read(name) is not None
    outside = tmp_path / "0123456789abcdef.png"
    outside.write_bytes(gallery.read(name) or b"")
    text = gallery.folder / "00000000000000aa.png"
    text.write_bytes(b"no PNG")
    link = gallery.folder / "00000000000000bb.png"
    link.symlink_to(outside)
    large = gallery.folder / "00000000000000cc.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2**20))
    for wrong in (
        f"../{outside.name}", str(outside), outside.name, text.name, link.name, large.name, "", 3,
        None, f"{name}\n",
    ):  # fmt: skip
        assert gallery.read(wrong) is None, wrong
