"""A student with int8 or int4 weights, read in plain PyTorch, timm and torchao.

This file is complete: it imports torch, timm, safetensors and (unless told otherwise) torchao, and
works on a ``.safetensors`` file that ``multikd export --quantize int8,int4`` wrote. multikd itself
reads such files with the same code. Nothing is unpickled.

    import student_quantized
    model = student_quantized.load("model.int8.safetensors")   # takes what the timm model takes
    model = student_quantized.load("model.int8.safetensors", dequantize=True)   # without torchao

The file holds, for each quantised weight ``NAME (N, K)``: ``NAME.qdata``, the integers (int8, or
two int4 a byte, the even column in the low half), and ``NAME.scale``, one for each block of the
size that the metadata names; the weight is ``qdata · scale``. All else is float32 under timm's
names.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

FORMAT = "multikd-weight-only-1"


def load(path: str | Path, dequantize: bool = False) -> nn.Module:
    """The timm model of a quantised file, in eval mode.

    Args:
        path: the file.
        dequantize: float weights of the same values, as an ordinary module: needs no torchao,
            and four times the memory or more.

    Raises:
        ValueError: not such a file, or one that this timm does not fit.
        ImportError: torchao is not installed.
    """
    about, tensors = _read(Path(path))
    config, bits = about["config"], about["bits"]
    model: nn.Module = timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=config["num_classes"],
        **config.get("model_args", {}),
    )
    model.pretrained_cfg = model.default_cfg = config["pretrained_cfg"]
    for name, block_size in about["weights"].items():
        qdata, scale = tensors.pop(f"{name}.qdata"), tensors.pop(f"{name}.scale")
        if bits == 4:
            qdata = unpack_int4(qdata)
        if dequantize:
            tensors[name] = dequantized(qdata, scale)
            continue
        weight = _integer_weight(qdata, scale, bits, tuple(block_size))
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    integers = set() if dequantize else set(about["weights"])
    if unexpected or set(missing) - integers:
        raise ValueError(
            f"{path} does not fit timm {timm.__version__}'s {config['architecture']}: "
            f"{len(missing)} weights missing, {len(unexpected)} unknown"
        )
    return model.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["multikd"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{path} is no weight-only quantised student ({reason}): give a file that "
            "`multikd export` wrote in the format torchao-int8 or torchao-int4"
        ) from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {about.get('format')!r}, expected {FORMAT!r}")
    return about, tensors


def _integer_weight(qdata: Tensor, scale: Tensor, bits: int, block_size: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, of its internals
        from torchao.quantization import IntxUnpackedToInt8Tensor
    weight: Tensor = IntxUnpackedToInt8Tensor(
        qdata=qdata,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=torch.int8 if bits == 8 else torch.int4,  # type: ignore[attr-defined]
        block_size=block_size,
        dtype=torch.float32,
        activation_quantization=None,
    )
    return weight


def dequantized(qdata: Tensor, scale: Tensor) -> Tensor:
    """Integers ``(N, K)`` with a scale a row or a group of columns ``(N, G)`` → float32 weight."""
    rows = scale.reshape(len(qdata), -1)
    groups = qdata.float().reshape(len(qdata), rows.shape[1], -1)
    return (groups * rows.unsqueeze(2)).reshape(qdata.shape)


def pack_int4(values: Tensor) -> Tensor:
    """int8 ``(N, K)`` in −8 … 7, K even → uint8 ``(N, K/2)``; the even column is the low half."""
    nibbles = (values.to(torch.int16) & 0xF).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
