"""Classification models of torchvision, with weights that it names or from a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multikd.backbones import dry_run, is_skeleton, load_weights, read_state_dict
from multikd.backbones.normalize import rgb
from multikd.errors import unknown_name
from multikd.teachers.encoder import ImageEncoder
from multikd.types import EncoderSpec, TokenFeatures


class TorchvisionEncoder(ImageEncoder):
    """A classification model of torchvision.

    A ViT gives its normed class token and patches. Any other model gives the map before its last
    global pooling as ``patches`` and the map's mean as ``summary``. Both have its ``logits``.

    Args:
        name: as ``torchvision.models.list_models()`` has it: ``resnet50``, ``vit_b_16``.
        weights: a name of its weights (``IMAGENET1K_V2``, ``DEFAULT``), fetched by torchvision;
            None for random ones.
        checkpoint: a local weight file, nothing is fetched; ``weights`` then only says how they
            were trained: size and preprocessing.
        image_size: side in pixels; None takes what the weights were trained at.
        mean: overrides the weights' own.
        std: overrides the weights' own.
        licence: torchvision's weights are under BSD-3-Clause unless their page says otherwise.

    Raises:
        ValueError: unknown name or weights, weights that do not fit or can't be fetched, or a model
            without a feature map.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        checkpoint: str | None = None,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        import torchvision

        full = f"torchvision:{name}" + (f".{weights}" if weights else "")
        names = torchvision.models.list_models(module=torchvision.models)
        if name not in names:
            raise unknown_name("torchvision model", name, names)
        preset = None if weights is None else _weights(torchvision, name, weights)
        transforms = None if preset is None else preset.transforms()
        vit = name.startswith("vit_")
        side = image_size or (transforms.crop_size[0] if transforms is not None else 224)
        options: dict[str, Any] = {"image_size": side} if vit and image_size else {}
        fetched = preset if checkpoint is None else None
        if name in ("googlenet", "inception_v3") and fetched is None:
            # Torchvision turns the input's transform on for the weights that it fetches.
            own = {"aux_logits": False} if preset is None else {"transform_input": True}
            options |= {"init_weights": False, **own}
        self.model = _build(torchvision, full, name, fetched, options)
        if checkpoint is not None and not is_skeleton():
            load_weights(self.model, read_state_dict(checkpoint), checkpoint)
        self.is_vit = isinstance(self.model, torchvision.models.VisionTransformer)
        self._full = full
        features = dry_run(self.model, (side, side), self._features, full)
        grid = features.grid or (1, 1)
        self.spec = EncoderSpec(
            name=full,
            widths=features.widths,
            image_size=(side, side),
            patch_size=max(1, round(side / grid[0])),
            mean=rgb(mean or (transforms.mean if transforms else (0.485, 0.456, 0.406)), "mean"),
            std=rgb(std or (transforms.std if transforms else (0.229, 0.224, 0.225)), "std"),
            interpolation="bilinear",
            fixed_size=self.is_vit,
            num_prefix_tokens=1 if self.is_vit else 0,
            num_classes=0 if features.logits is None else features.logits.shape[-1],
            licence=licence or ("unknown" if fetched is None else "BSD-3-Clause"),
            source=checkpoint or ("random weights" if fetched is None else "torchvision"),
        )
        self.set_normalization(self.spec.mean, self.spec.std)

    @property
    def variant(self) -> str:
        """Architecture."""
        return self.spec.name.partition(".")[0]

    def encode(self, images: Tensor) -> TokenFeatures:
        """Summary, patches and logits."""
        return self._features(self.model, images)

    def _features(self, model: Any, images: Tensor) -> TokenFeatures:
        if self.is_vit:
            tokens = model._process_input(images)
            tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
            tokens = model.encoder(tokens)
            grid = (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size)
            return TokenFeatures(tokens[:, 0], tokens[:, 1:], grid, model.heads(tokens[:, 0]))
        maps: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].ndim == 4:
                maps.append(inputs[0])

        pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
        hooks = [pool.register_forward_pre_hook(note) for pool in pools]
        extractor = getattr(model, "features", None)
        if not pools and isinstance(extractor, nn.Module):  # pooled by a function
            hooks.append(extractor.register_forward_hook(lambda m, i, o: maps.append(o)))
        try:
            logits = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not maps:
            raise ValueError(f"{self._full} has no feature map that could be read: use timm's")
        feature_map = maps[-1]
        return TokenFeatures(
            summary=feature_map.mean((2, 3)),
            patches=feature_map.flatten(2).transpose(1, 2),
            grid=(feature_map.shape[2], feature_map.shape[3]),
            logits=logits if isinstance(logits, Tensor) else None,
        )


def _weights(torchvision: Any, name: str, weights: str) -> Any:
    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__ and weights != "DEFAULT":
        raise unknown_name(f"weights of torchvision's {name}", weights, [*known.__members__])
    return getattr(known, weights)


def _build(torchvision: Any, full: str, name: str, preset: Any, options: dict[str, Any]) -> Any:
    try:
        fetched = None if is_skeleton() else preset
        return torchvision.models.get_model(name, weights=fetched, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{full} could not be built or its weights not be fetched ({reason}): without a "
            "connection give checkpoint=PATH of a local weight file"
        ) from error
