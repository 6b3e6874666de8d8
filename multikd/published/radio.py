"""RADIO: a ViT with a class token for each teacher and positions for its largest image.

Read in NVlabs/RADIO (``hubconf.py``, ``radio/radio_model.py``, ``radio/vit_patch_generator.py``,
``radio/cls_token.py``, ``radio/enable_cpe_support.py``, ``radio/extra_timm_models.py``):

- the file is ``{"state_dict" or "state_dict_ema", "args", …}``, ``args`` a Namespace with
  ``model`` (timm's name, or one of theirs), ``model_kwargs``, ``teachers`` (a list of dicts with
  ``name``, ``use_summary``, ``token_slot``), ``cls_token_per_teacher``, ``model_norm``;
- ``base_model.patch_generator.embedder.weight (D, 3·p·p)`` is a linear layer over patches in the
  order channel, row, column; mostly without bias;
- ``base_model.patch_generator.cls_token.token (C + R, D)``: a class token for each teacher, then
  registers; none has a position. A teacher's is the one in its ``token_slot``, else in its place
  in the list; the published summary is those of all teachers with ``use_summary``, side by side;
- ``base_model.patch_generator.pos_embed`` is over the grid of the largest image; for a smaller one
  it is resampled as a whole, bilinearly, without antialiasing;
- there is no norm behind the last block unless ``model_norm``; LayerScale may be called
  ``grandma``; ``_heads.…`` and ``_feature_projections.…`` are the teachers' and are left out;
- on the hub (``radio/hf_model.py``, ``hf_hub.py``) it is ``model.safetensors`` with
  ``radio_model.model.…`` and ``radio_model.input_conditioner.…``, and ``args`` in ``config.json``;
- ``input_conditioner.norm_mean`` and ``norm_std`` are for images in [0, 1].

A timm ViT has one table of positions: it is resampled here for one image size. In timm every other
prefix token is a register, so that the chosen teacher's class token comes first, and the others
after it in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from multikd.errors import unknown_name
from multikd.published.publishers import CLIP_MEAN, CLIP_STD, Triple
from multikd.published.released import Released, other_layout
from multikd.published.vit import Asked, ImportedVit, needs, plain_vit

IMAGE_SIZE = 512
"""C-RADIOv3's and v4's preferred resolution (``radio/common.py``); v2.5 prefers 768, v2 432."""

# Heads by architecture: `extra_timm_models.py`, and timm's own of these names.
_HEADS = (
    *(("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12), ("vit_large", 16)),
    *(("vit_so400m", 16), ("vit_huge", 16), ("vit_bigG", 16), ("vit_giant", 24)),
    *(("dinov2_vits", 6), ("dinov2_vitb", 12), ("dinov2_vitl", 16), ("dinov2_vitg", 24)),
)
_NORMALISED = ("_feature_normalizer.", "radio_model.feature_normalizer.")
# Arguments of the model that shape it and are seen from the tensors, or that shape nothing.
_KNOWN_ARGUMENTS = frozenset(
    {
        *("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "img_size", "weight_init"),
        *("init_values", "qkv_bias", "reg_tokens", "no_embed_class", "class_token", "drop_path"),
        *("drop_path_rate", "dynamic_img_size", "global_pool", "num_classes", "pretrained"),
    }
)


def convert(released: Released, asked: Asked) -> ImportedVit:
    """The encoder of a RADIO file.

    Raises:
        ValueError: the file has another layout, or the size or teacher asked for does not fit.
    """
    found = _base_model(released)
    generator = {k: found.pop(k) for k in list(found) if k.startswith("patch_generator.")}
    embedder = generator.get("patch_generator.embedder.weight")
    table = generator.get("patch_generator.pos_embed")
    tokens = generator.get("patch_generator.cls_token.token")
    if (
        embedder is None
        or table is None
        or tokens is None
        or not needs(found, "blocks.0.attn.qkv.weight")
    ):
        raise other_layout(released, "radio")
    patch = math.isqrt(embedder.shape[1] // 3)
    normed = any(key.startswith("patch_generator.patch_normalizer.") for key in generator)
    if patch < 1 or 3 * patch * patch != embedder.shape[1] or normed:
        raise other_layout(released, "radio")
    largest = math.isqrt(table.shape[1]) * patch
    size = asked.image_size or min(max(round(IMAGE_SIZE / patch), 1) * patch, largest)
    names, first = _class_tokens(released, tokens.shape[0], asked.summary)
    order = [first, *(i for i in range(tokens.shape[0]) if i != first)]
    bias = generator.get("patch_generator.embedder.bias")
    tensors = {
        **{key.replace(".grandma", ".gamma"): value for key, value in found.items()},
        "patch_embed.proj.weight": embedder.reshape(-1, 3, patch, patch),
        "patch_embed.proj.bias": torch.zeros(embedder.shape[0]) if bias is None else bias,
        "cls_token": tokens[order[:1]][None],
        "pos_embed": _positions(table, size, patch, released),
    }
    if len(order) > 1:
        tensors["reg_token"] = tokens[order[1:]][None]
    mean, std = _conditioner(released)
    final_norm = bool(released.arguments.get("model_norm", False))
    for name in ("norm.weight", "norm.bias", "cls_token_norm.weight"):
        if not final_norm:
            tensors.pop(name, None)
    slots = ", ".join(names.get(i, "register") for i in order)
    return plain_vit(
        tensors,
        num_heads=asked.num_heads or _heads(released, embedder.shape[0]),
        path=released.path,
        embedded_class=False,
        final_norm=final_norm,
        mean=mean,
        std=std,
        notes=(
            f"Prefix tokens, in order: {slots}. The summary is the first; `forward_features` gives "
            "all of them, in front of the patches.",
            f"Positions are resampled for {size} pixels as published; for other sizes timm "
            "resamples these, otherwise (import again with --image-size).",
            "The teachers' heads are left out.",
        ),
    )


def _base_model(released: Released) -> dict[str, Tensor]:
    """The tensors of the encoder; those of a DINOv2 wrapper are under ``inner.``."""
    found = released.starting("base_model.") or released.starting("radio_model.model.")
    inner = {k[6:]: v for k, v in found.items() if k.startswith("inner.")}
    found = inner or found
    found.pop("mask_token", None)
    if any("parametrizations." in key for key in found):
        raise ValueError(
            f"{released.path} holds spectral reparametrised weights: plain ones were expected, as "
            "in NVIDIA's *_half and EMA releases"
        )
    if any(key.startswith(_NORMALISED) for key in released.tensors):
        raise ValueError(
            f"{released.path} normalises its features behind the encoder (radio_v2.5-h-norm), "
            "which a timm folder cannot hold: import radio_v2.5-h"
        )
    others = set(_mapping(released.arguments.get("model_kwargs"))) - _KNOWN_ARGUMENTS
    if others:
        raise ValueError(
            f"{released.path} was built with {sorted(others)[0]!r}, which is not known here: this "
            "release is of another kind"
        )
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _heads(released: Released, width: int) -> int:
    """From the arguments of the model, else its name."""
    name = str(released.arguments.get("model", ""))
    given = _mapping(released.arguments.get("model_kwargs")).get("num_heads")
    known = next((heads for start, heads in _HEADS if name.startswith(start)), None)
    if isinstance(given, int):
        return given
    if known is None:
        raise ValueError(
            f"{released.path} does not say how many heads its attention has (architecture "
            f"{name!r}, width {width}): give --num-heads"
        )
    return known


def _class_tokens(
    released: Released, count: int, summary: str | None
) -> tuple[dict[int, str], int]:
    """Row of the table → teacher, and the row that becomes the class token.

    Raises:
        ValueError: no teacher of this name; the nearest is offered.
    """
    teachers = released.arguments.get("teachers")
    configs = [t for t in teachers if isinstance(t, Mapping)] if isinstance(teachers, list) else []
    names: dict[int, str] = {}
    summaries: list[int] = []
    if released.arguments.get("cls_token_per_teacher", True):
        for place, config in enumerate(configs):
            name = str(config.get("name", place))
            slot = config.get("token_slot", place)
            if name in names.values() or not isinstance(slot, int) or not 0 <= slot < count:
                continue
            names[slot] = name
            if config.get("use_summary", True):
                summaries.append(slot)
    else:
        names[0] = "all teachers"
    if summary is None:
        return names, min(summaries, default=0)
    row = next((i for i, name in names.items() if name == summary), None)
    if row is None:
        raise unknown_name("teacher", summary, sorted(names.values()))
    return names, row


def _positions(table: Tensor, size: int, patch: int, released: Released) -> Tensor:
    """The table for images of ``size``: ``(1, n·n, D)``."""
    rows = math.isqrt(table.shape[1])
    if table.ndim != 3 or table.shape[0] != 1 or rows * rows != table.shape[1]:
        raise other_layout(released, "radio")
    grid = size // patch
    if size % patch or not 0 < grid <= rows:
        raise ValueError(
            f"--image-size must be a multiple of the patch of {patch}, up to {rows * patch}, "
            f"received {size}"
        )
    if grid == rows:
        return table
    image = table.float().reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
    resampled = functional.interpolate(image, (grid, grid), mode="bilinear", align_corners=False)
    # As published, rounded to the table's own dtype.
    return resampled.to(table.dtype).flatten(2).transpose(1, 2)


def _conditioner(released: Released) -> tuple[Triple, Triple]:
    own, hub = (released.starting(f"{at}input_conditioner.") for at in ("", "radio_model."))
    mean, std = ((own or hub).get(name) for name in ("norm_mean", "norm_std"))
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        return CLIP_MEAN, CLIP_STD
    return _triple(mean), _triple(std)


def _triple(values: Tensor) -> Triple:
    red, green, blue = values.flatten().tolist()
    return red, green, blue
