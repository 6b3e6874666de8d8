"""The methods through the commands: fit, validate, export, evaluate, each from a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from data.shard_maker import make_shards
from safetensors.torch import load_file, save_file

from multikd.checkpoints import load_student, read_checkpoint
from multikd.cli import main
from multikd.export import standalone_classifier

STUDENT = {
    "class_path": "multikd.students.StudentEncoder",
    "init_args": {
        "name": "test_vit",
        "image_size": 32,
        "rungs": [0],
        "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    },
}


def student(classes: int) -> dict[str, Any]:
    return {**STUDENT, "init_args": {**STUDENT["init_args"], "num_classes": classes}}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher's weights and its head, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("commands")
    make_shards(folder / "shards", [16, 16])
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), folder / "teacher.safetensors")
    width = model.num_features
    head = {"weight": torch.randn(10, width) * 0.1, "bias": torch.randn(10)}
    save_file(head, folder / "head.safetensors")
    return folder


def config(place: Path, name: str) -> Path:
    teacher = {
        "class_path": "multikd.teachers.TrainableTeacher",
        "init_args": {
            "encoder": "timm:test_resnet",
            "checkpoint": str(place / "teacher.safetensors"),
            "head": str(place / "head.safetensors"),
            "image_size": 32,
        },
    }
    models: dict[str, tuple[str, dict[str, Any]]] = {
        "adaptive": ("AdaptiveModule", {"teachers": {"cnn": teacher}, "student": student(0)}),
        "influence": ("InfluenceModule", {"teacher": teacher, "student": student(10)}),
        "mutual": ("MutualModule", {"students": {"a": student(10), "b": student(10)}}),
        "self": ("SelfDistillationModule", {"student": student(10)}),
    }
    kind, settings = models[name]
    shards = str(place / "shards")
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "last", "save_on_train_epoch_end": True},
    }
    content = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(place / name),
            "callbacks": [
                {"class_path": "multikd.callbacks.FiniteLossGuard"},
                {"class_path": "multikd.callbacks.LinearProbe"},
                saver,
            ],
        },
        "model": {"class_path": f"multikd.modules.{kind}", "init_args": settings},
        "data": {
            "class_path": "multikd.data.module.ShardDataModule",
            "init_args": {
                "train": shards,
                "val": shards,
                "bank": shards,
                "train_views": {
                    "class_path": "multikd.data.views.LightViews",
                    "init_args": {"size": 32},
                },
                "batch_size": 8,
                "num_workers": 0,
                "held_out": 4,
            },
        },
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["adaptive", "influence", "mutual", "self"])
def test_from_a_config_to_an_export(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(config(place, name))]) == 0
    checkpoint = place / name / "last.ckpt"
    assert "val/accuracy" in capsys.readouterr().out
    assert main(["validate", f"--ckpt_path={checkpoint}"]) == 0
    out = tmp_path / "student"
    more = ["--no-cost"] if name == "adaptive" else ["--no-cost", "--classifier"]
    assert main(["export", str(checkpoint), str(out), *more, "--licence=MIT"]) == 0
    trained = load_student(checkpoint)
    images = torch.rand(3, 3, 32, 32)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pixels = trained.student.normalize(images)
    with torch.no_grad():
        features = trained.student.features(images)
        answer = model(pixels)
        if name == "adaptive":
            assert torch.equal(answer, features.summary)  # the bare encoder, in plain timm
            logits = standalone_classifier.load(out)(images)
            state = read_checkpoint(checkpoint)["state_dict"]
            kept = load_file(out / "classifier.safetensors")
            key = "trained_teachers.cnn.classifier.weight"
            assert torch.equal(kept["teachers.cnn.classifier.weight"], state[key])
            assert not torch.equal(state[key], load_file(place / "head.safetensors")["weight"])
            assert logits.shape == (3, 10)
            assert "student_classifier.load()" in capsys.readouterr().out
            assert "## The shared classifier" in (out / "README.md").read_text()
            bare = [str(checkpoint), str(tmp_path / "bare"), "--no-cost", "--no-final-norm"]
            assert main(["export", *bare]) == 0
            assert "the shared classifier" in capsys.readouterr().err
            assert not (tmp_path / "bare" / "classifier.json").exists()
        else:
            assert torch.equal(answer, features.logits)
    assert trained.weights == ("ema" if name == "self" else "raw")
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["origin"] == "multikd"


def test_one_of_several_students(place: Path, tmp_path: Path, capsys: Any) -> None:
    path = place / "mutual" / "last.ckpt"
    if not path.is_file():
        assert main(["fit", "--config", str(config(place, "mutual"))]) == 0
    state = read_checkpoint(path)["state_dict"]
    for member, name in (("b", "b"), ("0", "a")):
        weights = load_student(path, member=member).student.state_dict()
        key = "model.patch_embed.proj.weight"
        assert torch.equal(weights[key], state[f"students.{name}.{key}"])
    best = ("a", "b")[int(state["best"])]
    weights = load_student(path).student.state_dict()
    assert torch.equal(weights[key], state[f"students.{best}.{key}"])
    with pytest.raises(ValueError, match="no student is called 'c'|student 'c'"):
        load_student(path, member="c")


def test_a_checkpoint_of_another_teacher_is_refused(place: Path, capsys: Any) -> None:
    path = place / "adaptive" / "last.ckpt"
    if not path.is_file():
        assert main(["fit", "--config", str(config(place, "adaptive"))]) == 0
    head = load_file(place / "head.safetensors")
    save_file({k: v + 1 for k, v in head.items()}, place / "other.safetensors")
    arguments = [
        "fit",
        f"--config={place / 'adaptive.yaml'}",
        f"--ckpt_path={path}",
        f"--model.teachers.cnn.head={place / 'other.safetensors'}",
        "--trainer.max_epochs=2",
    ]
    assert main(arguments) != 0
    assert "of another config" in capsys.readouterr().err
