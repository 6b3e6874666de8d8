"""Vision models of transformers, from a local folder or the hub: DINOv3, SAM, SigLIP 2, AIMv2, …"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multikd.backbones import dry_run, is_skeleton
from multikd.backbones.normalize import rgb
from multikd.errors import MissingExtraError, unknown_name
from multikd.teachers.encoder import ImageEncoder
from multikd.types import EncoderSpec, Grid, TokenFeatures

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """How one of transformers' model types is read.

    Attributes:
        model: the class that holds the vision tower alone.
        summary: where the summary is: the model's pooled output, the normed class token, or none.
        fixed: it takes images of its own size only.
        example: a published model of the family, for ``multikd teachers list``.
        licence: of that model.
        normalization: where the model brings no preprocessing of its own.
    """

    model: str
    summary: Literal["pooled", "class", "none"]
    fixed: bool = False
    example: str = ""
    licence: str = "unknown"
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


_DINOV3, _SIGLIP, _SIGLIP2 = "DINOv3ViTModel", "SiglipVisionModel", "Siglip2VisionModel"
FAMILIES: dict[str, Family] = {
    "dinov3_vit": Family(
        _DINOV3, "class", example="facebook/dinov3-vitb16-pretrain-lvd1689m", licence="DINOv3"
    ),
    "dinov2": Family("Dinov2Model", "class", example="facebook/dinov2-base", licence="Apache-2.0"),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel",
        "class",
        example="facebook/dinov2-with-registers-base",
        licence="Apache-2.0",
    ),
    "vit": Family("ViTModel", "class", example="facebook/dino-vitb16", licence="Apache-2.0"),
    # Published SigLIP 2 models of one resolution are of the type "siglip"; NaFlex is "siglip2".
    "siglip": Family(
        _SIGLIP, "pooled", False, "google/siglip2-base-patch16-224", "Apache-2.0", HALF
    ),
    "siglip2": Family(
        _SIGLIP2, "pooled", False, "google/siglip2-base-patch16-naflex", "Apache-2.0", HALF
    ),
    "aimv2": Family("Aimv2VisionModel", "pooled", True, "apple/aimv2-large-patch14-224", "AMLR"),
    "clip": Family("CLIPVisionModel", "pooled", False, "openai/clip-vit-base-patch16", "MIT"),
    "sam": Family("SamVisionModel", "none", True, "facebook/sam-vit-base", "Apache-2.0"),
    "depth_anything": Family(
        "DepthAnythingForDepthEstimation",
        "none",
        example="depth-anything/Depth-Anything-V2-Small-hf",
        licence="Apache-2.0",
    ),
}


def family_of(model_type: str, name: str) -> Family:
    """The family of a config's ``model_type`` (``…_vision_model`` is a tower saved alone).

    Raises:
        ValueError: a type that is not known here.
    """
    known = model_type.removesuffix("_vision_model")
    if known not in FAMILIES:
        raise unknown_name(
            f"transformers model type of {name}",
            model_type,
            FAMILIES,
            "(write an encoder class of your own for others)",
        )
    return FAMILIES[known]


class HuggingFaceEncoder(ImageEncoder):
    """A vision tower of transformers; text towers, decoders and depth heads are left out.

    ``patches (B, N, D)`` is the last hidden state without class and register tokens, as the model
    gives it (normed, but for CLIP); for SAM the map behind the neck, for Depth Anything that of its
    DINOv2 backbone. ``summary (B, D)`` is the pooled output (CLIP: normed class token; SigLIP and
    AIMv2: attention pool) or the normed class token (DINO, ViT); SAM and Depth Anything have none.

    Args:
        name: a folder that ``save_pretrained`` wrote, or ``ORG/MODEL`` on the hub.
        image_size: side in pixels; None takes what the config says.
        mean: overrides that of ``preprocessor_config.json``.
        std: overrides that of ``preprocessor_config.json``.
        licence: overrides the one that the model's card names.

    Raises:
        ValueError: not such a folder, an unknown model type, weights that do not fit or can't be
            fetched.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        name: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        transformers = _transformers(name)
        config = _config(transformers, name)
        self.family = family_of(config.model_type, name)
        self.model_type = str(config.model_type)
        self.model = _tower(_model(transformers, name, config, self.family))
        vision: Any = self.model.config
        size = _size(vision, image_size)
        self.patch_size = int(vision.patch_size)
        self._sizes_kept = "interpolate_pos_encoding" in _parameters(self.model)
        preprocessing = _preprocessing(name)
        own_mean, own_std = self.family.normalization
        if preprocessing.get("do_normalize") is False:
            own_mean, own_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        features = dry_run(self.model, size, self._features, f"hf:{name}")
        self.spec = EncoderSpec(
            name=f"hf:{name}",
            widths=features.widths,
            image_size=size,
            patch_size=self.patch_size,
            mean=rgb(mean or preprocessing.get("image_mean") or own_mean, "mean"),
            std=rgb(std or preprocessing.get("image_std") or own_std, "std"),
            fixed_size=self.family.fixed and not getattr(vision, "is_native", False),
            num_prefix_tokens=self._prefix,
            licence=licence or _licence(name) or self._example_licence(name),
            source=name if Path(name).is_dir() else "hub",
        )
        self.set_normalization(self.spec.mean, self.spec.std)

    @property
    def variant(self) -> str:
        """Model type and activation."""
        activation = getattr(self.model.config, "hidden_act", "")
        return f"transformers/{self.model_type}/{activation}"

    def encode(self, images: Tensor) -> TokenFeatures:
        """Summary and patches of the last layer."""
        return self._features(self.model, images)

    def _example_licence(self, name: str) -> str:
        return self.family.licence if name == self.family.example else "unknown"

    def _features(self, model: nn.Module, images: Tensor) -> TokenFeatures:
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if self.family.model == _SIGLIP2:
            output = model(**_as_sequences(images, self.patch_size, grid))
        elif self._sizes_kept:
            output = model(images, interpolate_pos_encoding=True)
        else:
            output = model(images)
        self._prefix = 0
        maps = getattr(output, "feature_maps", None)
        tokens: Tensor = maps[-1] if maps else output.last_hidden_state
        if tokens.ndim == 4:
            return TokenFeatures(
                patches=tokens.flatten(2).transpose(1, 2), grid=(tokens.shape[2], tokens.shape[3])
            )
        self._prefix = tokens.shape[1] - grid[0] * grid[1]
        if self._prefix < 0:
            raise ValueError(f"{tokens.shape[1]} tokens for a grid of {grid[0]}×{grid[1]} patches")
        summary: Tensor | None = None
        if self.family.summary == "class":
            summary = tokens[:, 0]
        elif self.family.summary == "pooled":
            summary = output.pooler_output
        return TokenFeatures(summary, tokens[:, self._prefix :], grid)


def _as_sequences(images: Tensor, patch: int, grid: Grid) -> dict[str, Tensor]:
    """What NaFlex models take: flat patches, rows of pixels in (y, x, channel) order."""
    b, c = images.shape[:2]
    h, w = grid
    cut = images[:, :, : h * patch, : w * patch].reshape(b, c, h, patch, w, patch)
    return {
        "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, patch * patch * c),
        "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.long, device=images.device),
        # Fills, not a copy from the host, which would wait for the device.
        "spatial_shapes": torch.stack(
            [torch.full((b,), side, dtype=torch.long, device=images.device) for side in grid], dim=1
        ),
    }


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "hf", f"the teacher hf:{name}") from error
    return transformers


def _config(transformers: Any, name: str) -> Any:
    folder = Path(name)
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ValueError(f"hf:{name}: there is no such folder; give a folder or ORG/MODEL")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name!r} is no model folder (it has no config.json): give a folder that "
            "transformers' save_pretrained wrote"
        )
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"hf:{name} could not be read ({_short(error)}): give a folder of transformers, or "
            "ORG/MODEL with a connection to the hub"
        ) from error


def _model(transformers: Any, name: str, config: Any, family: Family) -> nn.Module:
    kind = getattr(transformers, family.model, None)
    if kind is None:
        raise ValueError(
            f"hf:{name} needs transformers' {family.model}, which version "
            f"{transformers.__version__} lacks: pip install -U transformers"
        )
    # A whole model's config holds the tower's own.
    own = getattr(config, "vision_config", None)
    if own is not None and family.model != "DepthAnythingForDepthEstimation":
        config = own
    if is_skeleton():
        model: nn.Module = kind(config)
        return model
    try:
        model, info = kind.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
    except Exception as error:
        raise ValueError(
            f"the weights of hf:{name} can't be had ({_short(error)}): without a connection give a "
            "folder that holds them"
        ) from error
    # A pooler is often not trained, and where it is no summary it is not read.
    missing = sorted(
        key
        for key in info["missing_keys"]
        if family.summary == "pooled" or not key.startswith("pooler.")
    )
    if missing or info["mismatched_keys"]:
        first = missing[0] if missing else info["mismatched_keys"][0][0]
        raise ValueError(
            f"the weights of hf:{name} are not those of its config: {len(missing)} tensors are "
            f"missing, such as {first!r}; give the folder of a complete model"
        )
    return model


def _tower(model: nn.Module) -> nn.Module:
    """The encoder inside a model that is more than one."""
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _size(config: Any, image_size: int | None) -> Grid:
    if image_size is not None:
        return (image_size, image_size)
    size = getattr(config, "image_size", None)
    if size is None:  # NaFlex: a number of patches
        side = round(float(getattr(config, "num_patches", 196)) ** 0.5) * int(config.patch_size)
        return (side, side)
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(model.forward).parameters


def _preprocessing(name: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "preprocessor_config.json")
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):  # there need not be one
        return {}
    return content if isinstance(content, dict) else {}


def _licence(name: str) -> str | None:
    """The licence that the card of a local folder names in its first lines."""
    card = Path(name) / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    for line in head[1].splitlines() if len(head) > 2 else ():
        key, _, value = line.partition(":")
        if key.strip() == "license" and value.strip():
            return value.strip()
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
