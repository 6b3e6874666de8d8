"""Models of torchvision, against the models themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from multikd.backbones import skeleton
from multikd.teachers import Teacher, TorchvisionEncoder, list_encoders, load_encoder

# (name, size, grid): pools as modules, as functions, inside a classifier; NHWC inside.
MODELS = [
    ("resnet18", 64, (2, 2)),
    ("efficientnet_b0", 64, (2, 2)),
    ("mobilenet_v2", 64, (2, 2)),
    ("convnext_tiny", 64, (2, 2)),
    ("swin_t", 64, (2, 2)),
    ("regnet_x_400mf", 64, (2, 2)),
    ("densenet121", 64, (2, 2)),
]


@pytest.mark.parametrize(("name", "size", "grid"), MODELS)
def test_a_map_and_the_classifier_s_own_answer(name: str, size: int, grid: tuple) -> None:
    torch.manual_seed(0)
    encoder = TorchvisionEncoder(name, image_size=size).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = encoder(images)
        logits = encoder.model(encoder.normalize(images))
    assert features.grid == encoder.grid_for((size, size)) == grid
    torch.testing.assert_close(features.logits, logits)
    assert features.widths == encoder.spec.widths
    torch.testing.assert_close(features.summary, features.patches.mean(1))
    # The classifier, fed with the summary, gives the logits.
    if name in ("resnet18", "regnet_x_400mf"):
        torch.testing.assert_close(encoder.model.fc(features.summary), logits)
    if name in ("efficientnet_b0", "mobilenet_v2", "convnext_tiny"):
        head = encoder.model.classifier
        given = features.summary[:, :, None, None] if name == "convnext_tiny" else features.summary
        torch.testing.assert_close(head(given), logits)
    if name == "swin_t":
        torch.testing.assert_close(encoder.model.head(features.summary), logits)
    assert not any(m._forward_pre_hooks for m in encoder.model.modules())


def test_a_vit_gives_its_normed_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.vit_b_16(weights=None, image_size=32)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    teacher = Teacher("torchvision:vit_b_16", checkpoint=str(tmp_path / "vit.pth"), image_size=32)
    images = torch.rand(2, 3, 32, 32)
    features = teacher(images)
    assert features.grid == (2, 2)
    assert teacher.spec.fixed_size
    with torch.no_grad():
        expected = model.eval()(teacher.encoder.normalize(images))
    torch.testing.assert_close(features.logits, expected)
    assert features.patches.shape == (2, 4, 768)
    torch.testing.assert_close(model.heads(features.summary), expected)


def test_a_folded_teacher_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "r.pth")
    teacher = Teacher("torchvision:resnet18", checkpoint=str(tmp_path / "r.pth"), image_size=64)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(teacher.encoder.normalize(images))
    torch.testing.assert_close(teacher(images).logits, expected, rtol=1e-4, atol=1e-4)
    assert teacher.spec.source.endswith("r.pth")


def test_named_weights_bring_their_preprocessing() -> None:
    with skeleton(), torch.device("meta"):
        encoder = load_encoder("torchvision:efficientnet_v2_s.DEFAULT")
    assert encoder.spec.image_size == (384, 384)
    assert encoder.spec.licence == "BSD-3-Clause"
    assert encoder.spec.mean == (0.485, 0.456, 0.406)
    with skeleton(), torch.device("meta"):  # also where they are in a file
        local = load_encoder("torchvision:inception_v3.IMAGENET1K_V1", checkpoint="i.pth")
    assert local.spec.image_size == (299, 299)
    assert local.model.transform_input
    assert local.spec.licence == "unknown"
    assert any(r.name == "torchvision:resnet50.IMAGENET1K_V2" for r in list_encoders("torchvision"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet51.DEFAULT", "did you mean"),
        ("torchvision:resnet50.IMAGENET", "unknown weights of torchvision's resnet50"),
        ("torchvision:resnet50", "write torchvision:resnet50.DEFAULT"),
    ],
)
def test_mistakes(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Teacher(name)
