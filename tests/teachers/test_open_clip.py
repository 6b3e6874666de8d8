from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multikd.backbones import skeleton
from multikd.teachers import OpenClipEncoder, Teacher, load_encoder
from multikd.types import Widths

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "multikd-tiny-vit": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 32,
    },
    "multikd-tiny-timm": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "multikd-tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
}
GRIDS = {"multikd-tiny-vit": (4, 4), "multikd-tiny-timm": (10, 10), "multikd-tiny-resnet": (2, 2)}
RAW = {"multikd-tiny-vit": 64, "multikd-tiny-timm": 64, "multikd-tiny-resnet": 512}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("open_clip")
    for name, tower in TOWERS.items():
        config = {"embed_dim": 48, "vision_cfg": tower, "text_cfg": TEXT}
        if "timm_model_name" in tower:
            config["custom_text"] = True
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def clip_model(name: str) -> Any:
    torch.manual_seed(0)
    return open_clip.create_model(name).eval()


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("form", ["whole", "tower"])
def test_local_weights_give_open_clip_s_embedding(name: str, form: str, tmp_path: Path) -> None:
    model = clip_model(name)
    path = tmp_path / "clip.pt"
    torch.save((model if form == "whole" else model.visual).state_dict(), path)
    teacher = Teacher(f"open_clip:{name}", checkpoint=str(path), fold=False, channels_last=False)
    size = TOWERS[name]["image_size"]
    features = teacher(images(size))
    mean = torch.tensor(model.visual.preprocess_cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(model.visual.preprocess_cfg["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model.encode_image((images(size) - mean) / std)
    torch.testing.assert_close(features.summary, expected, atol=1e-5, rtol=1e-5)
    assert features.widths == teacher.widths == Widths(48, RAW[name])
    assert features.grid == GRIDS[name] == teacher.grid_for((size, size))
    assert teacher.spec.mean == pytest.approx(tuple(model.visual.preprocess_cfg["mean"]))
    # open_clip's own towers add a position embedding of one size; timm's resample theirs.
    assert teacher.spec.fixed_size is (name != "multikd-tiny-timm")
    if not teacher.spec.fixed_size:
        assert Teacher(teacher.encoder, resize="none")(images(192)).grid == (12, 12)


def test_patches_are_the_normed_tokens_before_the_projection(tmp_path: Path) -> None:
    model = clip_model("multikd-tiny-vit")
    path = tmp_path / "clip.pt"
    torch.save(model.state_dict(), path)
    encoder = OpenClipEncoder("multikd-tiny-vit", checkpoint=str(path)).eval()
    model.visual.output_tokens = True
    with torch.no_grad():
        _, tokens = model.visual(encoder.normalize(images(32)))
        torch.testing.assert_close(encoder(images(32)).patches, tokens)


def test_another_image_size_resamples_positions(tmp_path: Path) -> None:
    model = clip_model("multikd-tiny-vit")
    path = tmp_path / "clip.pt"
    torch.save(model.state_dict(), path)
    teacher = Teacher("open_clip:multikd-tiny-vit", image_size=48, checkpoint=str(path))
    assert teacher(images(32)).grid == (6, 6)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    state = clip_model("multikd-tiny-vit").visual.state_dict()
    state["proj"] = torch.zeros(64, 7)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"'proj' is \(64, 7\)"):
        OpenClipEncoder("multikd-tiny-vit", checkpoint=str(path))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"architecture 'ViT-B-33'.*ViT-B-32"):
        load_encoder("open_clip:ViT-B-33/openai")
    with pytest.raises(ValueError, match=r"tag of ViT-B-32 'laion2b_s34b_b80k'.*laion2b_s34b_b79k"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b80k")
    with pytest.raises(ValueError, match="names no weights"):
        load_encoder("open_clip:ViT-B-32")


def test_hub_out_of_reach_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(ValueError, match=r"no route to the hub.*checkpoint=PATH"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_the_tag_decides_the_activation() -> None:
    with skeleton(), torch.device("meta"):
        openai = OpenClipEncoder("ViT-B-32", "openai")
        laion = OpenClipEncoder("ViT-B-32", "laion2b_s34b_b79k")
    assert openai._quick_gelu
    assert not laion._quick_gelu
    assert openai.variant != laion.variant
    assert laion.spec.widths == Widths(512, 768)
    assert laion.grid_for((224, 224)) == (7, 7)
    # Also where the weights come from a file.
    with skeleton(), torch.device("meta"):
        local = load_encoder("open_clip:ViT-B-32/openai", checkpoint="openai.bin")
        siglip = load_encoder("open_clip:ViT-B-16-SigLIP/webli", checkpoint="webli.bin")
    assert local._quick_gelu
    assert siglip.spec.mean == (0.5, 0.5, 0.5)
    assert local.spec.source == "openai.bin"
