"""A ViT under timm's names: what a released file becomes before timm builds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from multikd.published.publishers import IMAGENET_MEAN, IMAGENET_STD, Triple

# timm's names by (width, depth); any other size is built from ViT-B's with arguments.
_NAMES = {
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
}
_SWIGLU = "vit_giant_patch14_reg4_dinov2"  # timm's one whose blocks are gated


@dataclass(frozen=True)
class Asked:
    """What the user says of a file; None takes what the file says.

    Attributes:
        image_size: side in pixels.
        num_heads: of the attention.
        summary: the teacher whose class token is the summary (RADIO).
    """

    image_size: int | None = None
    num_heads: int | None = None
    summary: str | None = None

    def __post_init__(self) -> None:
        """Sizes are counts.

        Raises:
            ValueError: one is below 1.
        """
        for option, value in (("image-size", self.image_size), ("num-heads", self.num_heads)):
            if value is not None and value < 1:
                raise ValueError(f"--{option} must be 1 or more, received {value}")


@dataclass(frozen=True)
class ImportedVit:
    """An encoder to build with timm.

    Attributes:
        name: timm's architecture.
        image_size: side in pixels that its positions are for.
        patch_size: side in pixels.
        model_args: further arguments of timm's constructor.
        tensors: float32, under timm's names.
        mean: of the input.
        std: of the input.
        crop_pct: share of the resized image that the publisher's evaluation keeps.
        global_pool: what the summary is.
        notes: what a reader should know of the conversion.
    """

    name: str
    image_size: int
    patch_size: int
    model_args: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    crop_pct: float = 1.0
    global_pool: str = "token"
    notes: tuple[str, ...] = ()


def plain_vit(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int,
    path: Path,
    embedded_class: bool,
    final_norm: bool = True,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    crop_pct: float = 1.0,
    notes: tuple[str, ...] = (),
) -> ImportedVit:
    """Tensors under the names of timm's ``VisionTransformer`` → what timm needs to build it.

    Every size is measured from the tensors.

    Args:
        tensors: ``pos_embed (1, N or 1 + N, D)`` over a square grid of N patches.
        num_heads: no tensor shows them.
        path: the file, for messages.
        embedded_class: whether ``pos_embed`` starts with the class token's.
        final_norm: whether there is a norm behind the last block.
        mean: of the input.
        std: of the input.
        crop_pct: see ``ImportedVit``.
        notes: see ``ImportedVit``.

    Raises:
        ValueError: a grid that is not square, or heads that do not divide the width.
    """
    width, patch = tensors["patch_embed.proj.weight"].shape[0::3]
    positions = tensors["pos_embed"].shape[1] - int(embedded_class)
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise ValueError(
            f"{path}: a square grid of position embeddings was expected, received {positions} of "
            "them: this release is of another kind"
        )
    if width % num_heads:
        raise ValueError(
            f"{path}: {num_heads} heads do not divide the width of {width}: give --num-heads"
        )
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    hidden = tensors["blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"].shape[0]
    has_class, registers = "cls_token" in tensors, tensors.get("reg_token")
    arguments: dict[str, Any] = {
        "embed_dim": int(width),
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": _ratio(int(hidden), int(width)),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "class_token": has_class,
        "no_embed_class": not embedded_class,
        "reg_tokens": 0 if registers is None else int(registers.shape[1]),
        "final_norm": final_norm,
        "fc_norm": False,  # patches are normed, whatever is pooled
    }
    names = {"w12": "fc1", "w3": "fc2"}
    renamed = {
        ".".join(names.get(part, part) for part in key.split(".")): value.float()
        for key, value in tensors.items()
    }
    return ImportedVit(
        name=_SWIGLU if swiglu else _NAMES.get((int(width), depth), "vit_base_patch16_224"),
        image_size=grid * int(patch),
        patch_size=int(patch),
        model_args=arguments,
        tensors=renamed,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        global_pool="token" if has_class else "avg",
        notes=notes,
    )


def _ratio(hidden: int, width: int) -> float:
    """An ``mlp_ratio`` of which timm's ``int(width * ratio)`` is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def needs(tensors: Mapping[str, Tensor], *names: str) -> bool:
    """Whether all of these are there, with as many dimensions as they must have."""
    dimensions = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3}
    return all(
        name in tensors and tensors[name].ndim == dimensions.get(name, tensors[name].ndim)
        for name in names
    )


def no_image_size(asked: Asked, path: Path) -> None:
    """Refuse another size for a file whose positions are of one size."""
    if asked.image_size is not None:
        raise ValueError(
            f"{path} has positions for one image size, so --image-size does not apply (it is "
            "RADIO's and EUPE's): leave it out, timm resamples them for other images"
        )


def no_summary(asked: Asked, path: Path) -> None:
    """Refuse a choice of class token where there is one."""
    if asked.summary is not None:
        raise ValueError(
            f"{path} has one class token at most, so --summary does not apply (it is RADIO's): "
            "leave it out"
        )
