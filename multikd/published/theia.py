"""Theia: a DeiT in transformers' layout.

Read in bdaiinstitute/theia (``src/theia/models/rvfm.py``, ``src/theia/models/backbones.py``); the
names below ``backbone.model.`` are those of transformers' ``ViTModel``:

- ``embeddings.cls_token``, ``embeddings.position_embeddings (1, 1 + N, D)``, the class token's
  first; without a class token (``nocls``) that first position stays unused;
- ``embeddings.reg_token`` and ``embeddings.reg_pos_embed`` (``reg``): behind the patches, each with
  a position of its own; attention does not care where a token stands;
- query, key and value are layers of their own, in that order in timm's ``qkv``;
- ``layernorm`` is behind the last block; the pooler is replaced by nothing;
- the released file is a whole model: ``translator.…`` is left out.

From memory: every head is 64 wide (DeiT-T, -S, -B), LayerNorm's epsilon is 1e-12 in DeiT's config
(timm's is 1e-6, which moves features of unit variance by 5e-7 of themselves), and DeiT's processor
resizes to 256 pixels, crops 224 and takes ImageNet's mean and std.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multikd.published.released import Released, other_layout
from multikd.published.vit import (
    Asked,
    ImportedVit,
    needs,
    no_image_size,
    no_summary,
    plain_vit,
)

HEAD_WIDTH = 64
_ANCHOR = "embeddings.patch_embeddings.projection.weight"
# Layer of a block → timm's name.
_LAYERS = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}


def convert(released: Released, asked: Asked) -> ImportedVit:
    """The backbone of a Theia file.

    Raises:
        ValueError: the file has another layout.
    """
    no_image_size(asked, released.path)
    no_summary(asked, released.path)
    prefix = next((k[: -len(_ANCHOR)] for k in released.tensors if k.endswith(_ANCHOR)), None)
    if prefix is None:
        raise other_layout(released, "theia")
    found = released.starting(prefix)
    for unused in ("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"):
        found.pop(unused, None)
    try:
        tensors = _renamed(found)
    except KeyError as error:
        raise other_layout(released, "theia") from error
    if found:
        raise ValueError(
            f"{released.path} is no file of bdaiinstitute/theia: {next(iter(found))!r} has no "
            "place in its backbone"
        )
    notes = ("The translators are left out.", "LayerNorm's epsilon is timm's 1e-6 (DeiT: 1e-12).")
    if not needs(tensors, "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
        raise other_layout(released, "theia")
    width = tensors["pos_embed"].shape[-1]
    return plain_vit(
        tensors,
        num_heads=asked.num_heads or max(width // HEAD_WIDTH, 1),
        path=released.path,
        embedded_class="cls_token" in tensors and "reg_token" not in tensors,
        crop_pct=0.875,
        notes=notes,
    )


def _renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names; what was taken is removed from ``found``.

    Raises:
        KeyError: one is missing.
    """
    tensors: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        tensors[f"patch_embed.proj.{kind}"] = found.pop(
            f"embeddings.patch_embeddings.projection.{kind}"
        )
        tensors[f"norm.{kind}"] = found.pop(f"layernorm.{kind}")
    positions = found.pop("embeddings.position_embeddings")
    class_token = found.pop("embeddings.cls_token", None)
    registers = found.pop("embeddings.reg_token", None)
    if class_token is None:
        positions = positions[:, 1:]
    elif registers is None:
        tensors["cls_token"] = class_token
    else:
        tensors["cls_token"] = class_token + positions[:, :1]
        tensors["reg_token"] = registers + found.pop("embeddings.reg_pos_embed")
        positions = positions[:, 1:]
    tensors["pos_embed"] = positions
    blocks = sorted({int(k.split(".")[2]) for k in found if k.startswith("encoder.layer.")})
    for block in blocks:
        layer = f"encoder.layer.{block}."
        for kind in ("weight", "bias"):
            parts = [f"{layer}attention.attention.{p}.{kind}" for p in ("query", "key", "value")]
            if kind == "weight" or parts[0] in found:
                joined = torch.cat([found.pop(part) for part in parts])
                tensors[f"blocks.{block}.attn.qkv.{kind}"] = joined
            for theirs, ours in _LAYERS.items():
                tensors[f"blocks.{block}.{ours}.{kind}"] = found.pop(f"{layer}{theirs}.{kind}")
    return tensors
