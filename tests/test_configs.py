"""Every shipped config parses and builds; the template is complete; the recipe has its numbers."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.datasets import load_sample_images

from multikd import fit
from multikd.backbones import skeleton
from multikd.callbacks import FiniteLossGuard
from multikd.checkpoints import build_student
from multikd.cli import main
from multikd.config_files import inline_fragments, load_config, read_yaml, resolve_configs
from multikd.data.module import ShardDataModule
from multikd.data.views import EvalViews, UnicViews
from multikd.export import export_timm_folder
from multikd.losses import FeatureLoss, FixedWeights, HardestKept, NoDropping
from multikd.modules import DistillationModule
from multikd.modules.distillation import default_optimizer
from multikd.normalizers import EMAStandardizers
from multikd.optim import WarmupCosine
from multikd.projectors import MLPProjectors
from multikd.shipped import (
    config_root,
    shipped_chains,
    shipped_configs,
    shipped_fragments,
    shipped_searches,
    shipped_studies,
    shipped_tasks,
)
from multikd.students import StudentEncoder
from multikd.teachers import Teacher, TimmEncoder

HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


@contextmanager
def without_weights() -> Iterator[None]:
    """Build on the meta device, without any download."""
    with torch.device("meta"), skeleton(), warnings.catch_warnings():
        # open_clip builds its text tower first, on whatever device there is.
        warnings.simplefilter("ignore")
        yield


def build(*args: str) -> fit.MultikdCLI:
    """Model, data and trainer of a config, as a run would get them, but without weights."""
    with without_weights():
        return fit.build_cli([*args, *HERE, "--trainer.precision=32-true"], run=False)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_parses_and_builds(name: str, tmp_path: Path) -> None:
    cli = build(f"--config={name}", f"--trainer.default_root_dir={tmp_path}")
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(module, DistillationModule)
    assert isinstance(data, ShardDataModule)
    assert all(p.is_meta for p in module.student.parameters())
    assert list(cli.config.model.init_args.teachers) == list(module.teacher_names)
    assert any(isinstance(c, FiniteLossGuard) for c in trainer.callbacks)
    # What comes out of the data fits what goes into the model.
    assert module.student.spec.image_size == (data.train_views[0].size,) * 2
    for teacher_name in module.teacher_names:
        grid = module.teacher(teacher_name).grid_for(
            module.student.spec.image_size, module.student.spec.patch_size
        )
        assert grid is not None
        assert min(grid) >= 1
    assert not list(tmp_path.iterdir()), "building a config wrote something"


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_can_be_resumed(name: str) -> None:
    """A checkpoint after each epoch: of a run that is killed, no more than one is lost.

    (Lightning's ``save_last`` follows its top k: with ``save_top_k: 0`` it saves at the very end.
    Without ``save_on_train_epoch_end`` it saves when there was a validation.)
    """
    callbacks = load_config(name)["trainer"]["callbacks"]
    settings = [c["init_args"] for c in callbacks if c["class_path"].endswith("ModelCheckpoint")]
    assert any(
        s.get("filename") == "last"
        and s.get("save_top_k", 1) == 1
        and "monitor" not in s
        and s.get("every_n_epochs", 1) == 1
        and s.get("save_on_train_epoch_end")
        for s in settings
    ), settings


@pytest.mark.parametrize("name", shipped_fragments())
def test_every_fragment_is_one_object(name: str) -> None:
    base = {"teachers": Teacher, "students": StudentEncoder}[name.split("/")[0]]
    content = read_yaml(shipped_fragments()[name])
    assert set(content) == {"class_path", "init_args"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    parsed = parser.parse_object({"part": content})
    with without_weights():
        built = parser.instantiate(parsed).part
    assert type(built) is base
    if isinstance(built, Teacher):
        assert built.spec.licence != "", name
        assert built.widths.summary
        assert built.widths.patches


def test_every_file_is_shipped_and_says_what_it_is() -> None:
    files = {path.relative_to(config_root()).as_posix() for path in config_root().rglob("*.*")}
    known = {f"{name}.yaml" for name in {**shipped_configs(), **shipped_fragments()}}
    known |= {f"tasks/{name}.yaml" for name in shipped_tasks()}
    known |= {f"studies/{name}.yaml" for name in shipped_studies()}
    known |= {f"chains/{name}.yaml" for name in shipped_chains()}
    known |= {f"sizes/{name}.yaml" for name in shipped_searches()}
    assert files == known
    for name in known:
        first, second, *_ = (config_root() / name).read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ")
        assert second.startswith(("#", "class_path")), f"{name}: the first line stands alone"


# --- the template -----------------------------------------------------------------------------


def settings_of(content: dict[str, Any], *path: str) -> dict[str, Any]:
    for key in path:
        content = content[key]
    return content.get("init_args", {}) if "class_path" in content else content


TEMPLATE = {
    ("model",): DistillationModule,
    ("model", "init_args", "teachers", "lite0"): Teacher,
    ("model", "init_args", "student"): StudentEncoder,
    ("model", "init_args", "projectors"): MLPProjectors,
    ("model", "init_args", "normalizers"): EMAStandardizers,
    ("model", "init_args", "loss"): FeatureLoss,
    ("model", "init_args", "dropper"): NoDropping,
    ("model", "init_args", "balancer"): FixedWeights,
    ("model", "init_args", "schedule"): WarmupCosine,
    ("data",): ShardDataModule,
    ("data", "init_args", "train_views"): UnicViews,
    ("data", "init_args", "eval_views"): EvalViews,
}
# Written out in the template, though their default is null (that object), or none.
OBJECTS = {
    *("projectors", "normalizers", "loss", "dropper", "balancer", "optimizer", "schedule"),
    *("train_views", "eval_views"),
}
EXAMPLES = {("model", "init_args", "student"): {"image_size"}}


@pytest.mark.parametrize("path", TEMPLATE, ids=".".join)
def test_the_template_has_every_setting_with_its_default(path: tuple[str, ...]) -> None:
    content = settings_of(load_config("base"), *path)
    parameters = inspect.signature(TEMPLATE[path]).parameters
    assert set(content) == set(parameters)
    for name, parameter in parameters.items():
        examples = OBJECTS | EXAMPLES.get(path, set())
        if parameter.default is inspect.Parameter.empty or name in examples:
            continue
        written = content[name]
        default = list(parameter.default) if isinstance(written, list) else parameter.default
        assert written == default, f"{'.'.join(path)}.{name}"


def test_the_objects_that_null_stands_for_are_those_of_the_template() -> None:
    with without_weights():
        teacher, student = Teacher("timm:test_vit"), StudentEncoder("test_vit", image_size=32)
        module = DistillationModule({"a": teacher}, student)
    explicit = build("--config=base").model
    for part in ("ladder", "losses", "dropper", "balancer", "normalizers"):
        kinds = {type(m) for m in getattr(module, part).modules()}
        assert kinds == {type(m) for m in getattr(explicit, part).modules()}, part
    assert module.schedule == explicit.schedule
    group = default_optimizer([torch.nn.Parameter(torch.zeros(2))])
    written = load_config("base")["model"]["init_args"]["optimizer"]
    assert written["class_path"] == "torch.optim.AdamW"
    for key, value in written["init_args"].items():
        default = group.defaults[key]
        assert (list(default) if isinstance(default, tuple) else default) == value
    default_views = ShardDataModule("shards")
    assert type(default_views.train_views[0]) is UnicViews
    assert default_views.eval_views.describe() == EvalViews(224).describe()


# --- the published recipe -----------------------------------------------------------------------


def test_unic_has_the_published_numbers() -> None:
    cli = build("--config=unic_vitb16_imagenet")
    module, data, config = cli.model, cli.datamodule, load_config("unic_vitb16_imagenet")
    assert module.teacher_names == ("dino", "deit3", "ibot", "dbotft")
    assert all(module.teacher(n).spec.patch_size == 16 for n in module.teacher_names)
    assert cli.config.trainer.max_epochs == 200
    assert cli.config.trainer.gradient_clip_val is None
    assert config["trainer"]["precision"] == "bf16-mixed"

    optimizer = module.optimizer_factory([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.99), 0.03)
    assert group["eps"] == 1e-8
    assert module.lr_batch == 256
    assert module.schedule == WarmupCosine(warmup_epochs=10, min_lr=1e-6)

    student = module.student
    assert student.spec.image_size == (224, 224)
    assert student.spec.mean == (0.485, 0.456, 0.406)
    assert len(student.widths) == 12
    assert {w.patches for w in student.widths} == {768}
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in student.model.blocks]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.1)

    for name in module.teacher_names:
        for rung, projector in module.ladder.projectors[name].items():
            hidden = 3072 if rung == "11" else 768
            for token in (projector.summary, projector.patches):
                assert token[0].out_features == hidden
                assert (token[-1].in_features, token[-1].out_features) == (hidden, 768)
        loss = module.losses[name]
        assert isinstance(loss, FeatureLoss)
        normalizer = module.normalizer(name)
        assert normalizer.momentum_end == 0.001
    weights = config["model"]["init_args"]["loss"]["init_args"]
    assert weights == {"cosine": 0.5, "smooth_l1": 0.5, "summary": 0.5, "patches": 0.5}
    assert isinstance(module.dropper, HardestKept)
    assert (module.dropper.p, module.dropper.normalize) == (0.5, "batch")

    assert data.batch_size == 128
    assert data.eval_views.describe() == EvalViews(224).describe()
    assert data.train_views[0].describe() == {
        "class": "UnicViews",
        "size": 224,
        "recorded": None,
        "scale": [0.08, 1.0],
        "ratio": [3 / 4, 4 / 3],
        "flip": 0.5,
        "jitter": 0.8,
        "grey": 0.2,
        "blur": 0.2,
        "solarize": 0.2,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "blur_kernel": 9,
        "blur_sigma": [0.1, 5.0],
        "solarize_threshold": 128,
        "colour": "one matrix",
    }


def test_dbot_s_summary_is_the_normed_mean_of_patches_that_are_not_normed(tmp_path: Path) -> None:
    """Its fragment, with a checkpoint of the same layout and a smaller architecture."""
    published = timm.create_model("test_vit", global_pool="avg", num_classes=10).eval()
    torch.save({"model": published.state_dict()}, tmp_path / "dbot.pth")
    settings = read_yaml(shipped_fragments()["teachers/dbotft_vitb16"])["init_args"]["encoder"]
    arguments = {**settings["init_args"], "name": "test_vit"}
    encoder = TimmEncoder(**arguments | {"checkpoint": str(tmp_path / "dbot.pth")}).eval()
    assert encoder.spec.mean == (0.485, 0.456, 0.406)
    images = torch.rand(2, 3, 160, 160)
    features = encoder(images)
    with torch.no_grad():
        tokens = published.forward_features(encoder.normalize(images))[:, 1:]
    assert features.patches is not None
    assert features.summary is not None
    torch.testing.assert_close(features.patches, tokens)
    mean = published.fc_norm(tokens.mean(dim=1))
    torch.testing.assert_close(features.summary, mean)


def test_ibot_is_read_from_a_training_checkpoint(tmp_path: Path) -> None:
    """Teacher before student, DDP's and DINO's prefixes off, the projection head left out."""
    import argparse

    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
    other = {f"module.backbone.{k}": v + 1 for k, v in weights.items()}
    torch.save(
        {
            "student": other,
            "teacher": {f"backbone.{k}": v for k, v in weights.items()} | head,
            "optimizer": {"state": {}, "param_groups": []},
            "args": argparse.Namespace(lr=1e-3),
        },
        tmp_path / "ibot.pth",
    )
    encoder = TimmEncoder("test_vit", checkpoint=str(tmp_path / "ibot.pth"))
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


# --- the README ---------------------------------------------------------------------------------


def readme_commands(section: str) -> list[list[str]]:
    """The ``multikd`` commands of a section of the README, as words."""
    text = (config_root().parent / "README.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = "".join(re.findall(r"```bash\n(.*?)```", body, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("multikd ")]


def test_every_fit_of_the_readme_builds() -> None:
    commands = [c for c in readme_commands("Your own images") if c[1] == "fit"]
    assert len(commands) == 3
    for _, _, *args in commands:
        cli = build(*args)
        assert isinstance(cli.model, DistillationModule)
    assert cli.model.teacher_names == ("lite0", "lite1", "lite2", "dino")


def test_the_readme_s_first_own_run_on_a_flat_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is written, on a few unlabelled photographs; only shorter."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, photo in enumerate(load_sample_images().images):
        for part in range(8):
            crop = photo[:: 2 + part % 2, part * 40 : part * 40 + 300]
            Image.fromarray(crop).save(f"photos/{number}-{part}.jpg")
    shorter = ["--trainer.max_epochs=1", "--data.batch_size=8", "--data.num_workers=0"]
    commands = readme_commands("Your own images")[:4]
    assert [c[1] for c in commands] == ["shards", "shards", "fit", "export"]
    for _, *args in commands:
        assert main([*args, *(shorter if args[0] == "fit" else [])]) == 0, args
    said = capsys.readouterr()
    assert "16 samples" in said.out
    assert "trained  1 epochs, 2 steps" in said.out
    assert "next     multikd export runs/laptop/last.ckpt my-student/" in said.out
    model = timm.create_model("local-dir:my-student", pretrained=True, num_classes=0)
    assert model.num_features == 512
    written = {path.name for path in Path("runs/laptop").rglob("*") if path.is_file()}
    assert {"last.ckpt", "metrics.csv", "config.yaml"} <= written
    assert any(name.startswith("events.out.tfevents") for name in written)


# --- finding files ----------------------------------------------------------------------------


def test_a_copied_config_finds_shipped_fragments_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shipped_configs()["unic_vitb16_imagenet"]
    Path("mine.yaml").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    teachers = load_config("mine.yaml")["model"]["init_args"]["teachers"]
    assert teachers["dino"]["init_args"]["encoder"] == "timm:vit_base_patch16_224.dino"
    # A file of one's own comes before a shipped one, and is found beside the config.
    Path("teachers").mkdir()
    Path("teachers/dino_vitb16.yaml").write_text(
        "class_path: multikd.teachers.Teacher\ninit_args: {encoder: timm:test_vit}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir("/")
    teachers = load_config(str(tmp_path / "mine.yaml"))["model"]["init_args"]["teachers"]
    assert teachers["dino"]["init_args"]["encoder"] == "timm:test_vit"
    assert teachers["deit3"]["class_path"] == "multikd.teachers.Teacher"


@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_fragments_on_the_command_line(form: str) -> None:
    words = form.format("--model.student", "students/vit_demo.yaml").split()
    (resolved,) = resolve_configs(words)
    option, _, value = resolved.partition("=")
    assert option == "--model.student"
    assert json.loads(value)["init_args"]["model_args"] == {"depth": 6}


def test_values_on_the_command_line_arrive_as_they_were_meant() -> None:
    """jsonargparse hands nested values on as Python's ``str`` of them: None, [1], {'a': None}."""
    cli = build(
        "--config=laptop",
        "--model.student=students/vit_demo.yaml",
        "--model.student.checkpoint=null",
        "--model.student.init_args.patch_size=16",
        "--model.student.init_args.patch_size=null",
        "--model.student.model_args={depth: 2, init_values: null}",
        "--model.student.rungs=[-1, 0]",
        "--model.teachers.lite0.licence=null",
        "--model.teachers.lite0.image_size=128",
        "--model.teachers.own.encoder=timm:test_vit",
    )
    student = cli.config.model.init_args.student.init_args
    assert student.checkpoint is None
    assert student.patch_size is None
    assert student.model_args == {"depth": 2, "init_values": None}
    assert student.rungs == [-1, 0]
    assert len(cli.model.student.widths) == 2
    teachers = cli.config.model.init_args.teachers
    assert teachers["lite0"].init_args.licence is None
    assert teachers["lite0"].init_args.resize == "none"
    assert cli.model.teacher_names == ("lite0", "lite1", "lite2", "own")


def test_shards_are_not_read_while_the_command_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jsonargparse would read a path, or fetch an address, to see whether it is a config."""
    import fsspec
    from jsonargparse._paths import Path as ParserPath

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(ParserPath, "read_text", refuse)
    monkeypatch.setattr(fsspec, "open", refuse)
    shard = tmp_path / "a.tar"
    shard.write_text("text", encoding="utf-8")
    for train in (str(shard), "http://127.0.0.1:9/{000..009}.tar", "s3://bucket/a.tar"):
        cli = build("--config=laptop", f"--data.train={train}")
        assert cli.config.data.init_args.train == train


def test_other_arguments_pass_unchanged(tmp_path: Path) -> None:
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n- b\n", encoding="utf-8")
    same = [
        *("fit", "--data.train=shards/", "--trainer.max_epochs", "3", "--data.in_memory=true"),
        *(f"--data.extra={listing}", "--ckpt_path=last", "--model.x=other.yaml"),
    ]
    assert resolve_configs(same) == same


def test_files_that_are_no_fragments_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "boxes.yaml").write_text("{a: 1}\n", encoding="utf-8")
    content = {"data": {"init_args": {"boxes": "boxes.yaml", "absent": "gone.yaml"}}}
    found = inline_fragments(content, tmp_path)["data"]["init_args"]
    assert found == {"boxes": str(tmp_path / "boxes.yaml"), "absent": "gone.yaml"}


def test_fragments_that_name_one_another_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{class_path: x, init_args: {b: a.yaml}}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="name one another"):
        inline_fragments({"model": "a.yaml"}, tmp_path)


def test_yaml_is_read_as_jsonargparse_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("{a: 1e-4, b: 3.0e-4, c: 2024-01-02, d: .inf, e: 1_000, f: yes, g: 1e3}\n")
    read = read_yaml(path)
    assert read == {
        "a": 1e-4,
        "b": 3e-4,
        "c": "2024-01-02",
        "d": float("inf"),
        "e": 1000,
        "f": True,
        "g": 1000.0,
    }
    (tmp_path / "mine.yaml").write_text("a: [1,\nb: }\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.yaml is no valid YAML: .*line 2, column"):
        read_yaml(tmp_path / "mine.yaml")


# --- further arguments of timm's constructors --------------------------------------------------


def test_the_small_vit_keeps_its_arguments_in_checkpoints_and_exports(tmp_path: Path) -> None:
    content = read_yaml(shipped_fragments()["students/vit_demo"])
    student = build_student(content)
    assert len(student.widths) == 6
    assert student.feature_widths.summary == 192
    assert student.grids((64, 64))[-1] == (8, 8)
    folder = export_timm_folder(student, tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    assert len(model.blocks) == 6
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in student.model.parameters()
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"depht": 6}, "has no setting 'depht'"),
        ({"img_size": 32}, "give it as image_size"),
        ({"qkv_bias_": False}, "has no setting 'qkv_bias_'"),
        ({"depth": "six"}, "with model_args"),
    ],
)
def test_bad_model_args_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StudentEncoder("test_vit", model_args=arguments)


def test_what_a_checkpoint_keeps_of_a_config_builds_the_same_again() -> None:
    cli = build("--config=laptop")
    text = cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=False)
    again = json.loads(json.dumps(yaml.safe_load(text)))
    with without_weights():
        parsed = cli.parser.parse_object({k: v for k, v in again.items() if k != "config"})
    assert parsed.model == cli.config.model
    assert parsed.data == cli.config.data
