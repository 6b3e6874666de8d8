"""``multikd.load``: encode, heads, zero-shot and retrieval."""

from __future__ import annotations

import subprocess
import sys

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import multikd
from multikd.checkpoints import load_student
from multikd.export.text import TextTower

ARCHITECTURE = "multikd-load-clip"  # of conftest.py
CLASSES = ["cat", "dog", "tree"]
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]


def test_importing_multikd_stays_light():
    code = (
        "import sys, multikd\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert callable(multikd.load)\n"
        "assert 'torch' in sys.modules\n"
        "assert not hasattr(multikd, 'laod')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_encode_preprocess_and_head(run, tmp_path):
    from multikd.export.commands import ExportSettings, run_export

    out = tmp_path / "out"
    run_export(run.checkpoint, out, ExportSettings(heads=("vit", "next"), cost=False))
    loaded = multikd.load(out)
    assert loaded.heads == ("vit", "next")
    assert "test_vit" in repr(loaded)
    picture = Image.new("L", (50, 40), 100)
    images = loaded.preprocess([picture, picture])
    assert images.shape == (2, 3, 32, 32)
    assert float(images.min()) >= 0
    assert torch.allclose(images, torch.full_like(images, 100 / 255), atol=1 / 255)
    features = loaded.encode(images)
    assert torch.equal(
        features.summary, load_student(run.checkpoint).student(images).features.summary.detach()
    )
    assert loaded.head("vit")(images).summary.shape == (2, 64)
    assert not loaded.head("vit")(images).summary.requires_grad
    with pytest.raises(ValueError, match=r"unknown head 'nxt': did you mean 'next'"):
        loaded.head("nxt")
    with pytest.raises(ValueError, match="no text tower"):
        loaded.zero_shot("vit", CLASSES)
    with pytest.raises(ValueError, match="float images"):
        loaded.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@torch.no_grad()
def test_zero_shot_is_clip_s_own_with_the_student_s_embedding(clip_student, clip):
    model, _ = clip
    tokenize = open_clip.get_tokenizer(ARCHITECTURE)
    rows = []
    for name in CLASSES:
        texts = model.encode_text(tokenize([t.format(name) for t in TEMPLATES]))
        mean = nn.functional.normalize(texts, dim=-1).mean(dim=0)
        rows.append(mean / mean.norm())
    images = torch.rand(4, 3, 32, 32)
    embedding = nn.functional.normalize(clip_student.head("clip")(images).summary, dim=-1)
    expected = (model.logit_scale.exp() * embedding @ torch.stack(rows).T).softmax(dim=-1)
    classify = clip_student.zero_shot("clip", CLASSES, TEMPLATES)
    received = classify(images)
    assert classify.classes == tuple(CLASSES)
    assert torch.allclose(received, expected, atol=1e-5)
    assert torch.allclose(received.sum(dim=1), torch.ones(4))
    assert float(expected.std()) > 1e-3


@torch.no_grad()
def test_retrieval(clip_student, clip):
    model, _ = clip
    images, texts = torch.rand(5, 3, 32, 32), ["a red car", "two dogs"]
    found = clip_student.similarity("clip", images, texts)
    assert found.shape == (5, 2)
    wanted = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(texts), normalize=True)
    embedding = nn.functional.normalize(clip_student.head("clip")(images).summary, dim=-1)
    assert torch.allclose(found, embedding @ wanted.T, atol=1e-5)
    assert clip_student.text("clip") is clip_student.text("clip")


def test_text_towers_that_cannot_be(clip, tmp_path):
    model, path = clip
    with pytest.raises(ValueError, match="were a local file: give checkpoint"):
        TextTower(f"open_clip:{ARCHITECTURE}")
    with pytest.raises(ValueError, match="unknown open_clip architecture"):
        TextTower("open_clip:multikd-load-clap", str(path))
    torch.save(model.visual.state_dict(), tmp_path / "visual.pt")
    with pytest.raises(ValueError, match="not the whole CLIP model"):
        TextTower(f"open_clip:{ARCHITECTURE}", str(tmp_path / "visual.pt"))
    tower = TextTower(f"open_clip:{ARCHITECTURE}", str(path))
    with pytest.raises(ValueError, match="needs {} where the class name goes"):
        tower.class_weights(CLASSES, ["a photo"])
    with pytest.raises(ValueError, match="no text to encode"):
        tower.class_weights([], TEMPLATES)


def test_folders_that_are_no_export(clip_student, tmp_path):
    with pytest.raises(ValueError, match="no exported student"):
        multikd.load(tmp_path)
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(clip_student.folder, broken)
    weights = (broken / "heads.safetensors").read_bytes()
    (broken / "heads.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="export it again"):
        multikd.load(broken)
    (broken / "manifest.json").unlink()
    shutil.copy(clip_student.folder / "heads.safetensors", broken / "heads.safetensors")
    with pytest.raises(ValueError, match=r"lacks manifest\.json"):
        multikd.load(broken)
