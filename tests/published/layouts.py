"""Small models in the layouts that publishers release, and their forward pass in plain functions.

Written from the facts in ``multikd/published`` (which repository's file says what), without its
code and without timm: the reference that an imported folder is compared with.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
DEPTH = 2


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Weights of a size at which layers matter; norms' weights near 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 1.0 if len(shape) != 2 else shape[-1] ** -0.5
        around_one = "norm" in name and name.endswith("weight")
        found[name] = 1 + 0.2 * noise if around_one else 0.5 * scale * noise
    return found


def dinov2_shapes(width: int, patch: int, grid: int, registers: int) -> dict[str, tuple[int, ...]]:
    """naver/unic and naver/dune: an encoder with its blocks in one chunk."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for block in range(DEPTH):
        at = f"blocks.0.{block}."
        shapes |= block_shapes(at, width)
        if registers:
            shapes |= {f"{at}ls1.gamma": (width,), f"{at}ls2.gamma": (width,)}
    return shapes


def block_shapes(at: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden = 2 * width
    return {
        f"{at}norm1.weight": (width,),
        f"{at}norm1.bias": (width,),
        f"{at}attn.qkv.weight": (3 * width, width),
        f"{at}attn.qkv.bias": (3 * width,),
        f"{at}attn.proj.weight": (width, width),
        f"{at}attn.proj.bias": (width,),
        f"{at}norm2.weight": (width,),
        f"{at}norm2.bias": (width,),
        f"{at}mlp.fc1.weight": (hidden, width),
        f"{at}mlp.fc1.bias": (hidden,),
        f"{at}mlp.fc2.weight": (width, hidden),
        f"{at}mlp.fc2.bias": (width,),
    }


def unic_file(width: int = 128, size: int = 32) -> tuple[dict[str, Any], Tensors]:
    """What ``main_unic.py`` saves, and the encoder's tensors."""
    encoder = random_tensors(dinov2_shapes(width, 16, size // 16, 0), 1)
    model = {f"module.encoder.{k}": v for k, v in encoder.items()}
    model["module.lp.heads.dino.cls.0.layers.0.weight"] = torch.randn(4, width)
    arguments = argparse.Namespace(
        arch="vit_tiny",
        patch_size=16,
        image_size=size,
        lp_args="{'std': 0.02}",
        lr_schedule=np.linspace(0.0, 1.0, 7),
        tnorm_ema_schedule=np.linspace(1.0, 0.0, 7),
    )
    stats = {"dino": {"cls": {"mean": torch.zeros(1, 4), "std": torch.ones(1, 4)}}}
    content = {"model": model, "teacher_ft_stats": stats, "epoch": 3, "args": arguments}
    return content, encoder


def dune_file(width: int = 128, size: int = 42) -> tuple[dict[str, Any], Tensors]:
    """What ``main_dune.py`` saves, and the encoder's tensors: registers and LayerScale."""
    encoder = random_tensors(dinov2_shapes(width, 14, size // 14, 4), 2)
    model = {f"module._orig_mod.encoder.{k}": v for k, v in encoder.items()}
    model["module._orig_mod.projectors.dino2reg_vitlarge_14.linear.weight"] = torch.randn(4, width)
    arguments = argparse.Namespace(
        enc_args={"arch": "vit_small"}, image_size=size, lr_schedule=np.linspace(0.0, 1.0, 7)
    )
    return {"model": model, "iter": 3, "args": arguments}, encoder


def dinov2_forward(encoder: Tensors, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels → normed class token and patches."""
    x = patches_of(pixels, encoder["patch_embed.proj.weight"], encoder["patch_embed.proj.bias"])
    batch, width = x.shape[0], x.shape[2]
    x = torch.cat([encoder["cls_token"].expand(batch, -1, -1), x], dim=1) + encoder["pos_embed"]
    registers = encoder.get("register_tokens")
    count = 0 if registers is None else registers.shape[1]
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(batch, -1, -1), x[:, 1:]], dim=1)
    x = run_blocks(x, lambda block: (encoder, f"blocks.0.{block}."), width // 64, 1e-6)
    x = normed(x, encoder, "norm.", 1e-6)
    return x[:, 0], x[:, 1 + count :]


def theia_file(kind: str = "", width: int = 128, size: int = 32) -> tuple[Tensors, Tensors]:
    """The state dict of a ``RobotVisionFM``, and its backbone's; ``kind``: "", "nocls" or "reg"."""
    grid, hidden = size // 16, 2 * width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.position_embeddings": (1, 1 + grid * grid, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    if kind != "nocls":
        shapes["embeddings.cls_token"] = (1, 1, width)
    if kind == "reg":
        shapes["embeddings.reg_token"] = shapes["embeddings.reg_pos_embed"] = (1, 7, width)
    for block in range(DEPTH):
        at = f"encoder.layer.{block}."
        for layer, out, into in (
            ("attention.attention.query", width, width),
            ("attention.attention.key", width, width),
            ("attention.attention.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", hidden, width),
            ("output.dense", width, hidden),
        ):
            shapes |= {f"{at}{layer}.weight": (out, into), f"{at}{layer}.bias": (out,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
    backbone = random_tensors(shapes, 3)
    released = {f"backbone.model.{k}": v for k, v in backbone.items()}
    return released | {"translator.backbone_adapter.weight": torch.randn(2, 2)}, backbone


def theia_forward(backbone: Tensors, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """As transformers' ViT runs: normed class token (None without) and patches."""
    at = "embeddings."
    x = patches_of(
        pixels,
        backbone[f"{at}patch_embeddings.projection.weight"],
        backbone[f"{at}patch_embeddings.projection.bias"],
    )
    batch, count, width = x.shape
    positions = backbone[f"{at}position_embeddings"]
    has_class = f"{at}cls_token" in backbone
    if has_class:
        x = torch.cat([backbone[f"{at}cls_token"].expand(batch, -1, -1), x], dim=1) + positions
    else:
        x = x + positions[:, 1:]
    if f"{at}reg_token" in backbone:  # behind the patches
        registers = backbone[f"{at}reg_token"] + backbone[f"{at}reg_pos_embed"]
        x = torch.cat([x, registers.expand(batch, -1, -1)], dim=1)

    def block_of(block: int) -> tuple[Tensors, str]:
        at = f"encoder.layer.{block}."
        names = {
            "attention.output.dense": "attn.proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
        }
        found = {}
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                found[f"{ours}.{kind}"] = backbone[f"{at}{theirs}.{kind}"]
            found[f"attn.qkv.{kind}"] = torch.cat(
                [backbone[f"{at}attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            )
        return found, ""

    x = run_blocks(x, block_of, width // 64, 1e-12)
    x = normed(x, backbone, "layernorm.", 1e-12)
    start = int(has_class)
    return (x[:, 0] if has_class else None), x[:, start : start + count]


TEACHERS = [
    {"name": "clip", "type": "open_clip"},
    {"name": "dino_v2", "type": "dino_v2"},
    {"name": "sam", "type": "sam", "use_summary": False},
]


def radio_file(
    width: int = 128, heads: int = 4, patch: int = 16, largest: int = 128, registers: int = 5
) -> tuple[dict[str, Any], Tensors]:
    """What NVlabs/RADIO releases, and the encoder's tensors: three class tokens, no final norm."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (width, 3 * patch * patch),
        "patch_generator.pos_embed": (1, (largest // patch) ** 2, width),
        "patch_generator.cls_token.token": (len(TEACHERS) + registers, width),
    }
    for block in range(DEPTH):
        shapes |= block_shapes(f"blocks.{block}.", width)
    base = random_tensors(shapes, 4)
    state = {f"base_model.{k}": v for k, v in base.items()}
    state["input_conditioner.norm_mean"] = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1)
    state["input_conditioner.norm_std"] = torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
    state["_heads.0.mlp.fc1.weight"] = torch.randn(4, width)
    arguments = argparse.Namespace(
        model="vit_base_patch16_224",
        model_kwargs={"embed_dim": width, "depth": DEPTH, "num_heads": heads},
        teachers=TEACHERS,
        cls_token_per_teacher=True,
        cpe_max_size=largest,
        dtype=torch.float32,
    )
    return {"arch": "x", "epoch": 1, "state_dict": state, "args": arguments}, base


def radio_forward(base: Tensors, pixels: Tensor, heads: int = 4) -> tuple[Tensor, Tensor]:
    """Normalised pixels → all prefix tokens in the table's order, and patches; no norm behind."""
    tokens = base["patch_generator.cls_token.token"]
    weight = base["patch_generator.embedder.weight"]
    patch = math.isqrt(weight.shape[1] // 3)
    batch, _, height, _ = pixels.shape
    n = height // patch
    # One row of pixels for each patch, in the order channel, row, column.
    cut = pixels.reshape(batch, 3, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5)
    x = functional.linear(cut.reshape(batch, n * n, -1), weight)
    table = base["patch_generator.pos_embed"]
    side = math.isqrt(table.shape[1])
    if n != side:
        image = table.transpose(1, 2).reshape(1, -1, side, side)
        image = functional.interpolate(image, size=(n, n), mode="bilinear", align_corners=False)
        table = image.flatten(2).transpose(1, 2)
    x = torch.cat([tokens.expand(batch, -1, -1), x + table], dim=1)
    x = run_blocks(x, lambda block: (base, f"blocks.{block}."), heads, 1e-6)
    return x[:, : len(tokens)], x[:, len(tokens) :]


def eupe_file(width: int = 128) -> Tensors:
    """The state dict of ``eupe_vit*16``: storage tokens, rotary periods, a masked bias of keys."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "storage_tokens": (1, 4, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(DEPTH):
        at = f"blocks.{block}."
        shapes |= block_shapes(at, width)
        shapes |= {f"{at}ls1.gamma": (width,), f"{at}ls2.gamma": (width,)}
    found = random_tensors(shapes, 5)
    found["rope_embed.periods"] = 100.0 ** (2 * torch.arange(16.0) / 32)
    for block in range(DEPTH):
        mask = torch.ones(3 * width)
        mask[width : 2 * width] = 0
        found[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    return found


def eupe_forward(found: Tensors, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels → normed class token and patches; queries and keys of patches rotate."""
    x = patches_of(pixels, found["patch_embed.proj.weight"], found["patch_embed.proj.bias"])
    batch, width = x.shape[0], x.shape[2]
    n = pixels.shape[2] // 16
    centres = (torch.arange(n) + 0.5) / n * 2 - 1
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (2 * math.pi * grid[:, :, None] / found["rope_embed.periods"]).flatten(1).tile(2)
    prefix = torch.cat([found["cls_token"], found["storage_tokens"]], dim=1)
    x = torch.cat([prefix.expand(batch, -1, -1), x], dim=1)

    def masked(block: int) -> tuple[Tensors, str]:
        at = f"blocks.{block}."
        bias = found[f"{at}attn.qkv.bias"] * found[f"{at}attn.qkv.bias_mask"]
        return found | {f"{at}attn.qkv.bias": bias}, at

    x = run_blocks(x, masked, width // 64, 1e-5, angles)
    x = normed(x, found, "norm.", 1e-5)
    return x[:, 0], x[:, 5:]


def patches_of(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = functional.conv2d(pixels, weight, bias, stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2)


def normed(x: Tensor, tensors: Tensors, at: str, eps: float) -> Tensor:
    return functional.layer_norm(
        x, (x.shape[-1],), tensors[f"{at}weight"], tensors[f"{at}bias"], eps
    )


def run_blocks(
    x: Tensor,
    block_of: Callable[[int], tuple[Tensors, str]],
    heads: int,
    eps: float,
    angles: Tensor | None = None,
) -> Tensor:
    """Pre-norm blocks; ``angles (N, head)`` rotate queries and keys of the last N tokens."""
    batch, tokens, width = x.shape
    for block in range(DEPTH):
        found, at = block_of(block)

        def layer(name: str, y: Tensor, found: Tensors = found, at: str = at) -> Tensor:
            return functional.linear(y, found[f"{at}{name}.weight"], found[f"{at}{name}.bias"])

        qkv = layer("attn.qkv", normed(x, found, f"{at}norm1.", eps))
        q, k, v = (
            part.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
            for part in torch.split(qkv, width, dim=-1)
        )
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + found.get(f"{at}ls1.gamma", torch.ones(width)) * layer("attn.proj", mixed)
        hidden = functional.gelu(layer("mlp.fc1", normed(x, found, f"{at}norm2.", eps)))
        x = x + found.get(f"{at}ls2.gamma", torch.ones(width)) * layer("mlp.fc2", hidden)
    return x


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    prefix = x.shape[2] - len(angles)
    y = x[:, :, prefix:]
    half = torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], dim=-1)
    return torch.cat([x[:, :, :prefix], y * angles.cos() + half * angles.sin()], dim=2)
