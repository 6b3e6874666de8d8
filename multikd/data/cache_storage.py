"""How cached features are kept: number format, PCA, fewer patches; and back again.

Shapes: B rows, N = h·w patches of the teacher's grid, n patches that are kept, D width, k principal
components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.grids import resample_patches
from multikd.types import Grid, TokenFeatures, TokenType

CacheDtype = Literal["float16", "bfloat16", "float32", "int8"]
Kept = Literal["summary", "patches", "logits"]
KEPT: tuple[Kept, ...] = ("summary", "patches", "logits")
"""What may be kept of a view. Logits are few, and are compared as probabilities: always float32."""
Ints = npt.NDArray[np.int64]

# NumPy has no bfloat16: its bits are stored as 16-bit integers.
STORED: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "float16": (np.dtype(np.float16), torch.float16),
    "bfloat16": (np.dtype(np.int16), torch.bfloat16),
    "float32": (np.dtype(np.float32), torch.float32),
    "int8": (np.dtype(np.int8), torch.int8),
}
_STEPS = 127
# Of the range that was measured: what comes later may lie a little outside.
_WIDER = 1.25
_CODEC_PARTS = ("centre", "scale", "mean", "basis")


@dataclass(frozen=True)
class CacheStorage:
    """What a cache keeps of each teacher.

    Attributes:
        dtype: number format of summaries, and of patches where ``patch_dtype`` is null.
        patch_dtype: number format of patches.
        pca: keep so many principal components of summaries; null: all channels as they are.
        patch_pca: the same of patches.
        patch_grid: pool patches to a grid of at most so many a side; null: the teacher's own.
        patch_sample: keep so many patches of each view, drawn anew for every view; null: all.
    """

    dtype: CacheDtype = "float16"
    patch_dtype: CacheDtype | None = None
    pca: int | None = None
    patch_pca: int | None = None
    patch_grid: int | None = None
    patch_sample: int | None = None

    def __post_init__(self) -> None:
        for name in (self.dtype, self.patch_dtype):
            if name is not None and name not in STORED:
                raise ValueError(f"features are kept as {', '.join(STORED)}, received {name!r}")
        for field in ("pca", "patch_pca", "patch_grid", "patch_sample"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{field} of a cache must be 1 or more, or null, received {value}")

    @property
    def lossless(self) -> bool:
        """Whether float32 features come back bit by bit."""
        return self == CacheStorage("float32") or self == CacheStorage("float32", "float32")

    def dtype_of(self, token: Kept) -> CacheDtype:
        """Number format of a token type, or of logits."""
        if token == "logits":
            return "float32"
        own = self.patch_dtype if token == "patches" else None
        return self.dtype if own is None else own

    def components(self, token: Kept) -> int | None:
        """Principal components that are kept of a token type; None for no PCA."""
        return {"summary": self.pca, "patches": self.patch_pca}.get(token)

    def measured(self, token: Kept) -> bool:
        """Whether example features must be measured first: a scale for int8, a basis for PCA."""
        return self.dtype_of(token) == "int8" or self.components(token) is not None

    def grid_of(self, grid: Grid) -> Grid:
        """The grid that patches of ``grid`` are kept on."""
        side = self.patch_grid
        return grid if side is None else (min(side, grid[0]), min(side, grid[1]))

    def kept_patches(self, grid: Grid | None, count: int) -> int:
        """n: how many patches are kept of the ``count`` of a view."""
        if grid is not None:
            kept = self.grid_of(grid)
            count = kept[0] * kept[1]
        return count if self.patch_sample is None else min(self.patch_sample, count)

    def examples(self) -> int:
        """Images whose features are measured for scale and basis."""
        return max(512, 4 * max(self.pca or 0, self.patch_pca or 0))

    def bytes_of(self, token: Kept, width: int, count: int = 1) -> int:
        """Bytes of one row of ``count`` tokens."""
        kept = self.components(token) or width
        return count * min(kept, width) * STORED[self.dtype_of(token)][0].itemsize


def places_of(rows: Ints, count: int, kept: int) -> Ints:
    """Which ``kept`` of ``count`` patches are kept of each row, ascending ``(B, kept)``.

    A function of the row alone, so that nothing needs be stored.
    """
    drawn = [np.random.default_rng([0x9A7C, int(r)]).permutation(count)[:kept] for r in rows]
    return np.sort(np.stack(drawn), axis=1).astype(np.int64)


def reduce_patches(features: TokenFeatures, storage: CacheStorage, rows: Ints | None) -> Tensor:
    """Patches ``(B, n, D)`` float32 as they are kept, before PCA and number format.

    Args:
        features: with patches.
        storage: what is kept.
        rows: ``(B,)`` of the cache; None leaves sampling out (to measure a basis).
    """
    if features.patches is None:
        raise ValueError("these features have no patches")
    patches = features.patches
    if features.grid is not None and storage.patch_grid is not None:
        patches = resample_patches(patches.float(), features.grid, storage.grid_of(features.grid))
    kept = patches.shape[1] if storage.patch_sample is None else storage.patch_sample
    if rows is None or kept >= patches.shape[1]:
        return patches
    places = torch.from_numpy(places_of(rows, patches.shape[1], kept)).to(patches.device)
    return patches.gather(1, places.unsqueeze(2).expand(-1, -1, patches.shape[2]))


@dataclass(frozen=True)
class TokenCodec:
    """Features of one token type to stored numbers and back.

    Attributes:
        dtype: number format.
        mean: ``(D,)`` taken away before the projection, with ``basis``.
        basis: ``(k, D)`` of orthonormal rows, or None.
        centre: ``(k or D,)`` of int8: what 0 stands for.
        scale: ``(k or D,)`` of int8: what one step is.
    """

    dtype: CacheDtype
    mean: Tensor | None = None
    basis: Tensor | None = None
    centre: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def measured(examples: Tensor, dtype: CacheDtype, components: int | None) -> TokenCodec:
        """Of example features ``(…, D)``: a basis (PCA over all of them) and a scale a channel.

        Raises:
            ValueError: fewer than two examples, or fewer than there are components.
        """
        rows = examples.detach().cpu().double().flatten(0, -2)
        if len(rows) < 2 or (components is not None and len(rows) < components):
            raise ValueError(
                f"int8 and PCA are measured on examples, and {len(rows)} are too few: keep the "
                "features as float16, or with fewer components"
            )
        mean = basis = None
        if components is not None and components < rows.shape[1]:
            mean = rows.mean(dim=0)
            rows = rows - mean
            vectors = torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors
            basis = vectors.flip(1)[:, :components].T.contiguous()
            rows = rows @ basis.T
        centre = scale = None
        if dtype == "int8":
            low, high = rows.amin(dim=0), rows.amax(dim=0)
            half = (high - low) / 2
            # A channel that hardly moved in the examples may move later.
            half = half.clamp(min=max(float(half.median()) * 0.05, 1e-12)) * _WIDER
            centre, scale = (low + high) / 2, half / _STEPS
        parts = [None if p is None else p.float() for p in (mean, basis, centre, scale)]
        return TokenCodec(dtype, *parts)

    @staticmethod
    def of_tensors(dtype: CacheDtype, tensors: Mapping[str, Tensor], token: str) -> TokenCodec:
        """Back from a codec file's tensors."""
        parts = {p: tensors.get(f"{token}.{p}") for p in _CODEC_PARTS}
        if dtype == "int8" and (parts["centre"] is None or parts["scale"] is None):
            raise ValueError(f"the scale of {token} is missing")
        return TokenCodec(dtype, **parts)

    def tensors(self, token: str) -> dict[str, Tensor]:
        """What a codec file holds of it."""
        found = {f"{token}.{p}": getattr(self, p) for p in _CODEC_PARTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def encode(self, values: Tensor) -> Tensor:
        """``(…, D)`` → stored ``(…, k or D)`` on the CPU, bfloat16 as its bits."""
        values = values.detach()
        if self.basis is not None and self.mean is not None:
            mean, basis = self.mean.to(values.device), self.basis.to(values.device)
            values = (values.float() - mean) @ basis.T
        if self.centre is not None and self.scale is not None:
            centre, scale = self.centre.to(values.device), self.scale.to(values.device)
            steps = (values.float() - centre) / scale
            if not bool(torch.isfinite(steps).all()):
                raise ValueError("values that are not finite")
            return steps.round_().clamp_(-_STEPS, _STEPS).to(torch.int8).cpu().contiguous()
        stored = values.to(STORED[self.dtype][1]).cpu().contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"values that are not finite in {self.dtype}")
        return stored.view(torch.int16) if self.dtype == "bfloat16" else stored

    def decode(self, stored: npt.NDArray[Any]) -> Tensor:
        """Back: in the stored format, or float32 where there was int8 or PCA."""
        values = torch.from_numpy(stored)
        if self.dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        if self.centre is not None and self.scale is not None:
            values = values.float() * self.scale + self.centre
        if self.basis is not None and self.mean is not None:
            values = values.float() @ self.basis + self.mean
        return values


def measure_codecs(
    examples: TokenFeatures, storage: CacheStorage, needed: Mapping[Kept, bool]
) -> dict[TokenType, TokenCodec]:
    """A codec for each token type that ``examples`` has."""
    found: dict[TokenType, TokenCodec] = {}
    for token in cast(tuple[TokenType, ...], ("summary", "patches")):
        tensor = getattr(examples, token)
        if tensor is None:
            continue
        dtype = storage.dtype_of(token)
        if not needed.get(token, False):
            found[token] = TokenCodec(dtype)
            continue
        rows = tensor if token == "summary" else reduce_patches(examples, storage, None)
        found[token] = TokenCodec.measured(rows.float(), dtype, storage.components(token))
    return found
