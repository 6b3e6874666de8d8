"""An exported student teaches the next one, or is where it starts."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.fitting import fit
from safetensors.torch import load_file
from small_models import FAMILIES, small_student

from multikd.checkpoints import load_student
from multikd.export import CardFacts, export_timm_folder
from multikd.export.commands import ExportSettings, run_export
from multikd.students import StudentEncoder
from multikd.teachers import Teacher


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("round") / "out"
    run_export(run.checkpoint, out, ExportSettings(heads=("vit",), cost=False))
    return out


@torch.no_grad()
def test_as_a_teacher_it_gives_the_student_s_features(run, exported):
    images = torch.rand(2, 3, 32, 32)
    teacher = Teacher(f"exported:{exported}")
    student = load_student(run.checkpoint).student
    expected = student(images).features
    received = teacher(images)
    assert torch.equal(received.summary, expected.summary)
    assert torch.equal(received.patches, expected.patches)
    assert teacher.spec.licence == "cc-by-nc-4.0"


def test_as_a_start_it_gives_the_student_s_weights(exported):
    state = load_file(exported / "model.safetensors")
    student = StudentEncoder("test_vit", image_size=32, checkpoint=str(exported), num_classes=5)
    for key, value in state.items():
        assert torch.equal(student.model.state_dict()[key], value), key
    with pytest.raises(ValueError, match="is it the right architecture"):
        StudentEncoder("test_resnet", image_size=32, checkpoint=str(exported))
    with pytest.raises(ValueError, match="no checkpoint"):
        StudentEncoder("test_vit", image_size=32, checkpoint=str(exported.parent))


@pytest.mark.parametrize("family", ["ViT, registers", "ResNet", "Swin", "ConvNeXt"])
@torch.no_grad()
def test_every_family_starts_and_teaches_the_next_run(family, tmp_path):
    """`checkpoint: OUT` gives its weights, `exported:OUT` its features."""
    first = small_student(family)
    out = export_timm_folder(first, tmp_path / "out", card=CardFacts(licence="mit"))
    name, settings = FAMILIES[family]
    rest = {key: value for key, value in settings.items() if key != "img_size"}
    second = StudentEncoder(name, image_size=64, checkpoint=str(out), model_args=rest or None)
    images = torch.rand(2, 3, 64, 64)
    expected = first.features(images)
    received = second.eval().features(images)
    assert torch.equal(received.summary, expected.summary)
    assert torch.equal(received.patches, expected.patches)
    taught = Teacher(f"exported:{out}", fold=False, channels_last=False, pack=False)(images)
    assert torch.equal(taught.summary, expected.summary)
    assert torch.equal(taught.patches, expected.patches)
    assert float(expected.summary.std()) > 1e-4


def test_a_second_generation(run, exported, tmp_path):
    """`fit` with it as teacher and as start, then export: no trace of the folder is needed."""
    import shutil

    copy = tmp_path / "first"
    shutil.copytree(exported, copy)
    model = {
        "teachers": {
            "first": {
                "class_path": "multikd.teachers.Teacher",
                "init_args": {"encoder": f"exported:{copy}"},
            }
        },
        "student": {
            "class_path": "multikd.students.StudentEncoder",
            "init_args": {"name": "test_vit", "image_size": 32, "checkpoint": str(copy)},
        },
        "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-12}},
        "lr_batch": None,
    }
    second = fit(tmp_path / "second", model, run.shards)
    shutil.rmtree(copy)
    out = tmp_path / "out"
    run_export(second.checkpoint, out, ExportSettings(heads=("first",), cost=False))
    before, after = (load_file(f / "model.safetensors") for f in (exported, out))
    assert before.keys() == after.keys()
    # Nearly no learning rate: it still is where it started.
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    about = json.loads((out / "manifest.json").read_text())
    assert about["start"]["name"] == str(copy)
    assert about["teachers"][0]["licence"] == "cc-by-nc-4.0"
