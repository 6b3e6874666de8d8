"""ONNX graphs as teachers, against the torch modules that they were exported from."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from multikd.errors import MissingExtraError  # noqa: E402
from multikd.teachers import OnnxEncoder, Teacher, load_encoder  # noqa: E402
from multikd.types import Widths  # noqa: E402


class Small(nn.Module):
    """A map of 8-pixel patches, a summary, and tokens with a prefix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 8, stride=8)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.conv(x)
        tokens = maps.flatten(2).transpose(1, 2)
        summary = self.head(tokens.mean(1))
        return summary, maps, torch.cat([tokens[:, :1] * 0, tokens], dim=1)


def graph(path: Path, batch: int | str = "B", side: int | str = "S", half: bool = False) -> Small:
    """The same network as a graph, written with onnx itself."""
    model = Small()
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32

    def constant(name: str, value: Any) -> Any:
        array = value.detach().numpy() if isinstance(value, Tensor) else np.array(value)
        array = array.astype(dtype) if array.dtype.kind == "f" else array
        return numpy_helper.from_array(array, name)

    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["map"], strides=[8, 8], kernel_shape=[8, 8]),
        helper.make_node("Reshape", ["map", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["plain"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["map", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "hw", "hb"], ["summary"], transB=1),
        helper.make_node("Slice", ["plain", "zero", "one", "first"], ["head"]),
        helper.make_node("Concat", ["head", "plain"], ["tokens"], axis=1),
    ]
    weights = [
        *(constant("w", model.conv.weight), constant("b", model.conv.bias)),
        *(constant("hw", model.head.weight), constant("hb", model.head.bias)),
        *(constant("flat", [0, 6, -1]), constant("axes", [2, 3])),
        *(constant("zero", [0]), constant("one", [1]), constant("first", [1])),
    ]
    outputs = [
        helper.make_tensor_value_info("summary", kind, [batch, 5]),
        helper.make_tensor_value_info("map", kind, [batch, 6, None, None]),
        helper.make_tensor_value_info("tokens", kind, [batch, None, 6]),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, [batch, 3, side, side])]
    made = helper.make_model(
        helper.make_graph(nodes, "small", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return model.eval()


@pytest.mark.parametrize("patches", ["map", "tokens"])
@pytest.mark.parametrize("batch", ["B", 1, 2])
def test_the_named_outputs_are_the_module_s(patches: str, batch: int | str, tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", batch)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    encoder = OnnxEncoder(
        str(tmp_path / "m.onnx"), "summary", patches, image_size=32, mean=mean, std=std, threads=1
    )
    teacher = Teacher(encoder)
    assert teacher.widths == Widths(5, 6)
    assert teacher.spec.patch_size == 8
    assert encoder.providers == ["CPUExecutionProvider"]
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        summary, maps, _ = model(
            (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        )
    features = teacher(images)
    assert features.grid == teacher.grid_for((32, 32)) == (4, 4)
    torch.testing.assert_close(features.summary, summary, rtol=1e-5, atol=1e-5)
    expected = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.patches, expected, rtol=1e-5, atol=1e-5)
    assert teacher.num_parameters == 0
    other = encoder.grid_for((48, 64)) if patches == "map" else encoder.grid_for((48, 48))
    assert other == ((6, 8) if patches == "map" else (6, 6))


def test_half_precision_graphs_and_fixed_sizes(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", side=24, half=True)
    teacher = Teacher(OnnxEncoder(str(tmp_path / "m.onnx"), patches="map", threads=1))
    assert teacher.spec.fixed_size
    assert teacher.spec.image_size == (24, 24)
    assert teacher.widths == Widths(None, 6)
    images = torch.rand(2, 3, 40, 40)  # resized for the graph
    features = teacher(images)
    assert features.grid == (3, 3)
    assert features.patches is not None
    assert features.patches.dtype == torch.float32
    pixels = nn.functional.interpolate(images, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model(pixels)[1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.patches, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"takes images of \(24, 24\) px only"):
        OnnxEncoder(str(tmp_path / "m.onnx"), patches="map", image_size=32)


def test_the_fingerprint_is_the_file_s(tmp_path: Path) -> None:
    graph(tmp_path / "a.onnx")
    first = Teacher(OnnxEncoder(str(tmp_path / "a.onnx"), patches="map", threads=1))
    again = Teacher(OnnxEncoder(str(tmp_path / "a.onnx"), patches="map", threads=1))
    other = Teacher(OnnxEncoder(str(tmp_path / "a.onnx"), "summary", threads=1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    content = onnx.load(tmp_path / "a.onnx")
    content.graph.initializer[0].raw_data = content.graph.initializer[0].raw_data[::-1]
    onnx.save(content, tmp_path / "a.onnx")
    changed = Teacher(OnnxEncoder(str(tmp_path / "a.onnx"), patches="map", threads=1))
    assert changed.fingerprint() != first.fingerprint()


def test_an_exported_timm_model_by_name(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.rand(1, 3, 32, 32),),
            tmp_path / "vit.onnx",
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
    teacher = Teacher(f"onnx:{tmp_path / 'vit.onnx'}")  # one output needs no name
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    assert teacher.widths == Widths(64, None)
    torch.testing.assert_close(teacher(images).summary, expected, rtol=1e-4, atol=1e-4)


def test_mistakes(tmp_path: Path) -> None:
    path = str(tmp_path / "m.onnx")
    graph(tmp_path / "m.onnx")
    for arguments, words in (
        ({"path": "gone.onnx"}, "no ONNX file at 'gone.onnx'"),
        ({"path": path, "patches": "maps"}, "unknown output of .*did you mean 'map'"),
        ({"path": path, "summary": "map"}, r"expected \(B, D\): name it as patches"),
        ({"path": path, "patches": "summary"}, "name it as summary"),
        ({"path": path, "patches": "map", "provider": "tpu"}, "unknown provider"),
        ({"path": path, "patches": "map", "provider": "cuda"}, "has no CUDAExecutionProvider"),
        ({"path": path, "patches": "map", "image_size": 4}, "can't take images of 4×4 px"),
    ):
        with pytest.raises(ValueError, match=words):
            OnnxEncoder(**arguments)  # type: ignore[arg-type]
    content = onnx.load(path)
    for output in content.graph.output:
        output.name = {"summary": "s", "map": "map", "tokens": "tokens"}[output.name]
    content.graph.node[4].output[0] = "s"
    onnx.save(content, path)
    with pytest.raises(ValueError, match="has the outputs s, map, tokens: say which is what"):
        load_encoder(f"onnx:{path}")
    (tmp_path / "noise.onnx").write_bytes(b"noise " * 50)
    with pytest.raises(ValueError, match="is no ONNX graph that can be run"):
        load_encoder(f"onnx:{tmp_path / 'noise.onnx'}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'multikd\[export\]'"):
        OnnxEncoder(str(tmp_path / "m.onnx"))
