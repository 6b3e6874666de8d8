"""A pruned student, in plain PyTorch and timm.

This file is complete: it imports torch, timm and safetensors alone, and works on a folder that
``multikd export --prune`` wrote, where it lies as ``student_pruned.py``. timm cannot build such a
model from its arguments, since single layers are narrower: it builds the whole one, and the weights
say what is left of it. Nothing is unpickled.

    import student_pruned
    model = student_pruned.load()   # the folder of this file; a timm model like any other
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load(folder: str | Path | None = None) -> nn.Module:
    """The pruned timm model of a folder (default: the one that holds this file), in eval mode.

    Raises:
        ValueError: not such a folder, or weights that are no pruned form of its architecture.
    """
    place = Path(__file__).parent if folder is None else Path(folder)
    config, weights = read(place)
    model: nn.Module = timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=config["num_classes"],
        **config.get("model_args", {}),
    )
    model.pretrained_cfg = model.default_cfg = config["pretrained_cfg"]
    shrink(model, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{place} is no pruned {config['architecture']}: {error}") from error
    return model.eval()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and weights of a folder with a pruned student.

    Raises:
        ValueError: not such a folder.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        pruned = isinstance(config, dict) and bool(config.get("pruned"))
        weights = load_file(folder / WEIGHTS) if pruned else {}
    except Exception as error:  # safetensors has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{folder} is no pruned student ({reason}): give a folder that "
            "`multikd export --prune` wrote"
        ) from error
    if not pruned:
        raise ValueError(
            f"{folder} is no pruned student (its config.json does not say so): give a folder that "
            "`multikd export --prune` wrote"
        )
    return config, weights


def shrink(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the layers of a model the shapes of these weights, in place; values are left open.

    Names that the model does not have are passed over: loading the weights says so.
    """
    for name, tensor in weights.items():
        place, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        own = getattr(module, leaf, None)
        if not isinstance(own, Tensor) or own.shape == tensor.shape:
            continue
        empty = torch.zeros(tensor.shape, dtype=own.dtype, device=own.device)
        if isinstance(own, nn.Parameter):
            setattr(module, leaf, nn.Parameter(empty, requires_grad=own.requires_grad))
        else:
            setattr(module, leaf, empty)
        _measure(module, own)


def _measure(module: nn.Module, before: Tensor) -> None:
    """Bring the sizes that a layer knows in line with its tensors."""
    size = getattr(module, "weight", before).shape
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = size[0]
        module.out_channels, module.in_channels = size[0], size[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = size[0], size[1]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = size[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(size)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = size[0]
