from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.backbones import skeleton
from multikd.students import StudentEncoder
from multikd.teachers import Teacher, list_encoders, load_encoder
from multikd.teachers.commands import run_inspect, run_list
from multikd.types import EncoderSpec, TokenFeatures, Widths


class UserEncoder(nn.Module):
    """A user's class, found by its import path."""

    def __init__(self, checkpoint: str | None = None, image_size: int = 16) -> None:
        super().__init__()
        size = (image_size, image_size)
        half = (0.5, 0.5, 0.5)
        self.spec = EncoderSpec(
            "user", Widths(3, None), size, 8, half, half, source=checkpoint or ""
        )

    def forward(self, x: Tensor) -> TokenFeatures:
        return TokenFeatures(x.mean((2, 3)))


def needs_an_argument(value: int) -> nn.Module:
    return UserEncoder()


def gives_a_number() -> int:
    return 3


def gives_a_module() -> nn.Module:
    return UserEncoder()


HERE = __name__


class TestUsersClasses:
    def test_by_import_path(self) -> None:
        teacher = Teacher(f"{HERE}.UserEncoder", image_size=24, checkpoint="w.pth")
        assert teacher(torch.rand(2, 3, 32, 32)).summary.shape == (2, 3)
        assert teacher.spec.image_size == (24, 24)
        assert teacher.spec.source == "w.pth"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (f"{HERE}.Nothing", "no encoder is called"),
            ("no_such_package.Encoder", "No module named 'no_such_package'"),
            ("vit_base_patch16_224", "write timm:"),
            (f"{HERE}.HERE", "not a class or function"),
            (f"{HERE}.gives_a_number", r"gives no encoder module \(its signature says int\)"),
            ("os.abort", "so it is not called"),
            ("subprocess.Popen", "is no encoder module"),
            (f"{HERE}.needs_an_argument", "can't be called"),
            ("timm:", "names no model"),
            ("", "no encoder is called ''"),
        ],
    )
    def test_errors(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_encoder(name)

    def test_a_factory_without_checkpoint(self) -> None:
        with pytest.raises(ValueError, match="takes no checkpoint"):
            load_encoder(f"{HERE}.gives_a_module", checkpoint="w.pth")


class TestTimm:
    def test_local_checkpoint_decides_the_classifier(self, tmp_path: Path) -> None:
        student = StudentEncoder("resnet10t", image_size=64, num_classes=7).eval()
        path = tmp_path / "w.safetensors"
        save_file(student.model.state_dict(), path)
        teacher = Teacher("timm:resnet10t", image_size=64, checkpoint=str(path))
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            expected = student(images).features
        features = teacher(images)
        assert teacher.num_classes == 7
        torch.testing.assert_close(features.logits, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.summary, expected.summary, atol=1e-4, rtol=1e-4)
        save_file(student.encoder_state_dict(), path)
        assert Teacher("timm:resnet10t", image_size=64, checkpoint=str(path)).num_classes == 0

    def test_unknown_name_offers_the_nearest(self) -> None:
        with pytest.raises(ValueError, match="vit_base_patch16_224.dino"):
            load_encoder("timm:vit_base_patch16_224.dinoo")

    def test_hub_names_build_as_skeletons_on_meta(self) -> None:
        with skeleton(), torch.device("meta"):
            teacher = Teacher("timm:vit_small_patch14_dinov2.lvd142m", image_size=224)
        assert teacher.grid_for((224, 224)) == (16, 16)
        assert teacher.widths == Widths(384, 384)
        assert teacher.spec.licence == "apache-2.0"
        assert teacher.num_classes == 0


class TestExported:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        student = StudentEncoder("resnet10t", image_size=64, mean=(0.1, 0.2, 0.3)).eval()
        save_file(student.encoder_state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "resnet10t",
            "num_classes": 0,
            "num_features": 512,
            "pretrained_cfg": {
                "input_size": [3, 64, 64],
                "mean": [0.1, 0.2, 0.3],
                "std": [0.2, 0.2, 0.2],
                "num_classes": 0,
                "license": "mit",
                "classifier": "fc",
                "first_conv": "conv1.0",
            },
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(student.encoder_state_dict(), tmp_path / "reference.pth")
        return tmp_path

    @pytest.mark.parametrize("scheme", ["exported", "local-dir"])
    def test_a_folder_is_a_teacher(self, folder: Path, scheme: str) -> None:
        teacher = Teacher(f"{scheme}:{folder}", fold=False)
        assert teacher.spec.mean == (0.1, 0.2, 0.3)
        assert teacher.spec.image_size == (64, 64)
        assert teacher.spec.licence == "mit"
        reference = torch.load(folder / "reference.pth", weights_only=True)
        key = "layer4.0.conv1.weight"
        assert torch.equal(teacher.encoder.state_dict()[f"model.{key}"], reference[key])

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is no model folder"):
            load_encoder(f"exported:{tmp_path}")
        with pytest.raises(ValueError, match="carries its own weights"):
            load_encoder("exported:x", checkpoint="w.pth")


class TestCommands:
    def test_list(self) -> None:
        rows = list_encoders()
        names = [row.name for row in rows]
        assert len(names) == len(set(names))
        assert names[0] == "packaged:efficientnet_lite0"
        assert [row.image_size for row in rows[:3]] == [224, 240, 260]
        assert "timm:vit_base_patch16_224.dino" in names
        assert "open_clip:ViT-B-32/laion2b_s34b_b79k" in names
        text, figures = run_list("*patch16_224.dino")
        assert "timm:vit_base_patch16_224.dino" in [t["name"] for t in figures["teachers"]]
        assert all(t["name"].endswith("patch16_224.dino") for t in figures["teachers"])
        assert "apache-2.0" in text
        assert run_list("no such thing")[1] == {"teachers": []}
        json.dumps(figures)

    def test_inspect(self, tmp_path: Path) -> None:
        student = StudentEncoder("resnet10t", image_size=224, num_classes=4)
        path, picture = tmp_path / "w.pth", tmp_path / "grün bild.png"
        torch.save(student.model.state_dict(), path)
        Image.new("RGBA", (300, 200), (0, 200, 0, 128)).save(picture)
        text, figures = run_inspect("timm:resnet10t", checkpoint=path, image=picture)
        assert figures["summary"] == (1, 512)
        assert figures["patches"] == (1, 36, 512)
        assert figures["grid"] == (6, 6)
        assert figures["image_size"] == (176, 176)
        assert figures["parameters"] > 4_900_000
        assert len(figures["top_classes"]) == 4
        assert "6×6" in text
        assert picture.name in text
        json.dumps(figures)

    def test_inspect_of_no_image(self, tmp_path: Path) -> None:
        bad = tmp_path / "x.png"
        bad.write_text("no image")
        path = tmp_path / "w.pth"
        torch.save(StudentEncoder("resnet10t", image_size=64).model.state_dict(), path)
        with pytest.raises(ValueError, match="cannot be read as an image"):
            run_inspect("timm:resnet10t", checkpoint=path, image=bad)
