"""UNIC and DUNE: ViTs in DINOv2's layout, with their blocks in one chunk.

Read in naver/unic (``dinov2/models/vision_transformer.py``, ``main_unic.py``,
``modeling/unic.py``) and naver/dune (``model/encoder/vision_transformer.py``, ``model/options.py``,
``main_dune.py``):

- the file is ``{"model", "optimizer", "epoch" or "iter", "args", …}``, ``args`` a Namespace with
  ``arch``, ``patch_size`` and ``image_size`` (UNIC) or ``enc_args`` and ``image_size`` (DUNE), and
  learning-rate schedules as NumPy arrays;
- ``model`` holds ``module.encoder.…`` and the projectors (``lp.…``, ``projectors.…``,
  ``teacher_norms.…``), which are left out;
- ``blocks.0.N.…``: all blocks are one chunk; ``attn.qkv`` is query, key, value one after another;
  LayerScale as ``ls1.gamma`` where there is one (DUNE); every head is 64 wide;
- ``pos_embed (1, 1 + N, D)`` starts with the class token's; ``register_tokens`` (DUNE) are put
  behind the class token and have no position;
- LayerNorm's epsilon is 1e-6; ``norm`` behind the last block is used by both encoders' own
  forward, and trained by neither (it is at its start);
- mean and std are ImageNet's, evaluation resizes to the image size and crops the centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multikd.published.publishers import Kind
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
# Other options of the published ViT, which none of its released files was made with.
_NORMS = ("norm1", "norm2")


def convert(released: Released, kind: Kind, asked: Asked) -> ImportedVit:
    """The encoder of a UNIC or DUNE file.

    Raises:
        ValueError: the file has another layout.
    """
    no_image_size(asked, released.path)
    no_summary(asked, released.path)
    encoder = released.starting("encoder.")
    registers = encoder.pop("register_tokens", None)
    encoder.pop("mask_token", None)
    if not needs(encoder, "patch_embed.proj.weight", "pos_embed", "cls_token"):
        raise other_layout(released, kind)
    if (kind == "dune") != (registers is not None or "enc_args" in released.arguments):
        raise other_layout(released, kind)
    tensors: dict[str, Tensor] = {}
    for key, value in encoder.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            if parts[1] != "0" or not parts[2:3] or not parts[2].isdigit():
                raise other_layout(released, kind)
            del parts[1]
        tensors[".".join(parts)] = value
    if not needs(tensors, "blocks.0.attn.qkv.weight"):
        raise other_layout(released, kind)
    _add_norms(tensors)
    if registers is not None:
        # Nothing but the position differs between prefix tokens, and only the class token has one.
        positions = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
        tensors["reg_token"] = registers
    width = tensors["cls_token"].shape[-1]
    return plain_vit(
        tensors,
        num_heads=asked.num_heads or max(width // HEAD_WIDTH, 1),
        path=released.path,
        embedded_class=registers is None,
        notes=(
            "The final norm is as published: no loss reached it, so that it normalises without "
            "learned weights.",
            "The teachers' projectors are left out.",
        ),
    )


def _add_norms(tensors: dict[str, Tensor]) -> None:
    """Norms without weights (DUNE's ``ln_affine: False``) get those that change nothing."""
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    width = tensors["cls_token"].shape[-1]
    for name in ("norm", *(f"blocks.{i}.{norm}" for i in range(depth) for norm in _NORMS)):
        tensors.setdefault(f"{name}.weight", torch.ones(width))
        tensors.setdefault(f"{name}.bias", torch.zeros(width))
