import onnx
import pytest
import timm
import torch
from small_models import FAMILIES, FIXED_SIZE, deployed, small_student

from multikd.errors import MissingExtraError
from multikd.export import export_timm_folder
from multikd.export import onnx as onnx_module
from multikd.export.onnx import export_onnx, onnx_runner
from multikd.export.parity import synthetic_images
from multikd.export.torch_export import export_pt2
from multikd.students import StudentEncoder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_student_runs_in_onnx_runtime_at_other_batches_and_sizes(tmp_path) -> None:
    student = StudentEncoder("test_resnet", image_size=64, num_classes=3).eval()
    images = torch.rand(3, 3, 64, 64)
    report = export_onnx(student, tmp_path / "a.onnx", images=images)
    assert names(tmp_path) == ["a.onnx"]
    assert report.bytes == (tmp_path / "a.onnx").stat().st_size
    assert report.parity["images"] == "real"
    assert 0 < report.parity["max_relative_error"] <= 1e-4
    assert report.settings["dynamic"] == ["batch", "height", "width"]
    graph = onnx.load(tmp_path / "a.onnx")
    assert graph.opset_import[0].version == 18
    assert [d.dim_param for d in graph.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "height",
        "width",
    ]
    run = onnx_runner(tmp_path / "a.onnx")
    for shape in ((7, 3, 64, 64), (1, 3, 96, 128)):
        images = torch.rand(shape)
        with torch.inference_mode():
            expected = student.features(images).summary
        received = run(student.normalize(images))
        assert torch.allclose(received, expected, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="exists already"):
        export_onnx(student, tmp_path / "a.onnx")
    classified = export_onnx(student, tmp_path / "a.onnx", classifier=True, overwrite=True)
    assert onnx_runner(classified.path)(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_preprocessing_inside_takes_uint8_of_any_size(tmp_path) -> None:
    encoder = deployed("ViT, class token", preprocessing=True)
    report = export_onnx(encoder, tmp_path / "a.onnx", external_data=True, opset=20)
    assert names(tmp_path) == ["a.onnx", "a.onnx.data"]
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.settings["opset"] == 20
    images = (synthetic_images((128, 128), 2) * 255).to(torch.uint8)
    received = onnx_runner(tmp_path / "a.onnx")(images)
    # Of the same images resized outside, through a graph that expects them normalised.
    small = torch.nn.functional.interpolate(
        images.float() / 255, (64, 64), mode="bicubic", antialias=True
    ).clamp(0, 1)
    plain = deployed("ViT, class token")
    expected = plain(plain.inputs(small))
    assert torch.allclose(received, expected, atol=1e-3 * float(expected.abs().max()))


def test_an_old_opset_works_or_says_so(tmp_path) -> None:
    encoder = deployed("ResNet")
    assert export_onnx(encoder, tmp_path / "a.onnx", opset=17).settings["opset"] == 17
    with pytest.raises(ValueError, match="ONNX opset 9 cannot express ResNet .*another opset"):
        export_onnx(encoder, tmp_path / "b.onnx", opset=9)
    assert names(tmp_path) == ["a.onnx"]


def test_beyond_the_tolerance_nothing_is_left(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"differs from the torch model.*nothing was written"):
        export_onnx(deployed("ConvNeXt"), tmp_path / "a.onnx", tolerance=0.0)
    assert names(tmp_path) == []


class Sorts(torch.nn.Module):
    def forward(self, images):
        return torch.linalg.eigvals(images[:, 0]).real


def test_an_operator_that_onnx_lacks_is_one_sentence(tmp_path) -> None:
    encoder = deployed("ResNet")
    encoder.model = Sorts()
    with pytest.raises(ValueError, match=r"ONNX opset 18 cannot express ResNet \(.*pt2") as info:
        export_onnx(encoder, tmp_path / "a.onnx")
    assert "\n" not in str(info.value)
    assert names(tmp_path) == []


def test_a_full_disk_and_a_missing_extra(tmp_path, monkeypatch) -> None:
    encoder = deployed("ResNet")

    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(encoder, tmp_path / "a.onnx")
    assert names(tmp_path) == []
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"multikd\[export\]"):
        export_onnx(encoder, tmp_path / "a.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path) -> None:
    """Every family as a timm folder and in both graph formats; the README's table says the same."""
    student = small_student(family)
    images = torch.rand(2, 3, *student.spec.image_size)
    with torch.inference_mode():
        expected = student.features(images).summary
        loaded = timm.create_model(
            f"local-dir:{export_timm_folder(student, tmp_path / 'timm')}", pretrained=True
        ).eval()
        assert torch.equal(loaded(student.normalize(images)), expected)
    assert float(expected.std()) > 1e-4
    free = export_onnx(student, tmp_path / "a.onnx").settings["dynamic"]
    assert export_pt2(student, tmp_path / "a.pt2").settings["dynamic"] == free
    assert free == (["batch"] if family in FIXED_SIZE else ["batch", "height", "width"])
