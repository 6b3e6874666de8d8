"""Released files in their published layouts, imported: features against a hand-written forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published import layouts
from safetensors.torch import save_file
from torch import Tensor, nn

import multikd
from multikd.cli import main
from multikd.published.commands import ImportSettings, run_import
from multikd.published.vit import Asked
from multikd.students import StudentEncoder
from multikd.teachers import load_encoder
from multikd.types import TokenFeatures

Answer = tuple[Tensor | None, Tensor]
QUIET = ImportSettings(cost=False)


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(9))


def normalised(folder: Path, batch: Tensor) -> Tensor:
    about = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (batch - mean) / std


def tokens_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """All tokens behind the last norm, as timm gives them."""
    found: Tensor = model.forward_features(pixels)  # type: ignore[operator]
    return found


def assert_same(folder: Path, batch: Tensor, wanted: Answer) -> TokenFeatures:
    """Our reader and plain timm give the reference's class token (or mean) and patches."""
    summary, patches = wanted
    found = multikd.load(folder).encode(batch)
    expected = patches.mean(dim=1) if summary is None else summary
    assert found.summary is not None
    assert found.patches is not None
    torch.testing.assert_close(found.summary, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches, patches, rtol=0, atol=1e-5)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        tokens = tokens_of(model, normalised(folder, batch))
        torch.testing.assert_close(model(normalised(folder, batch)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, -patches.shape[1] :], patches, rtol=0, atol=1e-5)
    # The reference is no constant, and tells images and places apart.
    assert patches.std(dim=1).mean() > 0.05
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    return found


@pytest.mark.parametrize(
    ("kind", "make", "size"),
    [("unic", layouts.unic_file, 32), ("dune", layouts.dune_file, 42)],
)
def test_unic_and_dune_give_the_published_features(
    kind: str, make: Callable[[], tuple[dict[str, Any], layouts.Tensors]], size: int, tmp_path: Path
) -> None:
    content, encoder = make()
    file, out = save(content, tmp_path / f"{kind}.pth"), tmp_path / "out"
    _, figures = run_import(file, out, QUIET)
    assert figures["kind"] == kind
    assert figures["image_size"] == size
    batch = images(size)
    assert_same(out, batch, layouts.dinov2_forward(encoder, normalised(out, batch)))


def test_a_plain_timm_model_with_the_same_weights_gives_the_same(tmp_path: Path) -> None:
    """DUNE's tensors put into timm's register model by hand, and no converter of ours."""
    content, encoder = layouts.dune_file()
    run_import(save(content, tmp_path / "dune.pth"), tmp_path / "out", QUIET)
    model = timm.create_model(
        "vit_base_patch14_reg4_dinov2",
        num_classes=0,
        img_size=42,
        embed_dim=128,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
    ).eval()
    renamed = {k.replace("blocks.0.", "blocks."): v for k, v in encoder.items()}
    renamed["reg_token"] = renamed.pop("register_tokens")
    positions = renamed.pop("pos_embed")
    renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
    renamed["pos_embed"] = positions[:, 1:]
    del renamed["mask_token"]
    model.load_state_dict(renamed)
    batch = images(42)
    found = multikd.load(tmp_path / "out").encode(batch)
    with torch.no_grad():
        tokens = tokens_of(model, normalised(tmp_path / "out", batch))
    torch.testing.assert_close(found.summary, tokens[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches, tokens[:, 5:], rtol=0, atol=1e-5)


def test_dune_without_weights_in_its_norms(tmp_path: Path) -> None:
    content, encoder = layouts.dune_file()
    names = [k for k in encoder if "norm" in k]
    for name in names:
        del content["model"][f"module._orig_mod.encoder.{name}"]
        encoder[name] = torch.full_like(encoder[name], float(name.endswith("weight")))
    out = tmp_path / "out"
    run_import(save(content, tmp_path / "dune.pth"), out, QUIET)
    batch = images(42)
    assert_same(out, batch, layouts.dinov2_forward(encoder, normalised(out, batch)))


@pytest.mark.parametrize("kind", ["", "nocls", "reg"])
def test_theia_gives_the_published_features(kind: str, tmp_path: Path) -> None:
    released, backbone = layouts.theia_file(kind)
    file, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file(released, file)
    _, figures = run_import(file, out, QUIET)
    assert figures["kind"] == "theia"
    batch = images(32)
    assert_same(out, batch, layouts.theia_forward(backbone, normalised(out, batch)))


def test_radio_gives_the_published_features_at_the_size_asked_for(tmp_path: Path) -> None:
    content, base = layouts.radio_file()
    file = save(content, tmp_path / "radio_v2.5-b.pth.tar")
    for size in (64, 128):  # resampled, and the table as it is
        out = tmp_path / f"out{size}"
        asked = ImportSettings(cost=False, asked=Asked(image_size=size))
        text, figures = run_import(file, out, asked)
        assert figures["kind"] == "radio"
        assert "clip, dino_v2, sam, register" in text
        batch = images(size)
        tokens, patches = layouts.radio_forward(base, normalised(out, batch))
        assert_same(out, batch, (tokens[:, 0], patches))


def test_radio_keeps_every_teachers_class_token(tmp_path: Path) -> None:
    """The chosen teacher's comes first; the published summary is put together from the prefix."""
    content, base = layouts.radio_file()
    file = save(content, tmp_path / "radio.pth.tar")
    batch = images(64)
    for row, name in enumerate(("clip", "dino_v2", "sam")):
        out = tmp_path / name
        asked = Asked(image_size=64, summary=name)
        run_import(file, out, ImportSettings(cost=False, asked=asked))
        tokens, patches = layouts.radio_forward(base, normalised(out, batch))
        assert_same(out, batch, (tokens[:, row], patches))
        model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
        with torch.no_grad():
            prefix = tokens_of(model, normalised(out, batch))[:, : tokens.shape[1]]
        order = [row, *(i for i in range(tokens.shape[1]) if i != row)]
        torch.testing.assert_close(prefix, tokens[:, order], rtol=0, atol=1e-5)


def test_radios_half_precision_and_renamed_layer_scale(tmp_path: Path) -> None:
    content, base = layouts.radio_file()
    for block in range(layouts.DEPTH):
        for name in ("ls1", "ls2"):
            scale = torch.rand(128).half() + 0.5
            content["state_dict"][f"base_model.blocks.{block}.{name}.grandma"] = scale
            base[f"blocks.{block}.{name}.gamma"] = scale
    half = {k: v.half() for k, v in content["state_dict"].items()}
    content["state_dict"] = half
    base = {k: v.half().float() for k, v in base.items()}
    out = tmp_path / "out"
    asked = Asked(image_size=128)
    run_import(save(content, tmp_path / "r.tar"), out, ImportSettings(cost=False, asked=asked))
    batch = images(128)
    tokens, patches = layouts.radio_forward(base, normalised(out, batch))
    assert_same(out, batch, (tokens[:, 0], patches))


def test_radio_from_the_hub_has_its_arguments_beside_it(tmp_path: Path) -> None:
    content, base = layouts.radio_file()
    folder = tmp_path / "hub"
    folder.mkdir()
    renamed = {}
    for key, tensor in content["state_dict"].items():
        if key.startswith("base_model."):
            renamed["radio_model.model." + key.removeprefix("base_model.")] = tensor
        elif key.startswith("input_conditioner."):
            renamed[f"radio_model.{key}"] = tensor
    renamed["radio_model.summary_idxs"] = torch.tensor([0, 1])
    save_file(renamed, folder / "model.safetensors")
    arguments = vars(content["args"]) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({"args": arguments, "version": "x"}))
    out = tmp_path / "out"
    asked = Asked(image_size=64, summary="dino_v2")
    file = folder / "model.safetensors"
    _, figures = run_import(file, out, ImportSettings(cost=False, asked=asked))
    assert figures["kind"] == "radio"
    batch = images(64)
    pixels = normalised(out, batch)
    assert (pixels - batch).abs().mean() > 0.3  # the file's mean and std, not CLIP's
    tokens, patches = layouts.radio_forward(base, pixels)
    assert_same(out, batch, (tokens[:, 1], patches))
    mean = json.loads((out / "config.json").read_text())["pretrained_cfg"]["mean"]
    assert mean == pytest.approx([0.48, 0.46, 0.41])


@pytest.mark.parametrize("size", [64, 48])
def test_eupe_gives_the_published_features_at_any_size(size: int, tmp_path: Path) -> None:
    found = layouts.eupe_file()
    file, out = save(found, tmp_path / "eupe_vitb16.pth"), tmp_path / "out"
    _, figures = run_import(file, out, ImportSettings(cost=False, asked=Asked(image_size=64)))
    assert figures["kind"] == "eupe"
    batch = images(size)
    assert_same(out, batch, layouts.eupe_forward(found, normalised(out, batch)))


def test_an_imported_folder_is_a_teacher_and_a_students_start(tmp_path: Path) -> None:
    content, encoder = layouts.dune_file()
    out = tmp_path / "out"
    run_import(save(content, tmp_path / "dune.pth"), out, QUIET)
    batch = images(42)
    summary, patches = layouts.dinov2_forward(encoder, normalised(out, batch))
    teacher = load_encoder(f"exported:{out}")
    with torch.no_grad():
        seen = teacher(batch)
    torch.testing.assert_close(seen.summary, summary, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.patches, patches, rtol=0, atol=1e-5)
    assert "non-commercial" in teacher.spec.licence
    small = {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    for student in (
        StudentEncoder(
            "vit_base_patch14_reg4_dinov2", checkpoint=str(out), image_size=42, model_args=small
        ),
        StudentEncoder(f"local-dir:{out}", pretrained=True),
    ):
        student.eval()
        with torch.no_grad():
            found = tokens_of(student.model, normalised(out, batch))
        torch.testing.assert_close(found[:, 5:], patches, rtol=0, atol=1e-5)


def test_the_command_and_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, _ = layouts.unic_file()
    file, out = save(content, tmp_path / "unic.pth"), tmp_path / "out"
    figures = tmp_path / "figures.json"
    assert main(["import", str(file), "--out", str(out), f"--json={figures}"]) == 0
    told = capsys.readouterr().out
    assert "cc-by-nc-sa-4.0" in told
    assert "exported:" in told
    assert json.loads(figures.read_text())["licence"] == "cc-by-nc-sa-4.0"
    card = (out / "README.md").read_text()
    assert "published by naver/unic" in card
    assert "**cc-by-nc-sa-4.0** (no commercial use, share alike)" in card
    assert "02269db" in card
    assert "distilled by multikd" not in card
    about = json.loads((out / "manifest.json").read_text())
    assert about["imported"] == "naver/unic"
    assert len(about["checkpoint"]["sha256"]) == 64
    config = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert config["license"] == "cc-by-nc-sa-4.0"
    assert (config["mean"], config["crop_pct"]) == ([0.485, 0.456, 0.406], 1.0)
    # Its own name is taken now; --overwrite replaces what multikd wrote.
    assert main(["import", str(file), "--out", str(out), "--no-cost"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(file), "--out", str(out), "--no-cost", "--overwrite"]) == 0


def test_c_radio_has_another_licence_than_radio(tmp_path: Path) -> None:
    content, _ = layouts.radio_file()
    asked = ImportSettings(cost=False, asked=Asked(image_size=64))
    _, closed = run_import(save(content, tmp_path / "radio_v2.5-b.tar"), tmp_path / "a", asked)
    _, opened = run_import(save(content, tmp_path / "c-radio_v3-b.tar"), tmp_path / "b", asked)
    assert closed["licence"] == "nvidia-source-code-license-nc"
    assert opened["licence"] == "nvidia-open-model"
