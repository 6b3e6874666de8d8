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
from multikd.losses import AngleLoss, FeatureLoss, LossSum, MSELoss
from multikd.normalizers import FixedStandardizer, PHISNormalizer
from multikd.projectors import ConvProjector
from multikd.shipped import shipped_configs
from multikd.types import Widths

TWINS = {"theia_tiny_tiny": "theia_tiny", "radio_vitb16_tiny": "radio_vitb16"}


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
        "siglip2": Widths(1152, 1152),
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
        return kinds | {"target_grid": model.get("target_grid")}

    assert parts(twin) == parts(TWINS[twin])
    assert parts(twin)["loss"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    make_shards(root / "shards", [24, 24], size=(96, 96))
    return root / "shards"


@pytest.mark.parametrize("name", [*TWINS, "cradio4_tiny"])
def test_a_twin_trains_to_the_end_and_exports_its_heads(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in shipped_configs()
    figures = tmp_path / "figures.json"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    command = ["fit", f"--config={name}", f"--data.train={shards}", folder, *quiet]
    assert main([*command, f"--json={figures}"]) == 0
    assert json.loads(figures.read_text())["steps"] == 3
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in kept.values())
    seen = [value for key, value in kept.items() if key.endswith("images_seen")]
    assert seen
    assert all(int(value) == 32 for value in seen)  # measured, then frozen
    checkpoint = str(tmp_path / "run" / "last.ckpt")
    export = ["export", checkpoint, str(tmp_path / "out"), "--heads", "lite0", "--no-cost"]
    assert main(export) == 0
    capsys.readouterr()
