"""What the encoders of this room share: own normalisation, measured shapes, exact grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from multikd.backbones import (
    Normalize,
    dry_run,
    final_features,
    native_size,
    plan_rungs,
    rung_features,
    spec_from_model,
)
from multikd.types import EncoderSpec, Grid, TokenFeatures, Widths


class ImageEncoder(nn.Module):
    """Base of the encoders: images in [0, 1] are normalised here, once, and cast to the weights.

    A subclass sets ``spec`` and implements ``encode``.
    """

    spec: EncoderSpec

    def __init__(self) -> None:
        super().__init__()
        self._grids: dict[Grid, Grid | None] = {}

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Use another mean and std (RGB, in [0, 1])."""
        self.normalize = Normalize(mean, std)
        self.spec = dataclasses.replace(
            self.spec, mean=self.normalize._mean, std=self.normalize._std
        )

    @property
    def variant(self) -> str:
        """What, beside the weights, decides the features; part of a teacher's fingerprint."""
        return type(self).__qualname__

    def encode(self, images: Tensor) -> TokenFeatures:
        """Features of normalised images in the dtype of the weights."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features of ``images``: float ``(B, 3, H, W)`` in [0, 1]."""
        dtype = next((p.dtype for p in self.parameters()), images.dtype)
        return self.encode(self.normalize(images).to(dtype))

    def grid_for(self, image_size: Grid) -> Grid | None:
        """The grid of patches that images of this size give.

        Raises:
            ValueError: the encoder cannot take this size.
        """
        if image_size not in self._grids:
            self._grids[image_size] = dry_run(
                self, image_size, lambda encoder, images: encoder(images).grid, self.spec.name
            )
        return self._grids[image_size]


class BackboneEncoder(ImageEncoder):
    """A timm model as an encoder.

    Args:
        model: the timm model; owned by the encoder from now on.
        name: what errors and reports call it.
        image_size: side in pixels; None takes what the weights were trained at.
        mean: overrides the model's own.
        std: overrides the model's own.
        licence: overrides the one timm records.
        source: where the weights are from.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        self.model = model
        size = (image_size, image_size) if image_size else native_size(model)
        features = dry_run(model, size, final_features, name)
        self.spec = spec_from_model(
            model,
            features,
            size,
            name=name,
            mean=mean,
            std=std,
            licence=licence,
            source=source,
        )
        self.set_normalization(self.spec.mean, self.spec.std)
        self._layers: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        """Architecture and pooling."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        pooling = getattr(self.model, "global_pool", "")
        pooling = pooling if isinstance(pooling, str) else ""
        return f"timm/{config.get('architecture', type(self.model).__name__)}/{pooling}"

    def encode(self, images: Tensor) -> TokenFeatures:
        """Final features of the timm model, and the layers that were asked for."""
        if not self._layers:
            return final_features(self.model, images)
        layers, features = rung_features(self.model, images, self._plan)
        features.layers, features.layer_numbers = layers, self._layers
        return features

    def ask_layers(self, indices: Sequence[int]) -> list[tuple[int, Widths]]:
        """``encode`` also gives these blocks or stages from now on, seen as a student's rungs are.

        Returns:
            Number from 0 on, and widths, of each index.

        Raises:
            ValueError: the family has no intermediate features, or an index is out of range.
        """
        numbers = [
            plan_rungs(self.model, [index], self.spec.image_size, self.spec.name).indices[0]
            for index in indices
        ]
        every = sorted({*self._layers, *numbers})
        self._plan = plan_rungs(self.model, every, self.spec.image_size, self.spec.name)
        self._layers = self._plan.indices
        seen, _ = dry_run(
            self.model,
            self.spec.image_size,
            lambda model, images: rung_features(model, images, self._plan),
            self.spec.name,
        )
        return [(number, seen[every.index(number)].widths) for number in numbers]
