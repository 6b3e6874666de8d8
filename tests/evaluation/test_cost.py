import json
import time

import numpy as np
import pytest
import timm
import torch
from torch import nn

from multikd.evaluation.cost import count_macs, measure_cost, time_passes
from multikd.evaluation.deployed_cost import measure_deployed, measure_onnx
from multikd.evaluation.memory import PeakMemory


def test_multiply_adds_equal_a_count_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )
    by_hand = 8 * 3 * 9 * 8 * 8 + 8 * 64 * 10
    assert count_macs(network, torch.rand(1, 3, 16, 16)) == by_hand
    assert count_macs(network, torch.rand(4, 3, 16, 16)) == 4 * by_hand
    assert count_macs(nn.Flatten(), torch.rand(1, 3, 4, 4)) is None


def test_attention_is_counted():
    width, depth, tokens, patch = 64, 2, 17, 8
    network = timm.create_model(
        "vit_tiny_patch16_224",
        patch_size=patch,
        img_size=32,
        embed_dim=width,
        depth=depth,
        num_heads=4,
        num_classes=0,
    ).eval()
    embed = 16 * width * 3 * patch * patch
    block = tokens * (width * 3 * width + width * width + 2 * width * 4 * width)
    attention = 2 * tokens * tokens * width
    got = count_macs(network, torch.rand(1, 3, 32, 32))
    assert got == embed + depth * (block + attention)


def test_the_cost_of_an_encoder():
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)).eval()
    cost = measure_cost(network, (24, 20), batches=(1, 4))
    assert cost.parameters == 16 * 27 + 16 + 32
    assert cost.macs == 16 * 27 * 24 * 20
    assert cost.latency[4].passes == 20
    assert 0 < cost.latency[1].p50 <= cost.latency[1].p95
    found = json.loads(json.dumps(cost.to_json()))
    assert set(found["latency_ms"]) == {"1", "4"}
    assert found["images_per_second"]["4"] == pytest.approx(4000 / cost.latency[4].mean)


def test_peak_memory_sees_what_a_pass_holds():
    class Holds(nn.Module):
        def __init__(self, megabytes):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(250_000))  # 1 MB
            self.numbers = megabytes * 250_000

        def forward(self, images):
            return torch.ones(self.numbers).sum() + images.sum() * self.weight[0]

    little, much = (
        measure_cost(Holds(mb), (8, 8), batches=(1,), repeats=1).peak_memory_mb for mb in (1, 80)
    )
    if little is None:
        pytest.skip("this system tells no peak of the resident set")
    assert much == pytest.approx(81, abs=8)
    assert little < 20
    # What was freed before does not hide it.
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(10_000_000).sum()
    assert memory.megabytes(0) == pytest.approx(40, abs=8)


def test_quantiles_are_of_the_passes_and_the_first_ones_warm_up():
    calls = []

    def run():
        calls.append(len(calls))
        # 3 to warm up, then 9 short ones and one long.
        time.sleep(0.2 if len(calls) in (1, 13) else 0.002)

    latency = time_passes(run, 10)
    assert len(calls) == 13
    assert latency.passes == 10
    assert latency.p50 < 50 < latency.p95
    assert latency.mean > 20
    calls.clear()
    assert time_passes(run, 10, seconds=0).passes == 3


def test_deployed_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper

    def graph(path, dtype, batch):
        weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
        nodes = [
            helper.make_node("Cast", ["images"], ["x"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w"], ["features"]),
        ]
        made = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", dtype, [batch, 3, "h", "w"])],
            [helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, path)

    graph(tmp_path / "model.onnx", onnx.TensorProto.FLOAT, "batch")
    graph(tmp_path / "model.int8-static.onnx", onnx.TensorProto.UINT8, 1)
    costs = {c.format: c for c in measure_deployed(tmp_path, (16, 12), batches=(1, 4), repeats=3)}
    assert set(costs) == {"onnx", "onnx-int8-static"}
    assert set(costs["onnx"].latency) == {1, 4}
    assert set(costs["onnx-int8-static"].latency) == {1}  # its batch is fixed
    found = costs["onnx"].to_json()
    assert found["file_mb"] == (tmp_path / "model.onnx").stat().st_size / 1e6
    assert found["image_size"] == [16, 12]
    made = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 5])],
    )
    other = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(other, tmp_path / "text.onnx")
    with pytest.raises(ValueError, match="give a graph of an encoder"):
        measure_onnx(tmp_path / "text.onnx", (16, 16))


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="batch sizes and repeats of at least 1"):
        measure_cost(nn.Flatten(), (8, 8), batches=())
