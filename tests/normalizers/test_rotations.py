"""PHI-S and whitening, against numpy on the whole data at once, and over ranks and checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.functional import batch_covariance
from multikd.normalizers import (
    CovarianceNormalizer,
    FixedStandardizers,
    GlobalStandardizers,
    NormalizerFactory,
    PHISNormalizer,
    PHISNormalizers,
    WhiteningNormalizers,
)
from multikd.normalizers.measured import Statistics, read_statistics, write_statistics
from multikd.types import TokenFeatures, Widths

FACTORIES = [PHISNormalizers, WhiteningNormalizers]
every_kind = pytest.mark.parametrize("kind", FACTORIES, ids=lambda k: k.__name__)


def correlated(width: int, n: int, mean: float = 20.0) -> Tensor:
    """Features as foundation models give them: a few large directions, a mean far from 0."""
    generator = torch.Generator().manual_seed(width)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.logspace(1, -1, width)
    shift = mean * torch.randn(width, generator=generator)
    return torch.randn(n, width, generator=generator) * scales @ mix + shift


def learn(normalizer: CovarianceNormalizer, rows: Tensor, batch: int) -> CovarianceNormalizer:
    for part in rows.split(batch):
        normalizer.update(TokenFeatures(part))
    return normalizer


def phis(width: int, images: int = 10**9, **settings: int) -> PHISNormalizer:
    normalizer = PHISNormalizers(images=images, **settings).build(Widths(width, None))
    assert isinstance(normalizer, PHISNormalizer)
    return normalizer


@pytest.mark.parametrize("width", [64, 96, 384, 768, 1152, 1280])
def test_phi_s_figures(width: int) -> None:
    """Variance 1 ± 1e-3 of every output dimension, and an exact inverse, at encoders' widths."""
    rows = correlated(width, 1536)
    normalizer = learn(phis(width, images=1536, every=10**9), rows, 512)
    out = normalizer(TokenFeatures(rows))
    assert out.summary is not None
    y = out.summary.double()
    assert out.summary.dtype == torch.float32
    assert (y.var(0) - 1.0).abs().max() < 1e-3
    assert y.mean(0).abs().max() < 1e-3
    back = normalizer.inverse(out).summary
    assert back is not None
    assert ((back - rows).abs() / rows.abs().amax(0)).max() < 1e-4
    # A rotation and one scale: distances keep their proportions.
    matrix = normalizer.get_buffer("summary_matrix").double()
    scale = matrix.square().sum() / width
    assert (matrix @ matrix.T / scale - torch.eye(width)).abs().max() < 1e-5
    expected = np.cov(rows.double().numpy().T).trace() / width
    assert scale.item() == pytest.approx(1.0 / expected, rel=1e-5)


@pytest.mark.parametrize("width", [6, 92])
def test_phi_s_of_a_width_without_a_hadamard_matrix(
    width: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        normalizer = phis(width, images=1000)
    assert f"no Hadamard matrix of width {width}" in caplog.text
    rows = correlated(width, 1000)
    learn(normalizer, rows, 250)
    out = normalizer(TokenFeatures(rows))
    assert out.summary is not None
    assert (out.summary.double().var(0) - 1.0).abs().max() < 1e-3
    back = normalizer.inverse(out).summary
    assert back is not None
    torch.testing.assert_close(back, rows, rtol=1e-4, atol=1e-4)


def test_phi_s_of_dimensions_that_never_vary() -> None:
    rows = correlated(12, 400)
    rows[:, 3:] = 7.0
    out = learn(phis(12, images=400), rows, 100)(TokenFeatures(rows))
    assert out.summary is not None
    assert (out.summary.double().var(0) - 1.0).abs().max() < 1e-3
    constant = torch.full((50, 12), 3.0)
    same = learn(phis(12, images=50), constant, 25)
    result = same(TokenFeatures(constant)).summary
    assert result is not None
    torch.testing.assert_close(result, torch.zeros(50, 12), rtol=0, atol=1e-6)


def test_whitening_against_numpy() -> None:
    rows = correlated(24, 3000)
    normalizer = WhiteningNormalizers(images=3000, floor=1e-9).build(Widths(24, None))
    learn(normalizer, rows, 500)
    out = normalizer(TokenFeatures(rows)).summary
    assert out is not None
    np.testing.assert_allclose(np.cov(out.double().numpy().T), np.eye(24), atol=1e-3)
    y = rows.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(y.T))
    expected = (y - y.mean(0)) @ (vectors / np.sqrt(values)) @ vectors.T
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_whitening_leaves_small_directions_small() -> None:
    rows = correlated(24, 3000)
    normalizer = WhiteningNormalizers(images=3000, floor=1e-2).build(Widths(24, None))
    learn(normalizer, rows, 500)
    out = normalizer(TokenFeatures(rows))
    assert out.summary is not None
    values = np.linalg.eigvalsh(np.cov(out.summary.double().numpy().T))
    assert values.max() == pytest.approx(1.0, abs=1e-3)
    assert values.min() < 0.02
    back = normalizer.inverse(out).summary
    assert back is not None
    torch.testing.assert_close(back, rows, rtol=1e-4, atol=1e-3)


@every_kind
def test_it_is_frozen_at_its_image_count(kind: type[NormalizerFactory]) -> None:
    rows = correlated(8, 600)
    normalizer = kind(images=256).build(Widths(8, None))  # type: ignore[call-arg]
    assert isinstance(normalizer, CovarianceNormalizer)
    learn(normalizer, rows[:300], 100)
    before = {n: b.clone() for n, b in normalizer.named_buffers()}
    assert before["images_seen"] == 300
    learn(normalizer, rows[300:], 100)
    for name, buffer in normalizer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_schedule_of_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = PHISNormalizer.decompose

    def counted(self: PHISNormalizer, covariance: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(int(self.updates))
        return original(self, covariance)

    monkeypatch.setattr(PHISNormalizer, "decompose", counted)
    rows = correlated(8, 200)
    learn(phis(8, images=110), rows, 10)
    assert calls == [1, 2, 4, 8, 11]  # doubling, and the last one at 110 images
    calls.clear()
    learn(phis(8, images=110, every=5), rows, 10)
    assert calls == [1, 5, 10, 11]
    # A run that goes on with half the batch: five updates were what ten are now.
    calls.clear()
    normalizer = phis(8, images=110)
    learn(normalizer, rows[:50], 10)
    normalizer.rescale_updates(2.0)
    learn(normalizer, rows[50:], 5)
    assert calls == [1, 2, 4, 16, 22]
    assert normalizer.get_buffer("images_seen") == 110


def test_patches_count_images_and_slices_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from multikd import functional

    rows = correlated(8, 36 * 9, mean=1000.0)
    n, mean, scatter = batch_covariance(rows)
    y = rows.double().numpy()
    np.testing.assert_allclose(mean, y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scatter / (n - 1), np.cov(y.T), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(functional, "_COVARIANCE_ROWS", 50)
    torch.testing.assert_close(batch_covariance(rows)[2], scatter)
    normalizer = PHISNormalizers(images=36).build(Widths(None, 8))
    for part in rows.view(36, 9, 8).split(12):
        normalizer.update(TokenFeatures(patches=part, grid=(3, 3)))
    assert normalizer.get_buffer("images_seen") == 36
    covariance = normalizer.get_buffer("patches_scatter") / (36 * 9 - 1)
    np.testing.assert_allclose(covariance, np.cov(y.T), rtol=1e-6, atol=1e-9)


def _on_ranks(kind: type[NormalizerFactory], rows: Tensor) -> dict[str, Tensor]:
    normalizer = kind(images=512).build(Widths(96, None))  # type: ignore[call-arg]
    for part in rows.split(128):
        half = len(part) // D.world_size()
        normalizer.update(TokenFeatures(part[D.rank() * half :][:half]))
    return dict(normalizer.named_buffers())


@every_kind
def test_two_ranks_equal_one_and_each_other(kind: type[NormalizerFactory]) -> None:
    rows = correlated(96, 512)
    rows[64:128] += 3.0  # unequal ranks
    whole = _on_ranks(kind, rows)
    first, second = run_ranks(_on_ranks, 2, kind, rows)
    for name, buffer in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], buffer, rtol=1e-5, atol=1e-5)


@every_kind
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(kind: type[NormalizerFactory]) -> None:
    rows = correlated(16, 400)

    def fresh() -> CovarianceNormalizer:
        made = kind(images=300).build(Widths(16, None))  # type: ignore[call-arg]
        assert isinstance(made, CovarianceNormalizer)
        return made

    whole = learn(fresh(), rows, 50)
    first = learn(fresh(), rows[:150], 50)
    resumed = fresh().to(torch.bfloat16)  # as bf16-true moves it
    resumed.load_state_dict(first.state_dict())
    learn(resumed, rows[150:], 50)
    for name, buffer in whole.named_buffers():
        assert resumed.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(buffer, resumed.get_buffer(name)), name


# --- statistics from a file ----------------------------------------------------------------------


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    rows = correlated(12, 500).double()
    of = Statistics(500, rows.mean(0), torch.from_numpy(np.cov(rows.numpy().T)))
    write_statistics(tmp_path / "s.safetensors", {"dino": {"summary": of}}, {"images": 500})
    return tmp_path / "s.safetensors"


@pytest.mark.parametrize(
    "kind", [PHISNormalizers, WhiteningNormalizers, FixedStandardizers, GlobalStandardizers]
)
def test_a_file_gives_what_measuring_gives(kind: type[NormalizerFactory], statistics: Path) -> None:
    rows = correlated(12, 500)
    widths = Widths(12, None)
    read = kind(statistics=str(statistics)).for_teacher("dino", widths)  # type: ignore[call-arg]
    measured = kind(images=500).build(widths)  # type: ignore[call-arg]
    for part in rows.split(100):
        measured.update(TokenFeatures(part))
    ours, theirs = read(TokenFeatures(rows)).summary, measured(TokenFeatures(rows)).summary
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    before = {n: b.clone() for n, b in read.named_buffers()}
    read.update(TokenFeatures(rows + 5.0))
    assert all(torch.equal(b, before[n]) for n, b in read.named_buffers())
    # A factory without a file still builds for a checkpoint, which brings the statistics.
    again = kind(statistics="gone").build(widths)  # type: ignore[call-arg]
    again.load_state_dict(read.state_dict())
    again.update(TokenFeatures(rows + 5.0))
    assert torch.equal(again(TokenFeatures(rows)).summary, ours)  # type: ignore[arg-type]


def test_global_standardisation_is_one_scale(statistics: Path) -> None:
    normalizer = GlobalStandardizers(statistics=str(statistics)).for_teacher(
        "dino", Widths(12, None)
    )
    y = correlated(12, 500).double().numpy()
    out = normalizer(TokenFeatures(torch.from_numpy(y))).summary
    assert out is not None
    expected = (y - y.mean(0)) / np.sqrt(y.var(0, ddof=1).mean())
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_fit_are_refused(statistics: Path, tmp_path: Path) -> None:
    def read(path: Path, name: str = "dino", widths: Widths | None = None) -> object:
        return read_statistics(path, name, widths or Widths(12, None))

    with pytest.raises(ValueError, match=r"unknown teacher in .*'dina'.*did you mean 'dino'"):
        read(statistics, "dina")
    with pytest.raises(ValueError, match="are 12 wide and the teacher gives 13"):
        read(statistics, widths=Widths(13, None))
    with pytest.raises(ValueError, match="has no patches of teacher 'dino'"):
        read(statistics, widths=Widths(12, 4))
    with pytest.raises(ValueError, match="can't be read as statistics"):
        read(tmp_path / "gone.safetensors")
    (tmp_path / "noise").write_bytes(b"noise " * 100)
    with pytest.raises(ValueError, match="can't be read as statistics"):
        read(tmp_path / "noise")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no statistics of teachers"):
        read(tmp_path / "weights.safetensors")
    few, nan = torch.zeros(12, dtype=torch.float64), torch.full((12, 12), torch.nan).double()
    for n, covariance in ((0, torch.eye(12).double()), (500, nan), (500, torch.eye(3).double())):
        of = Statistics(n, few, covariance)
        write_statistics(tmp_path / "bad.safetensors", {"dino": {"summary": of}}, {"images": n})
        with pytest.raises(ValueError, match="summary of teacher 'dino' are of"):
            read(tmp_path / "bad.safetensors")
