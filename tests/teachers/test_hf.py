"""Vision models of transformers: small ones with random weights, saved and read as folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.copies import HostCopies
from torch import Tensor

transformers = pytest.importorskip("transformers")

from multikd.backbones import skeleton  # noqa: E402
from multikd.errors import MissingExtraError  # noqa: E402
from multikd.teachers import HuggingFaceEncoder, Teacher, list_encoders, load_encoder  # noqa: E402
from multikd.teachers.hf import FAMILIES, _as_sequences  # noqa: E402
from multikd.types import Widths  # noqa: E402

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
VIT |= {"patch_size": 8, "intermediate_size": 48}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
TEXT |= {"intermediate_size": 48}
DINO = {**VIT, "mlp_ratio": 2}


def depth_anything() -> Any:
    backbone = transformers.Dinov2Config(
        **DINO, out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True
    )
    return transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=32,
        reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )


def sam() -> Any:
    vision = {**VIT, "output_channels": 12, "mlp_dim": 48, "window_size": 2}
    return transformers.SamConfig(vision_config={**vision, "global_attn_indexes": [1]})


# (config, class that saves it, prefix tokens, widths)
Made = tuple[Callable[[], Any], str, int, Widths]
MODELS: dict[str, Made] = {
    "dinov3_vit": (
        lambda: transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4),
        "DINOv3ViTModel",
        5,
        Widths(32, 32),
    ),
    "dinov2": (lambda: transformers.Dinov2Config(**DINO), "Dinov2Model", 1, Widths(32, 32)),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4),
        "Dinov2WithRegistersModel",
        5,
        Widths(32, 32),
    ),
    "vit": (lambda: transformers.ViTConfig(**VIT), "ViTModel", 1, Widths(32, 32)),
    "siglip": (
        lambda: transformers.SiglipConfig(vision_config=VIT, text_config=TEXT),
        "SiglipModel",
        0,
        Widths(32, 32),
    ),
    "siglip2": (
        lambda: transformers.Siglip2VisionConfig(
            **{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=16
        ),
        "Siglip2VisionModel",
        0,
        Widths(32, 32),
    ),
    "aimv2": (
        lambda: transformers.Aimv2VisionConfig(**VIT, use_head=True),
        "Aimv2VisionModel",
        0,
        Widths(32, 32),
    ),
    "clip": (
        lambda: transformers.CLIPConfig(vision_config=VIT, text_config=TEXT),
        "CLIPModel",
        1,
        Widths(32, 32),
    ),
    "sam": (sam, "SamModel", 0, Widths(None, 12)),
    "depth_anything": (depth_anything, "DepthAnythingForDepthEstimation", 1, Widths(None, 32)),
}
every_family = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("hf")

    def made(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            torch.manual_seed(0)
            config, model, _, _ = MODELS[kind]
            built = getattr(transformers, model)(config()).eval()
            with torch.no_grad():  # positions and tokens that start at 0 must count
                for parameter in built.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            built.save_pretrained(folder)
            settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
            (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
        return folder

    return made


def reference(folder: Path, kind: str, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """(summary, patches) out of the whole model, by hand."""
    _, name, prefix, _ = MODELS[kind]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    pixels = (images - mean) / std
    with torch.no_grad():
        if kind == "sam":
            return None, model.vision_encoder(pixels).last_hidden_state.flatten(2).mT
        if kind == "depth_anything":
            hidden = model.backbone(pixels).feature_maps[-1]
            return None, hidden[:, prefix:]
        if kind == "siglip2":
            from transformers.models.siglip2.image_processing_siglip2 import (
                convert_image_to_patches,
            )

            patches = torch.stack([convert_image_to_patches(image, 8) for image in pixels])
            out = model(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
                spatial_shapes=torch.tensor([[4, 4]] * len(images)),
            )
            return out.pooler_output, out.last_hidden_state
        tower = getattr(model, "vision_model", model)
        out = tower(pixels)
        pooled = kind in ("siglip", "aimv2", "clip")
        summary = out.pooler_output if pooled else out.last_hidden_state[:, 0]
        return summary, out.last_hidden_state[:, prefix:]


@every_family
def test_features_are_those_of_the_whole_model(kind: str, folders: Callable[[str], Path]) -> None:
    folder = folders(kind)
    teacher = Teacher(f"hf:{folder}")
    _, _, prefix, widths = MODELS[kind]
    assert teacher.widths == widths
    assert teacher.spec.num_prefix_tokens == prefix
    assert teacher.spec.image_size == (32, 32)
    assert teacher.spec.patch_size == 8
    assert teacher.spec.mean == (0.1, 0.2, 0.3)
    assert teacher.spec.std == (0.4, 0.5, 0.6)
    assert teacher.spec.licence == "cc-by-4.0"
    images = torch.rand(2, 3, 32, 32)
    features = teacher(images)
    summary, patches = reference(folder, kind, images)
    assert features.grid == teacher.grid_for((32, 32)) == (4, 4)
    torch.testing.assert_close(features.patches, patches, rtol=1e-5, atol=1e-6)
    assert (features.summary is None) == (summary is None)
    if summary is not None:
        torch.testing.assert_close(features.summary, summary, rtol=1e-5, atol=1e-6)


@every_family
def test_other_sizes_where_the_family_takes_them(kind: str, folders: Callable[[str], Path]) -> None:
    folder = folders(kind)
    if FAMILIES[kind].fixed:
        assert Teacher(f"hf:{folder}").spec.fixed_size
        with pytest.raises(ValueError, match=r"cannot take images of 48×48 px|32\) px only"):
            Teacher(f"hf:{folder}", image_size=48)
        return
    teacher = Teacher(f"hf:{folder}", image_size=48)
    features = teacher(torch.rand(1, 3, 64, 64))
    assert features.grid == (6, 6)
    assert features.patches is not None
    assert features.patches.shape[1] == 36
    assert teacher.fingerprint() != Teacher(f"hf:{folder}").fingerprint()


def test_only_the_vision_tower_is_kept(folders: Callable[[str], Path]) -> None:
    for kind in ("siglip", "clip", "sam", "depth_anything"):
        whole = getattr(transformers, MODELS[kind][1]).from_pretrained(folders(kind))
        kept = Teacher(f"hf:{folders(kind)}").num_parameters
        assert 0 < kept < sum(p.numel() for p in whole.parameters())


def test_a_skeleton_needs_no_weights(folders: Callable[[str], Path], tmp_path: Path) -> None:
    config = (folders("dinov2") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with skeleton(), torch.device("meta"):
        encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.spec.widths == Widths(32, 32)
    assert encoder.spec.mean == (0.485, 0.456, 0.406)  # the family's, without a preprocessing
    assert encoder.spec.licence == "unknown"


def test_settings_override_and_bfloat16_runs(folders: Callable[[str], Path]) -> None:
    half, whole = (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)
    encoder = HuggingFaceEncoder(str(folders("dinov3_vit")), mean=half, std=whole, licence="mine")
    assert (encoder.spec.mean, encoder.spec.std, encoder.spec.licence) == (half, whole, "mine")
    teacher = Teacher(f"hf:{folders('dinov3_vit')}", dtype="bfloat16")
    images = torch.rand(1, 3, 32, 32)
    features = teacher(images)
    assert features.patches is not None
    assert features.patches.dtype == torch.bfloat16
    exact = Teacher(f"hf:{folders('dinov3_vit')}")(images).patches
    assert exact is not None
    cosine = torch.nn.functional.cosine_similarity(features.patches.float(), exact, dim=-1)
    assert cosine.min() > 0.99


def test_mistakes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        Teacher(f"hf:{tmp_path / 'gone'}")
    with pytest.raises(ValueError, match="no config.json"):
        Teacher(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="unknown transformers model type of .*'bert'"):
        Teacher(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text((folders("dinov2") / "config.json").read_text())
    with pytest.raises(ValueError, match="weights of hf:.* can't be had"):
        Teacher(f"hf:{tmp_path}")
    from safetensors.torch import load_file, save_file

    weights = load_file(folders("dinov2") / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing, such as 'layernorm.weight'"):
        Teacher(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="carries its own weights"):
        Teacher(f"hf:{folders('dinov2')}", checkpoint="x.pth")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'multikd\[hf\]'"):
        HuggingFaceEncoder("facebook/dinov2-base")


def test_they_are_listed_and_inspected(folders: Callable[[str], Path]) -> None:
    rows = list_encoders("hf:*")
    assert len(rows) == len(FAMILIES)
    assert any("dinov3" in row.name for row in rows)
    command = [sys.executable, "-m", "multikd", "teachers", "inspect", f"hf:{folders('sam')}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "summary        none" in done.stdout
    assert "(1, 16, 12)" in done.stdout


def test_sequences_are_made_without_a_copy_from_the_host() -> None:
    with HostCopies() as copies:
        made = _as_sequences(torch.rand(3, 3, 16, 24), 8, (2, 3))
    assert copies.found == 0
    assert made["spatial_shapes"].tolist() == [[2, 3]] * 3
