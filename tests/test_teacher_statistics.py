"""``multikd teachers stats``: measured over the command line, then used by a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from data.shard_maker import make_shards

from multikd.cli import main
from multikd.data.module import ShardDataModule
from multikd.fit import build_cli
from multikd.modules.distillation import to_float
from multikd.normalizers import PHISNormalizer
from multikd.normalizers.measured import read_statistics
from multikd.types import Widths


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a small run with one teacher of 64 dimensions."""
    root = tmp_path_factory.mktemp("statistics")
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), root / "teacher.pth")
    make_shards(root / "shards", [20, 20], size=(32, 32))
    own = {
        "class_path": "multikd.teachers.Teacher",
        "init_args": {
            "encoder": "timm:test_vit",
            "checkpoint": str(root / "teacher.pth"),
            "image_size": 32,
        },
    }
    return [
        "--config=laptop",
        f"--model.teachers={json.dumps({'own': own})}",
        "--model.student.image_size=32",
        f"--data.train={root / 'shards'}",
        "--data.train_views.size=32",
        "--data.batch_size=10",
        "--data.num_workers=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=1",
    ]


def test_it_measures_the_training_views_and_a_run_reads_them(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, figures = tmp_path / "s t.safetensors", tmp_path / "s.json"
    arguments = [*run, "--images", "25", "--out", str(file), "--json", str(figures)]
    assert main(["teachers", "stats", *arguments]) == 0
    said = capsys.readouterr()
    assert "30 images →" in said.out  # whole batches
    hint = shlex.split(said.out.splitlines()[-1].partition("to use them: ")[2])
    assert hint[1] == f"--model.normalizers.statistics={file}"  # a path with a space is quoted
    assert "too few: own/summary" in said.out

    # The same views, run by hand, and numpy on all of them at once.
    cli = build_cli(run, run=False)
    assert isinstance(cli.datamodule, ShardDataModule)
    cli.datamodule.setup("fit")
    parts = [b.views[0] for b, _ in zip(cli.datamodule.train_dataloader(), range(3), strict=False)]
    features = cli.model.run_teacher("own", to_float(torch.cat(parts)))
    found = read_statistics(file, "own", Widths(64, 64))
    for token in ("summary", "patches"):
        y = getattr(features, token).double().numpy().reshape(-1, 64)
        assert found[token].n == len(y)
        np.testing.assert_allclose(found[token].mean, y.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[token].covariance, np.cov(y.T), rtol=1e-3, atol=1e-5)
    rows = json.loads(figures.read_text())["statistics"]
    assert [r["hadamard"] for r in rows] == ["Sylvester 64"] * 2
    assert json.loads(figures.read_text())["teachers"]["own"]["encoder"] == "timm:test_vit"

    use = ["--model.normalizers=PHISNormalizers", f"--model.normalizers.statistics={file}"]
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert main(["fit", *run, *use, folder]) == 0
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    fresh = build_cli([*run, *use], run=False).model.normalizer("own")
    assert isinstance(fresh, PHISNormalizer)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(kept[f"normalizers.own.{name}"], buffer), name
    # Statistics can be measured for a config that names a file that is not there yet.
    file.unlink()
    again = [*run, *use, "--out", str(file), "--images", "10"]
    assert main(["teachers", "stats", *again]) == 0
    assert file.is_file()
    # And the export needs the file no more.
    file.unlink()
    export = ["export", str(tmp_path / "run" / "last.ckpt"), str(tmp_path / "out")]
    assert main([*export, "--heads", "own", "--no-cost"]) == 0


def test_a_teacher_is_measured_on_its_own_data(run: list[str], tmp_path: Path) -> None:
    root = Path(next(a for a in run if a.startswith("--data.train=")).partition("=")[2]).parent
    make_shards(root / "others", [30], name="others", size=(32, 32))
    teachers = json.loads(next(a for a in run if "model.teachers=" in a).partition("=")[2])
    teachers["other"] = teachers["own"]
    mixed = [a for a in run if not a.startswith(("--model.teachers=", "--data.train="))]
    train = {
        "mine": {"urls": str(root / "shards"), "teachers": ["own"]},
        "theirs": {"urls": str(root / "others"), "teachers": ["other"], "weight": 3.0},
    }
    mixed += [f"--model.teachers={json.dumps(teachers)}", f"--data.train={json.dumps(train)}",
              "--model.teacher_data=own"]  # fmt: skip
    file, figures = tmp_path / "s.safetensors", tmp_path / "s.json"
    arguments = [*mixed, "--images", "12", "--out", str(file), "--json", str(figures)]
    assert main(["teachers", "stats", *arguments]) == 0

    cli = build_cli(mixed, run=False)
    cli.datamodule.setup("fit")
    batches = list(cli.datamodule.train_dataloader())
    told = json.loads(figures.read_text())
    for place, name in enumerate(("own", "other")):
        rows, seen = [], [0, 0]
        for batch in batches:
            rows.append(batch.views[0][batch.dataset == place])
            seen = [n + int((batch.dataset == i).sum()) for i, n in enumerate(seen)]
            if min(seen) >= 12:
                break
        y = cli.model.run_teacher(name, to_float(torch.cat(rows))).summary.double().numpy()
        found = read_statistics(file, name, Widths(64, 64))["summary"]
        assert found.n == len(y) == told["teachers"][name]["images"]
        np.testing.assert_allclose(found.mean, y.mean(0), rtol=1e-5, atol=1e-5)
    assert told["images"] == min(seen)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "1"], "--images must be 2 or more"),
        (["--teachers", "onw"], "did you mean 'own'"),
        (["--data.batch_size=100"], "fewer than one global batch of 100"),
        (["--model.normalizers=PHISNormalizers", "--modle.x=1"], "modle"),
    ],
)
def test_mistakes_are_one_sentence(
    run: list[str],
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "s.safetensors"
    assert main(["teachers", "stats", *run, "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert not out.exists()


def test_what_is_there_is_not_overwritten(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.safetensors"
    out.write_text("mine")
    assert main(["teachers", "stats", *run, "--out", str(out)]) == 2
    assert "exists: give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["teachers", "stats", "--out", str(tmp_path / "b")]) == 2
    assert "needs the run whose teachers are measured" in capsys.readouterr().err
