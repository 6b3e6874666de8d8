"""`multikd teachers fit-head` and `calibrate`, and what a teacher does with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from data.shard_maker import png
from helpers.fitting import fit
from PIL import Image
from torch import Tensor

from multikd.checkpoints import load_student
from multikd.cli import main
from multikd.evaluation.temperature import calibrate, nll, scaled
from multikd.export import CardFacts, export_timm_folder
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.teachers.head import ClassifierHead, read_head, write_head
from multikd.teachers.kept import KeptTeacher, facts_of, identity, remember


def shards(folder: Path, count: int, first: int = 0) -> None:
    """Images of three kinds, dark, middling and bright, and a second label in their JSON."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a-000.tar", "w") as tar:
        for i in range(first, first + count):
            noise = np.asarray(Image.open(io.BytesIO(png(i, (32, 32)))), dtype=np.float32)
            grey = (noise * 0.3 + 60 * (i % 3)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(grey).save(buffer, "PNG")
            record = json.dumps({"parity": i % 2} if i % 5 else {}).encode()
            for name, data in (("png", buffer.getvalue()), ("cls", str(i % 3).encode()),
                               ("json", record)):  # fmt: skip
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifiers")
    shards(root / "train", 90)
    shards(root / "held", 120, first=1000)
    for name in ("test_vit2", "test_convnext"):
        torch.manual_seed(1)
        student = StudentEncoder(name, image_size=32)
        export_timm_folder(student, root / name, card=CardFacts(licence="mit"))
    return root


def model(root: Path, **terms: Any) -> dict[str, Any]:
    teachers = {
        "vit": {"class_path": "multikd.teachers.Teacher",
                "init_args": {"encoder": f"exported:{root / 'test_vit2'}",
                              "head": f"{root / 'heads' / 'vit.safetensors'}"}},
        "next": {"class_path": "multikd.teachers.Teacher",
                 "init_args": {"encoder": f"exported:{root / 'test_convnext'}",
                               "head": f"{root / 'heads' / 'next.safetensors'}"}},
    }  # fmt: skip
    return {
        "teachers": teachers,
        "student": {
            "class_path": "multikd.students.StudentEncoder",
            "init_args": {"name": "test_vit", "image_size": 32, "num_classes": 3},
        },
        "loss": {"class_path": "multikd.losses.NoFeatureLoss"},
        "terms": terms,
    }


def term(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"multikd.losses.{name}", "init_args": settings}


def test_from_features_to_a_student_that_knows_the_classes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fit-head → calibrate → fit with the calibrated teachers → export with the classifier."""
    from multikd.fit import run_lightning, without_known_noise

    content = model(root, response=term("ResponseTerm", alpha=0.8, temperature=2.0))
    content["terms"]["parity"] = term("LabelLoss", column="parity", num_classes=2, weight=0.1)
    config = root / "run.yaml"
    data = {
        "class_path": "multikd.data.module.ShardDataModule",
        "init_args": {
            "train": str(root / "train"),
            "train_views": {
                "class_path": "multikd.data.views.LightViews", "init_args": {"size": 32}
            },
            "batch_size": 30,
            "num_workers": 0,
            "label_columns": ["parity"],
        },
    }  # fmt: skip
    trainer = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": str(root / "run"),
        "callbacks": [{
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "last", "save_on_train_epoch_end": True},
        }],
    }  # fmt: skip
    whole = {"model": {"class_path": "multikd.modules.DistillationModule", "init_args": content},
             "data": data, "trainer": trainer}  # fmt: skip
    config.write_text(yaml.safe_dump(whole, sort_keys=False))
    assert main(["teachers", "fit-head", f"--config={config}", f"--data={root / 'train'}",
                 f"--out={root / 'heads'}", f"--json={root / 'heads.json'}"]) == 0  # fmt: skip
    figures = json.loads((root / "heads.json").read_text())["heads"]
    assert [row["teacher"] for row in figures] == ["vit", "next"]
    assert all(row["held_out_accuracy"] > 0.8 for row in figures)
    out = root / "calibrated.yaml"
    assert main(["teachers", "calibrate", f"--config={config}", f"--data={root / 'held'}",
                 f"--out={out}", f"--json={root / 'c.json'}"]) == 0  # fmt: skip
    rows = json.loads((root / "c.json").read_text())["teachers"]
    assert all(row["nll"] <= row["nll_before"] for row in rows), rows
    assert all(row["accuracy"] > 0.5 for row in rows), rows  # chance is a third
    written = yaml.safe_load(out.read_text())
    assert written["vit"]["init_args"]["temperature"] == rows[0]["temperature"]
    assert written["vit"]["init_args"]["head"] == f"{root / 'heads' / 'vit.safetensors'}"
    capsys.readouterr()
    assert main(["teachers", "calibrate", f"--config={config}", f"--data={root / 'train'}"]) == 2
    assert "100 labelled images or more, received 90" in capsys.readouterr().err
    with without_known_noise():
        cli = run_lightning(["fit", f"--config={config}", f"--model.teachers={out}"])
    trained = cli.model.teachers["vit"]
    assert trained.temperature == rows[0]["temperature"]
    checkpoint = root / "run" / "last.ckpt"
    assert main(["export", str(checkpoint), str(root / "student"), "--classifier"]) == 0
    images = torch.rand(2, 3, 32, 32)
    student = load_student(checkpoint).student
    exported = timm.create_model(f"local-dir:{root / 'student'}", pretrained=True).eval()
    logits = student(images).features.logits
    assert torch.equal(exported(student.normalize(images)), logits)
    # A student with a classifier teaches the next one.
    again = Teacher(f"exported:{root / 'student'}")
    assert again.num_classes == 3
    assert torch.allclose(again(images).logits, logits, atol=1e-5)


def test_labels_alone_need_no_teacher(root: Path) -> None:
    content = model(root, labels=term("LabelLoss")) | {"teachers": {}}
    run = fit(root / "alone", content, root / "train")
    assert main(["export", str(run.checkpoint), str(root / "alone-student"), "--classifier"]) == 0
    assert load_student(run.checkpoint).teachers == {}


# --------------------------------------------------------------------------------- the classifier


def test_a_head_gives_calibrated_logits_and_is_part_of_the_fingerprint(
    root: Path, tmp_path: Path
) -> None:
    encoder, path = f"exported:{root / 'test_vit2'}", tmp_path / "head.safetensors"
    plain = Teacher(encoder)
    weight, bias = torch.randn(3, plain.widths.summary), torch.randn(3)
    write_head(path, ClassifierHead(weight, bias, {"classes": 3}))
    images = torch.rand(2, 3, 32, 32)
    features = plain(images)
    assert features.logits is None
    expected = features.summary @ weight.T + bias
    head = Teacher(encoder, head=str(path))
    assert head.num_classes == 3
    assert torch.allclose(head(images).logits, expected, atol=1e-5)
    assert torch.equal(head(images).summary, features.summary)
    cold = Teacher(encoder, head=str(path), temperature=2.0, bias=[0.0, 1.0, -1.0])
    shifted = expected / 2 + torch.tensor([0.0, 1.0, -1.0])
    assert torch.allclose(cold(images).logits, shifted, atol=1e-5)
    assert len({t.fingerprint() for t in (plain, head, cold)}) == 3
    # One whose features are kept knows its classes, and gives the same if it must run.
    settings = {"encoder": "timm:test_vit2", "head": str(path), "bias": [0.0, 1.0, -1.0]}
    write_head(path, ClassifierHead(torch.randn(3, 64), bias, {}))
    torch.manual_seed(0)
    other = remember(Teacher(cold.encoder, head=str(path), bias=[0.0, 1.0, -1.0]), settings)
    facts = facts_of(other, [(32, 32)], None)
    kept = KeptTeacher(facts, settings)
    assert (kept.num_classes, kept.fingerprint()) == (3, other.fingerprint())
    kept._make = lambda: Teacher(cold.encoder, head=str(path), bias=[0.0, 1.0, -1.0])
    assert torch.equal(kept(images).logits, other(images).logits)
    before = identity(settings)
    write_head(path, ClassifierHead(torch.randn(4, 64), torch.randn(4), {}))
    assert identity(settings) != before


def test_a_head_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(ValueError, match="there is no classifier at"):
        read_head(path, 4, "e")
    path.write_bytes(b"noise" * 9)
    with pytest.raises(ValueError, match="holds no classifier"):
        read_head(path, 4, "e")
    write_head(path, ClassifierHead(torch.zeros(3, 5), torch.zeros(3), {}))
    with pytest.raises(ValueError, match="is for vectors of 5, and e gives 4"):
        read_head(path, 4, "e")
    with pytest.raises(ValueError, match="two classes or more"):
        ClassifierHead(torch.zeros(1, 5), torch.zeros(1), {})


# ---------------------------------------------------------------------------------- temperature


def answers(count: int, classes: int, sharp: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose right temperature is ``sharp``: labels are drawn from ``softmax(z/sharp)``."""
    generator = torch.Generator().manual_seed(seed)
    z = sharp * 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    p = torch.softmax(z / sharp, dim=1)
    return z, torch.multinomial(p, 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("sharp", [0.25, 1.0, 5.0])
def test_the_temperature_is_where_scipy_finds_the_least_nll(sharp: float) -> None:
    from scipy.optimize import minimize_scalar

    z, y = answers(4000, 7, sharp)
    found = calibrate(z, y)
    best = minimize_scalar(lambda t: nll(z / np.exp(t), y), bounds=(-4, 4), method="bounded",
                           options={"xatol": 1e-9})  # fmt: skip
    assert found.temperature == pytest.approx(float(np.exp(best.x)), rel=1e-4)
    assert found.temperature == pytest.approx(sharp, rel=0.1)
    assert found.nll == pytest.approx(float(best.fun), abs=1e-9)
    if sharp == 5.0:
        assert found.ece < found.ece_before / 4


def test_two_classes_get_platts_scaling_as_scikit_learn_fits_it() -> None:
    from sklearn.linear_model import LogisticRegression

    z, _ = answers(3000, 2, 1.0)
    difference = (z[:, 1] - z[:, 0]).numpy()
    drawn = np.random.default_rng(0).random(3000)
    y = torch.from_numpy((drawn < 1 / (1 + np.exp(-(0.3 * difference - 1.2)))).astype(np.int64))
    found = calibrate(z, y)
    fitted = LogisticRegression(C=1e9, tol=1e-10).fit(difference[:, None], y.numpy())
    assert found.bias is not None
    assert 1 / found.temperature == pytest.approx(float(fitted.coef_[0, 0]), rel=0.01)
    assert found.bias[1] == pytest.approx(float(fitted.intercept_[0]), rel=0.01)
    assert found.nll < found.nll_before
    assert nll(scaled(z, found.temperature, found.bias), y) == found.nll


@pytest.mark.parametrize("classes", [2, 3])
def test_it_never_raises_the_nll(classes: int) -> None:
    for seed in range(8):
        z, _ = answers(100, classes, 1.0, seed)
        for y in (torch.randint(0, classes, (100,)), z.argmax(1), z.argmin(1), torch.zeros(100)):
            found = calibrate(z, y.long())
            assert found.nll <= found.nll_before
            assert found.temperature > 0


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (torch.zeros(99, 3), torch.zeros(99), "needs 100 labelled images or more, received 99"),
        (torch.zeros(100, 3), torch.full((100,), 3), "labels must be from 0 to 2"),
        (torch.full((100, 3), float("nan")), torch.zeros(100), "logits must be finite"),
        (torch.zeros(100), torch.zeros(100), r"needs logits \(M, K\)"),
    ],
)
def test_bad_answers_are_one_sentence(logits: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrate(logits, labels.long())
