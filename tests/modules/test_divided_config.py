"""Partitions, claims and schedules from a config: what is loaded, and what is one sentence."""

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

from multikd.cli import main
from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.fit import build_cli
from multikd.modules.partition import Partition, check_told, facts_of, load_own
from multikd.preflight import _HARMLESS, check_partition, check_schedule
from multikd.teachers import Teacher
from multikd.teachers.deferred import DeferredTeacher, defer_teacher


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("divided")
    teachers = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=0, img_size=32)
        torch.save(model.state_dict(), root / f"{name}.pth")
        teachers[name] = {
            "class_path": "multikd.teachers.Teacher",
            "init_args": {
                "encoder": "timm:test_vit",
                "checkpoint": str(root / f"{name}.pth"),
                "image_size": 32,
                "licence": "MIT",
            },
        }
    for name in ("web", "scenes"):
        make_shards(root / name, [12], size=(40, 40), name=name)
    view = {"class_path": "LightViews", "init_args": {"size": 32}}
    return {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root / "run"),
        },
        "model": {
            "teachers": teachers,
            "student": {
                "class_path": "multikd.students.StudentEncoder",
                "init_args": {"name": "test_vit", "image_size": 32},
            },
            "projectors": {"class_path": "LinearProjectors"},
        },
        "data": {
            "train": {
                "web": {"urls": str(root / "web"), "teachers": ["a"], "generic": True},
                "scenes": {"urls": str(root / "scenes"), "teachers": ["b"]},
            },
            "train_views": [view, copy.deepcopy(view)],
            "batch_size": 8,
            "num_workers": 0,
        },
    }


def written(config: dict[str, Any], folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_run_with_data_of_single_teachers(config: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(config)
    made["model"]["teacher_data"] = "own_and_generic"
    made["data"]["balanced"] = True
    made["data"]["train"]["scenes"]["views"] = made["data"]["train_views"]
    made["trainer"]["default_root_dir"] = str(tmp_path / "run")
    assert main(["fit", "--config", written(made, tmp_path)]) == 0


def test_of_a_partition_nothing_is_loaded_that_is_not_run(
    config: dict[str, Any], tmp_path: Path
) -> None:
    made = copy.deepcopy(config)
    made["model"] |= {"partition": [["a"], ["b"]], "teacher_data": "all"}
    module: Any = build_cli(["--config", written(made, tmp_path)], run=False).model
    a, b = module.teacher("a"), module.teacher("b")
    assert isinstance(a, DeferredTeacher)
    assert not a.loaded
    assert not b.loaded
    assert module.dropper.normalize == "teacher"
    told = load_own({"a": a, "b": b}, module.partition.here(2))
    assert (a.loaded, b.loaded) == (True, False)
    settings = made["model"]["teachers"]["a"]["init_args"]
    plain = Teacher(**settings)
    assert told == {"a": facts_of(plain)}
    assert (a.spec, a.widths, a.num_parameters) == (plain.spec, plain.widths, plain.num_parameters)
    assert a.grid_for((48, 48), 16) == plain.grid_for((48, 48), 16)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(a(images).patches, plain(images).patches)
    # One that stays is not moved with the others.
    b.stay()
    module.teachers.double()
    module.teachers.to("meta")
    assert not b.loaded
    check_told(told, {"a": told["a"]}, ["a"])
    with pytest.raises(ValueError, match="checkpoint's teacher 'a' has other weights"):
        check_told(told, {"a": {"fingerprint": "0"}}, ["a"])
    # An encoder that is an object is there already.
    module_of_its_own = small.SummaryOnly()
    assert not isinstance(defer_teacher(encoder=module_of_its_own), DeferredTeacher)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([["a"], ["c"]], "unknown teacher in partition 'c'"),
        ([["a"], ["a", "b"]], "partition names a twice"),
        ([["a"], []], "partition leaves out b"),
        ([["a", "b"]], "two or more groups with a teacher each"),
        ([["b", "a"], []], "two or more groups with a teacher each"),
    ],
)
def test_groups_that_are_none(groups: list[list[str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Partition(groups, ("a", "b"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: None, "does not say what follows: set it to own, own_and_generic, all"),
        (
            lambda c: c["model"].update(teacher_data="own", partition=[["a"], ["b"]]),
            "partition has 2 groups and the run has 1 process, so that nobody would run b",
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
    assert main(["fit", "--config", written(changed, tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_whose_data_it_is_may_not_change_on_the_way() -> None:
    assert _HARMLESS.match("data.train.web.urls")
    assert _HARMLESS.match("data.train")
    for key in ("teachers", "generic", "views.class_path", "views"):
        assert not _HARMLESS.match(f"data.train.web.{key}")
    for key in ("balanced", "view_mode", "view_images", "train_views.size"):
        assert not _HARMLESS.match(f"data.{key}")


def test_schedules_and_partitions_that_cannot_be() -> None:
    data = ShardDataModule("x", train_views=[LightViews(32), LightViews(32)])
    turns = ShardDataModule("x", train_views=data.train_views, view_mode="alternate")
    kept = ShardDataModule("x", train_views=LightViews(32, recorded=2), cache="y")
    for settings, of, words in (
        ({"view_weights": [1.0]}, data, "view_weights has 1 entries and data.train_views 2"),
        ({"teacher_view": 1}, turns, "leave data.view_mode and data.view_images out"),
        ({"partition": [["vit"], ["cnn", "next"]]}, kept, "nothing to divide"),
    ):
        made = small.module(**settings)
        with pytest.raises(ValueError, match=words):
            check_schedule(made, of)
    check_schedule(small.module(view_weights=[1.0, 2.0]), turns)
    check_partition(small.trainer("x"), small.module())
