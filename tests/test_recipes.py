"""The published recipes beside UNIC: their numbers, and their small twins trained to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_maker import make_shards
from test_configs import build, load_config

from multikd.cli import main
from multikd.losses import AngleLoss, FeatureLoss, LossSum, MSELoss, ShiftEquivariantMSE
from multikd.normalizers import BatchStandardizer, FixedStandardizer, PHISNormalizer
from multikd.projectors import ConvProjector, TransformerProjector
from multikd.shipped import shipped_configs
from multikd.types import Widths

TWINS = {
    "theia_tiny_tiny": "theia_tiny",
    "radio_vitb16_tiny": "radio_vitb16",
    "cradio4_tiny": "cradio4_so400m",
    "unic_l_tiny": "unic_l",
    "dune_vitb14_tiny": "dune_vitb14",
    "eupe_proxy_tiny": "eupe_proxy",
    "eupe_vitb16_tiny": "eupe_vitb16",
}


def test_theia_has_the_published_numbers() -> None:
    cli = build("--config=theia_tiny")
    module, data, config = cli.model, cli.datamodule, load_config("theia_tiny")
    widths = {n: module.teacher(n).widths.patches for n in module.teacher_names}
    assert widths == {"vit": 1280, "dinov2": 1024, "clip": 1024}
    assert all(module.target_grid(n, (224, 224)) == (16, 16) for n in widths)
    assert cli.config.trainer.max_epochs == 50
    assert cli.config.trainer.gradient_clip_val is None
    group = module.optimizer_factory([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.9, 0.999), 0.01)
    assert (module.lr_batch, module.schedule.warmup_share, data.batch_size) == (512, 0.1, 16)
    assert [w.patches for w in module.student.widths] == [192]
    for name in widths:
        loss = module.losses[name]
        assert type(loss) is FeatureLoss
        assert (loss.cosine, loss.smooth_l1, loss.tokens) == (0.9, 0.1, ("patches",))
        assert loss.whole_map
        assert type(module.normalizer(name)) is FixedStandardizer
        (projector,) = module.ladder.projectors[name].values()
        assert isinstance(projector, ConvProjector)
        assert projector.summary is None
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_radio_is_built_of_the_published_parts() -> None:
    module = build("--config=radio_vitb16").model
    widths = {n: module.teacher(n).widths for n in module.teacher_names}
    assert widths == {
        "dfn_clip": Widths(1024, 1280),
        "siglip": Widths(1152, 1152),
        "dinov2": Widths(1536, 1536),
        "sam": Widths(None, 256),  # timm's pooled SAM: no summary of one image in a mosaic
    }
    assert module.teacher("sam").grid_for((256, 256)) == (16, 16)
    assert module.teacher("sam").input_size((256, 256)) == (256, 256)
    for name in widths:
        loss = module.losses[name]
        assert isinstance(loss, LossSum)
        assert [type(part) for part in loss.losses.values()] == [AngleLoss, MSELoss]
        assert loss.raw == ("summary",)
        assert isinstance(module.normalizer(name), PHISNormalizer)
    assert [w.patches for w in module.student.widths] == [768]


def test_unic_l_is_unic_with_other_teachers_and_a_larger_student() -> None:
    """naver/unic, README.md and teachers/config.py; the rest is the ViT-B's recipe."""
    cli = build("--config=unic_l")
    module = cli.model
    widths = {n: module.teacher(n).widths for n in module.teacher_names}
    assert widths == {"dinov2": Widths(1536, 1536), "metaclip": Widths(1280, 1280)}
    assert all(module.teacher(n).spec.patch_size == 14 for n in widths)
    assert all(module.target_grid(n, (224, 224)) == (16, 16) for n in widths)
    assert module.student.spec.patch_size == 14
    assert [w.patches for w in module.student.widths] == [1024] * 24
    larger, base = (load_config(n) for n in ("unic_l", "unic_vitb16_imagenet"))
    for part in ("projectors", "normalizers", "loss", "dropper", "optimizer", "lr_batch"):
        assert larger["model"]["init_args"][part] == base["model"]["init_args"][part], part
    assert larger["model"]["init_args"]["schedule"] == base["model"]["init_args"]["schedule"]
    assert larger["trainer"]["max_epochs"] == base["trainer"]["max_epochs"] == 200
    assert module.target_grid("dinov2", (336, 336)) == (24, 24)  # the second stage


def test_dune_has_the_published_numbers() -> None:
    """naver/dune: main_dune.py, model/options.py, teachers/config.py."""
    cli = build("--config=dune_vitb14")
    module, data, config = cli.model, cli.datamodule, load_config("dune_vitb14")
    assert module.teacher_names == ("dinov2", "mast3r", "multihmr")
    assert all(module.teacher(n).widths == Widths(1024, 1024) for n in module.teacher_names)
    patches = [module.teacher(n).spec.patch_size for n in module.teacher_names]
    assert patches == [14, 16, 14]
    # Resized by 16/14 for MASt3R, so that grids agree.
    assert module.teacher("mast3r").input_size((336, 336), 14) == (384, 384)
    assert all(module.target_grid(n, (336, 336)) == (24, 24) for n in module.teacher_names)
    model = module.student.model
    assert (model.embed_dim, len(model.blocks), model.num_reg_tokens) == (768, 12, 4)
    assert config["model"]["init_args"]["student"]["init_args"]["model_args"] == {
        "init_values": 1e-4
    }
    group = module.optimizer_factory([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.9, 0.99), 1e-15)
    assert group["weight_decay"] == 0.03
    assert (module.lr_batch, module.schedule.warmup_share) == (256, 0.2)
    assert module.schedule.min_lr == 1e-6
    assert cli.config.trainer.max_epochs == 100
    assert cli.config.trainer.gradient_clip_val == 1.0
    assert (data.batch_size, data.epoch_length) == (128, 1281167)
    assert data.train_views[0].describe()["scale"] == [0.4, 1.0]
    assert [module.losses[n].tokens for n in module.teacher_names] == [
        ("summary", "patches"),
        ("patches",),
        ("patches",),
    ]
    for name in module.teacher_names:
        assert (module.losses[name].cosine, module.losses[name].smooth_l1) == (0.5, 0.5)
        assert type(module.normalizer(name)) is BatchStandardizer
        (projector,) = module.ladder.projectors[name].values()
        assert isinstance(projector, TransformerProjector)
        (block,) = projector.blocks
        assert block.attn.num_heads == 12
    assert (module.dropper.p, module.dropper.normalize) == (0.5, "batch")


def test_dune_s_missing_teachers_are_asked_for_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "shards", [4])
    data = [f"--data.train.{n}.urls={shards[0]}" for n in ("dinov2", "mast3r", "multihmr")]
    # The first teacher would be fetched from the hub.
    first = "--model.teachers.dinov2.encoder=packaged:efficientnet_lite0"
    assert main(["fit", "--config=dune_vitb14", *data, first, "--trainer.accelerator=cpu"]) == 2
    message = capsys.readouterr().err
    assert "mast3r_encoder.pth" in message
    assert "no checkpoint at" in message


def test_cradio4_is_built_of_the_published_parts() -> None:
    """arXiv 2601.17237: 412 million parameters; NVlabs/RADIO, radio/extra_timm_models.py."""
    module = build("--config=cradio4_so400m").model
    widths = {n: module.teacher(n).widths for n in module.teacher_names}
    assert widths == {
        "siglip2": Widths(1536, 1536),
        "dinov3": Widths(4096, 4096),
        "sam": Widths(None, 256),
    }
    assert all(module.target_grid(n, (256, 256)) == (16, 16) for n in widths)
    student = module.student.model
    assert (student.embed_dim, len(student.blocks)) == (1152, 27)
    assert student.blocks[0].mlp.fc1.out_features == 4304
    assert student.blocks[0].attn.num_heads == 16
    assert round(sum(p.numel() for p in student.parameters()) / 1e6) in (412, 413)
    for name in widths:
        parts = [type(part) for part in module.losses[name].losses.values()]
        assert parts == [AngleLoss, ShiftEquivariantMSE]
        assert isinstance(module.normalizer(name), PHISNormalizer)


def test_eupe_has_the_published_students_and_losses() -> None:
    """facebookresearch/EUPE, eupe/hub/backbones.py: eupe_vitb16."""
    proxy = load_config("eupe_proxy")["model"]["init_args"]
    assert list(proxy["teachers"]) == ["pe_core", "pe_lang", "dinov3"]
    student = build("--config=eupe_vitb16").model
    model = student.student.model
    assert (model.embed_dim, len(model.blocks), model.num_prefix_tokens) == (768, 12, 5)
    assert model.blocks[0].attn.num_heads == 12
    assert model.blocks[0].norm1.eps == 1e-5
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 86
    assert student.teacher_names == ("proxy",)
    config = load_config("eupe_vitb16")["model"]["init_args"]
    assert proxy["loss"] == config["loss"]
    assert proxy["projectors"]["init_args"]["hidden"] == 3072
    losses = student.losses["proxy"].losses
    assert [(p.cosine, p.smooth_l1, p.tokens) for p in losses.values()] == [
        (1.0, 0.0, ("summary",)),
        (0.9, 0.1, ("patches",)),
    ]
    (projector,) = student.ladder.projectors["proxy"].values()
    assert projector.patches[0].out_features == 1536


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_has_the_parts_of_its_recipe(twin: str) -> None:
    def parts(name: str) -> dict[str, Any]:
        model = load_config(name)["model"]["init_args"]
        kinds = {
            k: v["class_path"]
            for k, v in model.items()
            if isinstance(v, dict) and "class_path" in v
        }
        losses = model["loss"]["init_args"].get("losses", {})
        kinds |= {f"loss {k}": v["class_path"] for k, v in losses.items()}
        own = model.get("teacher_losses") or {}
        kinds |= {f"loss of {k}": v["class_path"] for k, v in own.items()}
        same = ("target_grid", "teacher_view")
        return kinds | {key: model.get(key) for key in same}

    assert parts(twin) == parts(TWINS[twin])
    assert parts(twin)["loss"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    make_shards(root / "shards", [24, 24], size=(96, 96))
    return root / "shards"


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_to_the_end_and_exports_its_heads(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in shipped_configs()
    figures = tmp_path / "figures.json"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    content = load_config(name)
    sets = content["data"]["init_args"]["train"]
    train = [f"--data.train={shards}"]
    if isinstance(sets, dict):  # a data set for each teacher
        train = [f"--data.train.{key}.urls={shards}" for key in sets]
    assert main(["fit", f"--config={name}", *train, folder, *quiet, f"--json={figures}"]) == 0
    assert json.loads(figures.read_text())["steps"] == 3
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in kept.values())
    seen = [value for key, value in kept.items() if key.endswith("images_seen")]
    measures = content["model"]["init_args"]["normalizers"]["init_args"].get("images")
    assert bool(seen) == bool(measures)
    assert all(int(value) == 32 for value in seen)  # measured, then frozen
    checkpoint = str(tmp_path / "run" / "last.ckpt")
    head = next(iter(content["model"]["init_args"]["teachers"]))
    export = ["export", checkpoint, str(tmp_path / "out"), "--heads", head, "--no-cost"]
    assert main(export) == 0
    capsys.readouterr()
