import onnx
import pytest
import torch
from small_models import deployed, spec_of

from multikd.data.writer import write_shards
from multikd.errors import MissingExtraError
from multikd.export import weight_only
from multikd.export.calibration import CalibrationSet, calibration_set
from multikd.export.onnx import export_onnx, onnx_runner
from multikd.export.parity import synthetic_images
from multikd.export.quality import QualityError, QualityLimits, compare_features, halves
from multikd.export.quantize import before_weights, quantize_onnx
from multikd.export.standalone_quantized import load as load_plain
from multikd.export.standalone_quantized import pack_int4, unpack_int4
from multikd.export.timm_folder import TimmOptions
from multikd.export.weight_only import load_weight_only, quantize_weights
from multikd.students import StudentEncoder

FREE = QualityLimits(cosine_loss=2.0, agreement_loss=1.0)


@pytest.fixture(scope="module")
def data():
    """Two kinds of image that any encoder can tell apart, in turn."""
    images = synthetic_images((64, 64), 48)
    labels = torch.arange(48) % 2
    images[labels == 1] = 1 - images[labels == 1] ** 2
    return CalibrationSet((images * 255).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "resnet.onnx"
    export_onnx(deployed("ResNet"), path)
    return path


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_int8_is_small_near_and_scored(mode, resnet, data, tmp_path) -> None:
    spec = spec_of(deployed("ResNet").model)
    report = quantize_onnx(
        resnet, tmp_path / "q.onnx", mode=mode, data=data, spec=spec, limits=FREE
    )
    assert [path.name for path in tmp_path.iterdir()] == ["q.onnx"]
    assert report.settings["size_of_float"] < 0.35
    assert report.bytes == (tmp_path / "q.onnx").stat().st_size
    assert report.quality["cosine_mean"] > 0.98
    assert report.quality["cosine_mean"] < 1 - 1e-7  # it did quantise
    assert report.quality["queries"] == 24
    assert report.quality["knn_agreement"] > 0.8
    kinds = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert ("QuantizeLinear" if mode == "static" else "ConvInteger") in kinds
    with pytest.raises(ValueError, match="exists already"):
        quantize_onnx(resnet, tmp_path / "q.onnx", mode=mode, data=data, spec=spec)
    # The score is of the file that was written.
    again = onnx_runner(tmp_path / "q.onnx")(torch.zeros(2, 3, 64, 64))
    assert torch.isfinite(again).all()


def test_preprocessing_stays_float(data, tmp_path) -> None:
    encoder = deployed("ViT, class token", preprocessing=True)
    export_onnx(encoder, tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    early = set(before_weights(graph))
    by_name = {node.name: node for node in graph.node}
    assert sum(by_name[name].op_type == "MatMul" for name in early) == 2
    assert not any(by_name[name].op_type == "Conv" for name in early)
    report = quantize_onnx(
        tmp_path / "a.onnx",
        tmp_path / "q.onnx",
        mode="static",
        data=data,
        spec=encoder.spec,
        limits=FREE,
    )
    assert report.quality["cosine_mean"] > 0.98


def test_a_loss_beyond_the_limit_leaves_nothing(resnet, data, tmp_path) -> None:
    spec = spec_of(deployed("ResNet").model)
    with pytest.raises(QualityError, match=r"lose .* in cosine \(allowed 0\).*nothing") as info:
        quantize_onnx(
            resnet,
            tmp_path / "q.onnx",
            mode="dynamic",
            data=data,
            spec=spec,
            limits=QualityLimits(cosine_loss=0.0),
        )
    assert info.value.report.quality["cosine_mean"] < 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no ONNX file"):
        quantize_onnx(
            tmp_path / "no.onnx", tmp_path / "q.onnx", mode="static", data=data, spec=spec
        )
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not run"):
        quantize_onnx(
            tmp_path / "bad.onnx", tmp_path / "q.onnx", mode="static", data=data, spec=spec
        )


def test_compared_features_by_hand() -> None:
    bank = torch.eye(3).repeat(1, 1)
    queries = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.1]])
    labels = (torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
    same = compare_features((bank, queries), (2 * bank, 2 * queries), labels)
    assert same["cosine_mean"] == pytest.approx(1)
    assert (same["knn_agreement"], same["knn_float"], same["knn_quantized"]) == (1, 1, 1)
    swapped = torch.stack([queries[1], queries[1]])
    other = compare_features((bank, queries), (bank, swapped), labels)
    assert other["knn_agreement"] == 0.5
    assert other["knn_quantized"] == 0.5
    assert other["cosine_min"] < 0.3
    assert QualityLimits(1, 0.4).broken_by(other) == (
        "change 50.0 % of the k-NN answers (allowed 40 %)"
    )
    assert QualityLimits(1, 0.5).broken_by(other) is None
    unlabelled = compare_features((bank, queries), (bank, queries), (labels[0], labels[1] - 5))
    assert unlabelled["knn_agreement"] is None
    assert unlabelled["neighbour_overlap"] == 1
    assert QualityLimits().broken_by({**same, "cosine_mean": float("nan")}) is not None


def test_calibration_images_come_from_all_shards_once(tmp_path) -> None:
    from PIL import Image

    for label in range(4):
        (tmp_path / "in" / str(label)).mkdir(parents=True)
        for i in range(5):
            value = label * 60 + i
            Image.new("RGB", (40, 32), (value,) * 3).save(tmp_path / "in" / str(label) / f"{i}.png")
    write_shards(str(tmp_path / "in"), str(tmp_path / "out"), samples_per_shard=6, workers=1)
    everything = calibration_set(str(tmp_path / "out"), (32, 32), limit=100)
    assert sorted(everything.images[:, 0, 0, 0].tolist()) == sorted(
        label * 60 + i for label in range(4) for i in range(5)
    )
    assert everything.labels.bincount().tolist() == [5, 5, 5, 5]
    some = calibration_set(str(tmp_path / "out"), (32, 32), limit=7)
    assert torch.equal(some.images, everything.images[:7])
    first, second = halves(some)
    assert (len(first), len(second)) == (3, 4)
    with pytest.raises(ValueError, match="square"):
        calibration_set(str(tmp_path / "out"), (32, 16))
    with pytest.raises(ValueError, match="must be uint8"):
        CalibrationSet(torch.zeros(4, 3, 8, 8), torch.zeros(4))


def test_int4_packing_is_exact() -> None:
    values = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 6)
    assert torch.equal(unpack_int4(packed), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_equals_rounding_the_weights_by_hand(bits, data, tmp_path) -> None:
    student = StudentEncoder("test_vit4", image_size=64).eval()
    report = quantize_weights(
        student, tmp_path / "q.safetensors", bits=bits, data=data, limits=FREE
    )
    assert report.settings["share"] > 0.8
    assert report.settings["size_of_float"] < (0.36 if bits == 8 else 0.26)
    loaded = load_weight_only(tmp_path / "q.safetensors")
    expected = student.export_model()
    for name, module in expected.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            rows = weight if bits == 8 else weight.view(-1, 32)
            scale = rows.abs().amax(1, keepdim=True) / (127.5 if bits == 8 else 7.5)
            received = loaded.get_parameter(f"{name}.weight").dequantize()
            steps = received.view_as(rows) / scale
            # Whole numbers of steps, none further than half a step from the weight.
            assert float((steps - steps.round()).abs().max()) < 1e-3, name
            assert float((steps - rows / scale).abs().max()) < 0.5 + 1e-3, name
            assert float((steps - rows / scale).abs().max()) > 0.3
            module.weight.data = received
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), expected(images), atol=1e-4)
        # Without torchao the same values, as ordinary weights.
        plain = load_plain(tmp_path / "q.safetensors", dequantize=True)
        assert type(plain.blocks[0].mlp.fc1.weight) is torch.nn.Parameter
        assert torch.equal(
            plain.blocks[0].mlp.fc1.weight, loaded.blocks[0].mlp.fc1.weight.dequantize()
        )
        assert torch.allclose(loaded(images), plain(images), atol=1e-5)


def test_weight_only_keeps_what_was_asked_for(data, tmp_path) -> None:
    student = StudentEncoder("test_vit", image_size=64, num_classes=3).eval()
    quantize_weights(
        student,
        tmp_path / "c.safetensors",
        bits=8,
        data=data,
        options=TimmOptions(classifier=True, final_norm=False),
        limits=FREE,
    )
    loaded = load_weight_only(tmp_path / "c.safetensors")
    assert loaded(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert isinstance(loaded.norm, torch.nn.Identity)
    assert loaded.pretrained_cfg["input_size"] == [3, 64, 64]


def test_weight_only_refusals(data, tmp_path, monkeypatch) -> None:
    resnet = StudentEncoder("test_resnet", image_size=64)
    with pytest.raises(ValueError, match="no linear layer.*onnx-int8-static"):
        quantize_weights(resnet, tmp_path / "q", bits=8, data=data)
    (tmp_path / "other").write_bytes(b"12345678 nothing")
    with pytest.raises(ValueError, match="no weight-only quantised student"):
        load_weight_only(tmp_path / "other")
    monkeypatch.setattr(weight_only, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"multikd\[quantize\]"):
        quantize_weights(resnet, tmp_path / "q", bits=8, data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
