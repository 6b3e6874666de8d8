"""`multikd teachers fit-head` and `calibrate`, and what a teacher does with them."""

from __future__ import annotations

import io
import json
import shlex
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

from multikd import teacher_classifiers
from multikd.checkpoints import load_student
from multikd.cli import main
from multikd.evaluation.temperature import Calibrated, calibrate, nll, scaled
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


def commanded(root: Path, path: Path, **teachers: Any) -> str:
    """A config for the commands alone, of these teachers."""
    content = model(root) | {"teachers": teachers}
    data = {"train": str(root / "train"), "num_workers": 0,
            "eval_views": {"class_path": "multikd.data.views.EvalViews",
                           "init_args": {"size": 32}}}  # fmt: skip
    path.write_text(yaml.safe_dump({
        "model": {"class_path": "multikd.modules.DistillationModule", "init_args": content},
        "data": {"class_path": "multikd.data.module.ShardDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }))  # fmt: skip
    return f"--config={path}"


def of(encoder: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": "multikd.teachers.Teacher", "init_args": {"encoder": encoder, **settings}}


def test_an_encoder_stands_in_place_of_a_config_and_of_its_teachers(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = f"exported:{root / 'test_vit2'}"
    config = commanded(root, tmp_path / "c.yaml", other=of(f"exported:{root / 'test_convnext'}"))
    for given in ([], [config]):
        out, told = tmp_path / f"a head {len(given)}.safetensors", tmp_path / "told.json"
        command = ["teachers", "fit-head", *given, "--encoder", encoder, "--data.num_workers=0",
                   f"--data={root / 'train'}", f"--out={out}", f"--json={told}"]  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
        rows = json.loads(told.read_text())["heads"]
        assert [row["teacher"] for row in rows] == ["test_vit2"]
        assert Teacher(encoder, head=str(out)).num_classes == 3
        # A path with a space is quoted in the hint.
        hint = capsys.readouterr().out.splitlines()[-1].partition("to use it: ")[2]
        assert shlex.split(hint) == [f"--model.teachers.test_vit2.init_args.head={out}"]


def test_calibrating_one_teacher_leaves_the_others_as_they_were(root: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("vit", "next"):
        head = ClassifierHead(torch.randn(3, 64, generator=generator), torch.zeros(3), {})
        write_head(tmp_path / f"{name}.safetensors", head)
    config = commanded(
        root, tmp_path / "c.yaml",
        vit=of(f"exported:{root / 'test_vit2'}", head=str(tmp_path / "vit.safetensors")),
        next=of(f"exported:{root / 'test_vit2'}", head=str(tmp_path / "next.safetensors"),
                temperature=3.25, bias=[0.5, 0.0, -0.5]),
    )  # fmt: skip
    out = tmp_path / "calibrated.yaml"
    command = ["teachers", "calibrate", config, "--data", str(root / "held"), "--out", str(out)]
    assert main([*command, "--teachers", "vit"]) == 0
    written = yaml.safe_load(out.read_text())
    assert written["next"]["init_args"]["temperature"] == 3.25
    assert written["next"]["init_args"]["bias"] == [0.5, 0.0, -0.5]
    assert written["vit"]["init_args"]["temperature"] != 1.0
    # One that is calibrated again starts from its bare logits.
    assert main([*command, "--overwrite", "--teachers", "next"]) == 0
    again = yaml.safe_load(out.read_text())["next"]["init_args"]
    assert again["temperature"] != 3.25
    assert "bias" not in again


def test_of_two_classes_no_temperature_is_offered_without_its_bias(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = Calibrated(2.0, [0.0, 1.0], 1.0, 0.5, 0.2, 0.1, 0.9)
    monkeypatch.setattr(teacher_classifiers, "calibrate", lambda z, y: calibrated)
    write_head(tmp_path / "h.safetensors", ClassifierHead(torch.ones(3, 64), torch.zeros(3), {}))
    encoder = of(f"exported:{root / 'test_vit2'}", head=str(tmp_path / "h.safetensors"))
    config = commanded(root, tmp_path / "c.yaml", vit=encoder)
    assert main(["teachers", "calibrate", config, "--data", str(root / "held")]) == 0
    assert "ResponseTerm" not in capsys.readouterr().out


def test_mistakes_of_the_commands_are_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = f"exported:{root / 'test_vit2'}"
    (tmp_path / "file").write_text("mine")
    trained = {"class_path": "multikd.teachers.TrainableTeacher",
               "init_args": {"encoder": "timm:test_resnet", "num_classes": 3}}  # fmt: skip
    adaptive = commanded(root, tmp_path / "a.yaml", t=trained)
    content = yaml.safe_load((tmp_path / "a.yaml").read_text())
    content["model"] = {"class_path": "multikd.modules.AdaptiveModule", "init_args": {
        "teachers": {"t": trained}, "student": model(root)["student"]}}  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    plain = commanded(root, tmp_path / "c.yaml", vit=of(encoder))
    gone = commanded(root, tmp_path / "g.yaml", vit=of("timm:test_vit2", checkpoint="nowhere"))
    data = ["--data", str(root / "train")]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teachers were run")

    monkeypatch.setattr(teacher_classifiers, "run_teachers", refuse)
    for given, said in (
        ([plain, "--out", str(tmp_path / "file")], "is a file: name a folder"),
        ([adaptive, "--out", str(tmp_path / "h")], "--encoder timm:test_resnet"),
        ([gone, "--out", str(tmp_path / "h")], "multikd: no checkpoint at 'nowhere'"),
    ):
        assert main(["teachers", "fit-head", *given, *data]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
    monkeypatch.undo()
    broken = Teacher.forward

    def nan(self: Teacher, *arguments: Any) -> Any:
        features = broken(self, *arguments)
        features.summary[0] = torch.nan
        return features

    monkeypatch.setattr(Teacher, "forward", nan)
    assert main(["teachers", "fit-head", plain, *data, "--out", str(tmp_path / "h")]) == 2
    assert "summaries of teacher 'vit' are NaN or infinite" in capsys.readouterr().err
    write_head(tmp_path / "h.safetensors", ClassifierHead(torch.ones(2, 64), torch.zeros(2), {}))
    monkeypatch.undo()
    two = commanded(root, tmp_path / "t.yaml", vit=of(encoder, head=f"{tmp_path}/h.safetensors"))
    assert main(["teachers", "calibrate", two, "--data", str(root / "held")]) == 2
    assert "teacher 'vit' on" in capsys.readouterr().err


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
