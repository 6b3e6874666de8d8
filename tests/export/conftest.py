"""One short run of two little teachers, whose checkpoint the tests export."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from data.shard_maker import make_shards
from helpers.fitting import Run, fit

from multikd.export import CardFacts, export_timm_folder, load
from multikd.export.heads import write_heads
from multikd.export.trained_heads import TrainedHead
from multikd.ladder import Ladder
from multikd.normalizers import FeatureNormalizer
from multikd.projectors import LinearProjectors
from multikd.students import StudentEncoder
from multikd.types import Widths

CLIP = "multikd-load-clip"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    for name, licence in (("test_vit2", "cc-by-nc-4.0"), ("test_convnext", "mit")):
        export_timm_folder(
            StudentEncoder(name, image_size=32), root / name, card=CardFacts(licence=licence)
        )
    make_shards(root / "shards", [40, 24])
    teachers = {
        name: {
            "class_path": "multikd.teachers.Teacher",
            "init_args": {"encoder": f"exported:{root / kind}"},
        }
        for name, kind in (("vit", "test_vit2"), ("next", "test_convnext"))
    }
    model = {
        "teachers": teachers,
        "student": {
            "class_path": "multikd.students.StudentEncoder",
            "init_args": {"name": "test_vit", "image_size": 32, "num_classes": 10},
        },
        "projectors": {
            "class_path": "multikd.projectors.MLPProjectors",
            "init_args": {"hidden": 16, "last_hidden": 24},
        },
        "terms": {"label": {"class_path": "multikd.losses.LabelLoss"}},
        "ema_decay": 0.5,
    }
    return fit(root / "fit", model, root / "shards")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A tiny CLIP model with a real tokenizer, and a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "patch_size": 16,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / f"{CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(3)
    model = open_clip.create_model(CLIP).eval()
    with torch.no_grad():
        model.text_projection.normal_()
    torch.save(model.state_dict(), folder / "clip.pt")
    return model, folder / "clip.pt"


@pytest.fixture(scope="session")
def clip_student(clip, tmp_path_factory):
    """An export whose head ``clip`` predicts that model's embedding."""
    torch.manual_seed(0)
    encoder = StudentEncoder("test_vit", image_size=32).eval()
    ladder = Ladder(encoder.widths, {"clip": Widths(24, None)}, LinearProjectors()).eval()
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.normal_()
    facts = {"encoder": f"open_clip:{CLIP}", "source": str(clip[1])}
    head = TrainedHead("clip", ladder, FeatureNormalizer(Widths(24, None)).eval(), None, facts)
    folder = export_timm_folder(encoder, tmp_path_factory.mktemp("load") / "out")
    write_heads(folder, encoder, [head])
    return load(folder)
