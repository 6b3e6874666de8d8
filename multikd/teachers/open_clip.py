"""The image tower of any open_clip model: projected summary, raw patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.backbones import dry_run, is_skeleton, load_weights, read_state_dict
from multikd.errors import unknown_name
from multikd.teachers.encoder import ImageEncoder
from multikd.types import EncoderSpec, Grid, TokenFeatures


class OpenClipEncoder(ImageEncoder):
    """Image tower of an open_clip model; the text tower is dropped after loading.

    ``summary (B, D_s)`` is the projected embedding (not L2-normalised), ``patches (B, N, D_p)`` the
    normed tokens before the projection, so the two widths usually differ.

    Args:
        architecture: as open_clip names it (``ViT-B-32``), or ``hf-hub:ORG/REPO`` /
            ``local-dir:PATH``.
        tag: pretrained tag (``laion2b_s34b_b79k``), fetched from the hub; with ``checkpoint`` it
            only says how these weights were trained: activation and normalisation.
        checkpoint: a local weight file (whole CLIP model or image tower), nothing is fetched.
        image_size: side in pixels; None takes what the weights were trained at.
        mean: overrides the model's own.
        std: overrides the model's own.
        licence: open_clip records none; state it for the model card.

    Raises:
        ValueError: unknown architecture or tag, weights that do not fit or cannot be fetched.
    """

    def __init__(
        self,
        architecture: str,
        tag: str | None = None,
        checkpoint: str | None = None,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        name = f"open_clip:{architecture}" + (f"/{tag}" if tag else "")
        visual, config = _build_tower(name, architecture, tag, checkpoint, image_size)
        self.model = visual
        size = _tower_size(visual, image_size)
        features = dry_run(visual, size, _tower_features, name)
        grid = features.grid or (1, 1)
        own: Mapping[str, Any] = (
            config.get("preprocess") or getattr(visual, "preprocess_cfg", None) or {}
        )
        self.spec = EncoderSpec(
            name=name,
            widths=features.widths,
            image_size=size,
            patch_size=max(1, round(size[0] / grid[0])),
            mean=tuple(mean or own.get("mean") or (0.48145466, 0.4578275, 0.40821073)),
            std=tuple(std or own.get("std") or (0.26862954, 0.26130258, 0.27577711)),
            interpolation=str(own.get("interpolation") or "bicubic"),
            fixed_size=_is_fixed(visual),
            num_prefix_tokens=1 if hasattr(visual, "class_embedding") else 0,
            licence=licence or "unknown",
            source=checkpoint or ("hub" if tag or ":" in architecture else "random weights"),
        )
        self._quick_gelu = bool(config.get("quick_gelu", False))
        self.set_normalization(self.spec.mean, self.spec.std)

    @property
    def variant(self) -> str:
        """Architecture and activation (open_clip keeps two GELUs under one name)."""
        return f"{self.spec.name.partition('/')[0]}/quick_gelu={self._quick_gelu}"

    def encode(self, images: Tensor) -> TokenFeatures:
        """Projected summary and raw patches."""
        return _tower_features(self.model, images)


def _tower_features(visual: nn.Module, images: Tensor) -> TokenFeatures:
    output = visual.forward_intermediates(  # type: ignore[operator]
        images, indices=1, normalize_intermediates=True, output_fmt="NCHW"
    )
    feature_map: Tensor = output["image_intermediates"][-1]
    return TokenFeatures(
        summary=output["image_features"],
        patches=feature_map.flatten(2).transpose(1, 2),
        grid=(feature_map.shape[2], feature_map.shape[3]),
    )


def _build_tower(
    name: str, architecture: str, tag: str | None, checkpoint: str | None, image_size: int | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    import open_clip

    by_schema = architecture.startswith(("hf-hub:", "local-dir:"))
    config: dict[str, Any] = {}
    if not by_schema:
        if architecture not in open_clip.list_models():
            raise unknown_name("open_clip architecture", architecture, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if tag is not None and tag not in tags:
            raise unknown_name(f"open_clip tag of {architecture}", tag, tags)
        config = dict(open_clip.get_model_config(architecture) or {})
        if tag is not None:
            # The tag's activation wins: the same architecture was trained with both GELUs.
            of_tag = open_clip.get_pretrained_cfg(architecture, tag) or {}
            config["quick_gelu"] = bool(of_tag.get("quick_gelu", False))
            config["preprocess"] = of_tag
    fetched = not is_skeleton() and checkpoint is None
    try:
        model = open_clip.create_model(
            architecture,
            pretrained=tag if fetched else None,
            load_weights=fetched,
            force_quick_gelu=bool(config.get("quick_gelu", False)),
            force_image_size=image_size,
            device=torch.get_default_device(),
            pretrained_text=False,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} could not be built or its weights not be fetched ({reason}): without a "
            "connection give checkpoint=PATH of a local weight file"
        ) from error
    visual: nn.Module = model.visual
    if checkpoint is not None and not is_skeleton():
        tensors = read_state_dict(checkpoint)
        if any(key.startswith("visual.") for key in tensors):
            open_clip.model.resize_pos_embed(tensors, model)
            tensors = {
                key.removeprefix("visual."): value
                for key, value in tensors.items()
                if key.startswith("visual.")
            }
        load_weights(visual, tensors, Path(checkpoint).name)
    return visual, config


def _tower_size(visual: nn.Module, image_size: int | None) -> Grid:
    if image_size is not None:
        return (image_size, image_size)
    size = getattr(visual, "image_size", 224)
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _is_fixed(visual: nn.Module) -> bool:
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return True  # open_clip's own towers add a position embedding of one size
    return bool(getattr(getattr(trunk, "patch_embed", None), "strict_img_size", False))
