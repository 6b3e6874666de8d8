"""Teachers that see another view than the student, and losses on raw summaries (C-RADIOv4)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from data.shard_maker import make_shards
from helpers import training as small

from multikd.checkpoints import load_student
from multikd.cli import main
from multikd.export.folding import affine_map
from multikd.export.trained_heads import predict, trained_heads
from multikd.losses import AngleLoss, LossSum, MSELoss, ShiftEquivariantMSE
from multikd.normalizers import FixedStandardizers, PHISNormalizers


def loss() -> LossSum:
    return LossSum({"summary": AngleLoss(), "patches": ShiftEquivariantMSE()})


def two_views(batch: Any) -> Any:
    batch.views = [batch.views[0], batch.views[0].flip(3)]
    batch.view_parameters = torch.zeros(len(batch), 2, 7)
    return batch


def test_teachers_see_their_view_and_the_student_the_other(monkeypatch: Any) -> None:
    module = small.module(loss=loss(), teacher_view=1, normalizers=PHISNormalizers(images=64))
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.train()
    data = two_views(small.batch())
    seen: dict[str, Any] = {"teachers": [], "student": []}
    run = module.run_teacher
    monkeypatch.setattr(module, "run_teacher", lambda n, x: seen["teachers"].append(x) or run(n, x))
    module.student.register_forward_pre_hook(lambda _, args: seen["student"].append(args[0]))
    total = module.training_step(data, 0)
    assert torch.isfinite(total)
    assert len(seen["student"]) == 1
    assert torch.equal(seen["student"][0], data.views[0] / 255)
    assert len(seen["teachers"]) == len(module.teacher_names)
    assert all(torch.equal(x, data.views[1] / 255) for x in seen["teachers"])
    # In validation both see one view, and nothing is shifted.
    seen["teachers"].clear()
    module.eval().step(data, 0, 0, training=False)
    assert all(torch.equal(x, data.views[0] / 255) for x in seen["teachers"])


def test_each_teacher_has_a_dispersion_of_its_own_and_raw_summaries() -> None:
    module = small.module(loss=loss(), normalizers=FixedStandardizers(images=6))
    module.train()
    data = small.batch()
    module.step(data, 0, 0, training=True)
    lengths = []
    for name in module.teacher_names:
        part = module.losses[name].losses["summary"]
        lengths.append(len(part.mean))
        assert part.updates == 1
        normalizer = module.normalizer(name)
        assert normalizer.raw == ("summary",)
        features = module.run_teacher(name, data.views[0] / 255)
        assert torch.equal(normalizer(features).summary, features.summary.float())
        assert not torch.allclose(normalizer(features).patches, features.patches.float())
        assert torch.equal(normalizer.get_buffer("summary_mean"), torch.zeros(lengths[-1]))
        # The batch of images is counted once, though its patches alone are measured.
        assert normalizer.get_buffer("images_seen") == len(data)
        assert torch.equal(affine_map(normalizer, "summary")[0], torch.ones(lengths[-1]).double())
    assert lengths == [module.teacher(n).widths.summary for n in module.teacher_names]
    assert len({id(module.losses[n]) for n in module.teacher_names}) == len(lengths)
    # A loss without a state stays one for all.
    plain = small.module(loss=MSELoss())
    assert len({id(plain.losses[n]) for n in plain.teacher_names}) == 1


@pytest.mark.parametrize("chosen", [0, 1, 2, -1])
def test_a_teachers_view_that_leaves_none(chosen: int) -> None:
    module = small.module(teacher_view=chosen)
    if chosen in (0, 1):
        assert module.student_views(2) == [1 - chosen]
        with pytest.raises(ValueError, match=f"teacher_view={chosen} leaves the student none of 1"):
            module.student_views(1)
    else:
        with pytest.raises(ValueError, match="set data.train_views to a list of two or more"):
            module.student_views(2)


# --- through the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("shifted")
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), root / "teacher.pth")
    make_shards(root / "shards", [24, 24], size=(48, 48))
    views = {"class_path": "ShiftedViews", "init_args": {"size": 64, "patch": 16, "most": 1}}
    parts = {
        "summary": {"class_path": "AngleLoss"},
        "patches": {"class_path": "ShiftEquivariantMSE"},
    }
    return {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root / "run"),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "save_on_train_epoch_end": True},
                }
            ],
        },
        "model": {
            "teachers": {
                "own": {
                    "class_path": "multikd.teachers.Teacher",
                    "init_args": {
                        "encoder": "timm:test_vit",
                        "checkpoint": str(root / "teacher.pth"),
                        "image_size": 64,
                    },
                }
            },
            "student": {
                "class_path": "multikd.students.StudentEncoder",
                "init_args": {"name": "test_vit", "image_size": 64},
            },
            "projectors": {"class_path": "LinearProjectors"},
            "normalizers": {"class_path": "PHISNormalizers", "init_args": {"images": 32}},
            "loss": {"class_path": "LossSum", "init_args": {"losses": parts}},
            "teacher_view": 1,
        },
        "data": {
            "train": str(root / "shards"),
            "train_views": [views, copy.deepcopy(views)],
            "batch_size": 16,
            "num_workers": 0,
        },
    }


def fit(config: dict[str, Any], folder: Path) -> int:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(path)])


def test_a_run_and_its_heads(config: dict[str, Any], tmp_path: Path) -> None:
    assert fit(config, tmp_path) == 0
    run = Path(config["trainer"]["default_root_dir"])
    trained = load_student(run / "last.ckpt")
    (head,) = trained_heads(trained, ["own"])
    assert head.normalizer.raw == ("summary",)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = trained.student.eval()(images)
        answer = predict(head, output)
        plain = head.ladder(output.rungs, {"own": head.grid})["own"]
    # Raw summaries are predicted as they are; patches go back through PHI-S.
    assert torch.equal(answer.summary, plain.summary)
    assert not torch.allclose(answer.patches, plain.patches, atol=1e-2)
    # The export compares its folded heads with just that.
    export = [
        "export",
        str(run / "last.ckpt"),
        str(tmp_path / "out"),
        "--heads",
        "own",
        "--no-cost",
    ]
    assert main(export) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["data"].update(train_views=c["data"]["train_views"][:1]), "none of 1 views"),
        (
            lambda c: c["data"]["train_views"][1]["init_args"].update(most=0),
            "with the same settings for all",
        ),
        (
            lambda c: c["data"].update(
                train_views=[{"class_path": "LightViews", "init_args": {"size": 64}}] * 2
            ),
            "compares shifted views",
        ),
        (
            lambda c: [v["init_args"].update(patch=8) for v in c["data"]["train_views"]],
            "not shifted by whole patches on the 4×4 grid",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_training(
    config: dict[str, Any],
    change: Any,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = copy.deepcopy(config)
    change(changed)
    changed["trainer"]["default_root_dir"] = str(tmp_path / "run")
    assert fit(changed, tmp_path) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
