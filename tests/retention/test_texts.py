"""The text tower of an open_clip encoder: whose it is, and that it is loaded once."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from multikd.evaluation.task import NotApplicable
from multikd.export.text import TextTower
from multikd.retention import encoders as module
from multikd.retention.datasets import DataSpec, open_data
from multikd.retention.encoders import open_encoders
from multikd.retention.extract import ExtractOptions
from multikd.retention.subject import EncoderSubject

NAME = "multikd-evaluated-clip"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


def test_text_embeddings_are_computed_once_and_follow_the_weights(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.pt")
        torch.save(open_clip.create_model(NAME).state_dict(), files[-1])
    data = open_data("p", DataSpec(test=str(photos / "test")))
    options = ExtractOptions(tmp_path / "cache", accelerator="cpu")
    classes, templates = ["ash", "elm"], ["a photo of a {}.", "{}"]

    def weights(file: Path) -> torch.Tensor:
        column = open_encoders([f"clip=open_clip:{NAME}@{file}"])[0]
        return EncoderSubject(column, data, options).text_weights(classes, templates)

    first, second = weights(files[0]), weights(files[1])
    expected = TextTower(f"open_clip:{NAME}", str(files[0])).class_weights(classes, templates)
    torch.testing.assert_close(first, expected)
    assert not torch.allclose(first, second)
    monkeypatch.setattr(module, "TextTower", lambda *_: pytest.fail("the tower was loaded again"))
    torch.testing.assert_close(weights(files[0]), first)
    classes.append("oak")
    with pytest.raises(pytest.fail.Exception):
        weights(files[0])


def test_an_encoder_without_texts_says_so(photos: Path, tmp_path: Path) -> None:
    data = open_data("p", DataSpec(test=str(photos / "test")))
    column = open_encoders(["pooled=retention.test_evaluate.Pooled"])[0]
    subject = EncoderSubject(column, data, ExtractOptions(tmp_path, accelerator="cpu"))
    with pytest.raises(NotApplicable, match="pooled has no text tower"):
        subject.text_weights(["ash"], ["{}"])
