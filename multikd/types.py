"""The nouns that every room shares, and the one shape legend.

Shape legend: B images, T teachers, R rungs, V views, N = h·w patches on a grid ``(h, w)`` in
row-major order, D width (``D_s`` of the summary, ``D_p`` of a patch), K classes, (H, W) pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Grid = tuple[int, int]
TokenType = Literal["summary", "patches"]
TOKEN_TYPES: tuple[TokenType, ...] = ("summary", "patches")


class Widths(NamedTuple):
    """Widths of an encoder's two kinds of token; None where it has none of that kind."""

    summary: int | None
    patches: int | None


@dataclass
class TokenFeatures:
    """What an encoder says of a batch of images.

    Attributes:
        summary: ``(B, D_s)`` one vector an image (class token, pooled map, projected embedding).
        patches: ``(B, N, D_p)`` one vector a patch, row-major over ``grid``.
        grid: ``(h, w)`` with ``h * w == N``; None where there are no patches.
        logits: ``(B, K)`` where the encoder has a classifier.
        layers: intermediate features, where they were asked for.
        places: int64 ``(B, n)``, which patches of ``places_grid`` the ``n`` of ``patches`` are,
            where a cache kept only some; ``grid`` is None then.
        places_grid: the whole grid.
    """

    summary: Tensor | None = None
    patches: Tensor | None = None
    grid: Grid | None = None
    logits: Tensor | None = None
    layers: tuple[TokenFeatures, ...] = ()
    places: Tensor | None = None
    places_grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.patches is not None and self.grid is not None:
            h, w = self.grid
            if self.patches.ndim != 3 or self.patches.shape[1] != h * w:
                raise ValueError(
                    f"patches must be (B, {h * w}, D) for a grid of {h}×{w}, "
                    f"received {tuple(self.patches.shape)}"
                )

    @property
    def widths(self) -> Widths:
        """Widths of summary and patches."""
        return Widths(
            None if self.summary is None else self.summary.shape[-1],
            None if self.patches is None else self.patches.shape[-1],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenFeatures:
        """Apply ``function`` to every tensor, layers included."""
        return TokenFeatures(
            summary=None if self.summary is None else function(self.summary),
            patches=None if self.patches is None else function(self.patches),
            grid=self.grid,
            logits=None if self.logits is None else function(self.logits),
            layers=tuple(layer.map(function) for layer in self.layers),
            places=None if self.places is None else function(self.places),
            places_grid=self.places_grid,
        )

    def detach(self) -> TokenFeatures:
        """The same features outside the autograd graph."""
        return self.map(lambda t: t.detach())

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> TokenFeatures:
        """Move and/or cast every tensor."""

        def moved(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=kind, non_blocking=non_blocking)

        return self.map(moved)

    def pin_memory(self) -> TokenFeatures:
        """Copy every tensor into page-locked memory."""
        return self.map(lambda t: t.pin_memory())


class Fault(NamedTuple):
    """One sample that could not be read: where it was and why."""

    cause: str  # short and countable: "truncated", "undecodable", "too large", …
    shard: str
    key: str
    detail: str  # the library's own words


@dataclass
class Batch:
    """One batch as the loader yields it. A plain dataclass: Lightning refuses frozen ones.

    Attributes:
        views: V tensors, uint8 ``(B, 3, H, W)``; they become float in [0, 1] on the device.
        labels: int64 ``(B,)``, −1 where there is none.
        keys: B sample keys.
        dataset: int64 ``(B,)`` index of the data set in the mixture.
        positions: int64 ``(B,)`` place in the global order of this epoch; −1 marks a filler that
            pads an evaluation set to equal batches and must not be scored.
        samples: int64 ``(B,)`` index of the sample in its data set's index.
        soft_labels: ``(B, K)`` probabilities or None.
        view_parameters: float32 ``(B, V, P)``, the recorded draw each view is a function of.
        recorded: int64 ``(B,)``, which recorded view of its sample ``views[0]`` is; −1 where it is
            drawn anew each epoch.
        cached: teacher name → features of ``views[0]``, where a cache serves them.
        origins: ``dataset`` on the host, for choices that must not wait for the device.
        view_numbers: which of the training views ``views`` are, where only some were made.
        faults: samples that were replaced in this batch, with the cause.
    """

    views: list[Tensor]
    labels: Tensor
    keys: list[str]
    dataset: Tensor
    positions: Tensor
    samples: Tensor
    soft_labels: Tensor | None = None
    view_parameters: Tensor | None = None
    recorded: Tensor | None = None
    cached: dict[str, TokenFeatures] | None = None
    faults: list[Fault] = field(default_factory=list)
    origins: list[int] | None = None
    view_numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return dataclasses.replace(
            self,
            views=[function(view) for view in self.views],
            labels=function(self.labels),
            dataset=function(self.dataset),
            positions=function(self.positions),
            samples=function(self.samples),
            soft_labels=optional(self.soft_labels),
            view_parameters=optional(self.view_parameters),
            recorded=optional(self.recorded),
            cached=None
            if self.cached is None
            else {name: features.map(function) for name, features in self.cached.items()},
        )

    def first(self, count: int) -> Batch:
        """The first ``count`` images, of each view that shows so many."""
        if count >= len(self):
            return self
        origins = None if self.origins is None else self.origins[:count]
        cut = dataclasses.replace(self, keys=self.keys[:count], origins=origins)
        return cut._map(lambda t: t[:count])

    def take(self, rows: Sequence[int], index: Tensor) -> Batch:
        """The images at ``rows`` without their views; ``index (n,)`` is the same on the device."""
        origins = None if self.origins is None else [self.origins[row] for row in rows]
        keys = [self.keys[row] for row in rows]
        bare = dataclasses.replace(self, views=[], keys=keys, origins=origins)
        return bare._map(lambda t: t.index_select(0, index))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Move every tensor; Lightning calls this for us."""
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Page-lock every tensor; torch's DataLoader calls this with ``pin_memory=True``."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder without running it.

    ``image_size`` is what it was trained at; ``fixed_size`` says that it takes no other.
    ``patch_size`` is pixels per patch (the stride of the patch grid), so that an image of H×W
    gives a grid of about H/patch_size × W/patch_size.
    """

    name: str
    widths: Widths
    image_size: tuple[int, int]
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    fixed_size: bool = False
    num_prefix_tokens: int = 0
    num_classes: int = 0
    licence: str = "unknown"
    source: str = ""


@runtime_checkable
class Encoder(Protocol):
    """Images in, token features out. Knows its own normalisation; trainable or not."""

    spec: EncoderSpec

    def __call__(self, images: Tensor) -> TokenFeatures:
        """``images``: float ``(B, 3, H, W)`` in [0, 1] of a size that this encoder takes."""
        ...


class StudentOutput(NamedTuple):
    """One forward pass of a student: a ``TokenFeatures`` per rung, and what an export gives."""

    rungs: tuple[TokenFeatures, ...]
    features: TokenFeatures


def stack_token_features(parts: Sequence[TokenFeatures]) -> TokenFeatures:
    """Concatenate features of several batches along B; all must have the same grid."""
    if not parts:
        raise ValueError("stack_token_features needs at least one part, received none")
    grids = {part.grid for part in parts}
    if len(grids) > 1:
        raise ValueError(f"cannot concatenate features on several grids: {sorted(map(str, grids))}")

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        if present and len(present) != len(tensors):
            raise ValueError("cannot concatenate features of which some lack a token type")
        return torch.cat(present) if present else None

    return TokenFeatures(
        summary=cat([p.summary for p in parts]),
        patches=cat([p.patches for p in parts]),
        grid=parts[0].grid,
        logits=cat([p.logits for p in parts]),
    )
