"""Shapes and reach of a model, found by a run without data.

A copy on the meta device costs no memory and a few hundredths of a second, whatever the size of
the model; the few models that need real numbers are run as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from multikd.backbones.normalize import rgb
from multikd.types import EncoderSpec, Grid, TokenFeatures

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


def meta_copy(module: M) -> M:
    """A deep copy whose parameters and buffers are on the meta device (no data is copied)."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    memo.update({id(b): torch.empty_like(b, device="meta") for b in module.buffers()})
    return copy.deepcopy(module, memo)


def dry_run(
    module: M, image_size: Grid, run: Callable[[M, Tensor], R], name: str, batch: int = 1
) -> R:
    """``run(module, images)`` in eval mode on images that do not exist.

    Raises:
        ValueError: the model cannot take images of this size.
    """
    shape = (batch, 3, *image_size)
    try:
        with torch.no_grad():
            return run(meta_copy(module).eval(), torch.empty(shape, device="meta"))
    except Exception as error:
        first: Exception = error
    place = next((p.device for p in module.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in module.modules()]
    try:
        if place.type == "meta":
            raise first
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return run(module.eval(), torch.zeros(shape, device=place))
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{name} cannot take images of {image_size[0]}×{image_size[1]} px ({reason}): "
            "give image_size (a multiple of its patch) or another model"
        ) from error
    finally:
        for child, mode in modes:
            child.training = mode


def reached_parameters(
    module: M, image_size: Grid, run: Callable[[M, Tensor], Iterable[Tensor]]
) -> set[str]:
    """Names of the parameters that the outputs of ``run`` depend on, by a probing backward.

    The probe is in train mode on a copy (meta where possible), so neither weights nor running
    statistics nor random state change.
    """

    def probe(copied: M, device: str) -> set[str]:
        for child in copied.modules():
            if hasattr(child, "grad_checkpointing"):
                child.grad_checkpointing = False  # type: ignore[assignment]
        for parameter in copied.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = run(copied.train(), torch.zeros(2, 3, *image_size, device=device))
            total = torch.stack([output.float().sum() for output in outputs]).sum()
            total.backward()  # type: ignore[no-untyped-call]
        return {name for name, p in copied.named_parameters() if p.grad is not None}

    try:
        return probe(meta_copy(module), "meta")
    except Exception:
        if any(p.is_meta for p in module.parameters()):
            raise
        return probe(copy.deepcopy(module).cpu().float(), "cpu")


def freeze_unread(
    module: M, image_size: Grid, outputs: Callable[[M, Tensor], Iterable[Tensor]]
) -> list[str]:
    """Freeze the parameters that ``outputs`` do not depend on, and give their names.

    So that every parameter that is trained gets a gradient, which DDP waits for.
    """
    reached = reached_parameters(module, image_size, outputs)
    frozen = [n for n, p in module.named_parameters() if p.requires_grad and n not in reached]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return frozen


def spec_from_model(
    model: nn.Module,
    features: TokenFeatures,
    image_size: Grid,
    *,
    name: str,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    licence: str | None = None,
    source: str = "",
) -> EncoderSpec:
    """What timm's ``pretrained_cfg`` says, with the shapes that a dry run gave."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    embed = getattr(model, "patch_embed", None)
    strict = bool(getattr(embed, "strict_img_size", False))
    stride = max(1, round(image_size[0] / features.grid[0])) if features.grid else image_size[0]
    return EncoderSpec(
        name=name,
        widths=features.widths,
        image_size=image_size,
        patch_size=stride,
        mean=rgb(mean or config.get("mean") or (0.485, 0.456, 0.406), "mean"),
        std=rgb(std or config.get("std") or (0.229, 0.224, 0.225), "std"),
        interpolation=str(config.get("interpolation") or "bicubic"),
        fixed_size=strict or (embed is None and bool(config.get("fixed_input_size", False))),
        num_prefix_tokens=int(getattr(model, "num_prefix_tokens", 0) or 0),
        num_classes=0 if features.logits is None else features.logits.shape[-1],
        licence=licence or config.get("license") or "unknown",
        source=source,
    )


def native_size(model: nn.Module) -> Grid:
    """The image size that a timm model was trained at (or was built for)."""
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, (tuple, list)) and len(built) == 2:
        return (int(built[0]), int(built[1]))
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size") or (3, 224, 224)
    return (int(size[-2]), int(size[-1]))
