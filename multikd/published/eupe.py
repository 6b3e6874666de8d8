"""EUPE: ViTs in DINOv3's layout, which timm's own converter knows.

Read in facebookresearch/EUPE (``eupe/hub/backbones.py``, ``eupe/models/vision_transformer.py``,
``eupe/layers/``): the file is a bare state dict; four ``storage_tokens``; rotary positions of base
100 over coordinates in (−1, 1), no table; LayerScale; LayerNorm's epsilon is 1e-5
(``layernormbf16``); ``attn.qkv.bias_mask`` takes the key's bias out; every head is 64 wide; mean
and std are ImageNet's. The random rescaling of coordinates is of training alone. Its ConvNeXts are
not read here.
"""

from __future__ import annotations

import torch

from multikd.published.released import Released, other_layout
from multikd.published.vit import Asked, ImportedVit, needs, no_summary

HEAD_WIDTH = 64
_BASE = 100.0
_NAMES = {
    192: "vit_tiny_patch16_dinov3_qkvb",
    384: "vit_small_patch16_dinov3_qkvb",
    768: "vit_base_patch16_dinov3_qkvb",
}


def convert(released: Released, asked: Asked) -> ImportedVit:
    """The encoder of a EUPE file.

    Raises:
        ValueError: the file has another layout.
    """
    no_summary(asked, released.path)
    tensors = dict(released.tensors)
    anchors = ("patch_embed.proj.weight", "cls_token", "storage_tokens", "blocks.0.ls1.gamma")
    if not needs(tensors, *anchors, "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight"):
        raise other_layout(released, "eupe")
    width, patch = tensors["patch_embed.proj.weight"].shape[0::3]
    heads = asked.num_heads or max(width // HEAD_WIDTH, 1)
    if width % heads or (width // heads) % 4:
        raise ValueError(
            f"{released.path}: heads must divide the width of {width} into multiples of 4, "
            f"received {heads}: give another --num-heads"
        )
    _check_rotation(released, width // heads)
    _check_keys(released, width)
    size = asked.image_size or 256
    if size % patch:
        raise ValueError(
            f"--image-size must be a multiple of the patch of {patch}, received {size}"
        )
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    return ImportedVit(
        name=_NAMES.get(int(width), _NAMES[768]),
        image_size=size,
        patch_size=int(patch),
        model_args={
            "embed_dim": int(width),
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
            "num_reg_tokens": int(tensors["storage_tokens"].shape[1]),
        },
        # timm's converter wants the plain state dict.
        tensors={key: value.float() for key, value in tensors.items()},
        notes=("Positions are rotary, so that any image size is as published.",),
    )


def _check_rotation(released: Released, head_width: int) -> None:
    periods = released.tensors.get("rope_embed.periods")
    if periods is None:
        return
    count = head_width // 4
    wanted = _BASE ** (2 * torch.arange(count, dtype=torch.float64) / (head_width // 2))
    # In files of bfloat16 they are rounded to 8 bits.
    if periods.shape != (count,) or not torch.allclose(periods.double(), wanted, rtol=1e-2):
        raise ValueError(
            f"{released.path}: rotary periods of base {_BASE:.0f} for heads {head_width} wide were "
            "expected, found others: give --num-heads, or this release is of another kind"
        )


def _check_keys(released: Released, width: int) -> None:
    """timm's attention has no bias of the keys: it must be masked, or zero."""
    for key, bias in released.tensors.items():
        if not key.endswith("attn.qkv.bias"):
            continue
        mask = released.tensors.get(f"{key}_mask")
        keys = bias[width : 2 * width]
        if mask is not None:
            if bool((mask[:width] != 1).any() or (mask[2 * width :] != 1).any()):
                raise other_layout(released, "eupe")
            keys = keys * mask[width : 2 * width]
        if bool(keys.any()):
            raise ValueError(
                f"{released.path}: the keys' bias was expected to be masked, found one in {key}: "
                "this release is of another kind"
            )
