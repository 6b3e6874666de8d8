"""Pictures for the page: nearest neighbours, and principal components of patch tokens.

They lie as small PNGs in ``pictures/`` beside ``results.json``, named after their content, so that
an image shown for several encoders is stored once and ``results.json`` names it in 20 letters.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from multikd.evaluation.knn import nearest_neighbours
from multikd.evaluation.task import EvalSplit, Subject
from multikd.files import write_atomically
from multikd.types import Grid

Pixels = npt.NDArray[np.uint8]
FOLDER = "pictures"
SIZE = 64  # of a thumbnail: four a row on a phone
_NAME = re.compile(r"[0-9a-f]{16}\.png")
_LARGEST = 2**20
# A map of fewer squares shows nothing of what is in the image.
_FEWEST_PATCHES = 16


class Gallery:
    """Writes and reads the pictures of one results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def add(self, pixels: Pixels) -> str:
        """Store uint8 ``(H, W, 3)`` or ``(H, W)`` and return its name.

        Raises:
            OSError: the folder can't be written to.
        """
        if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]  # a grey image takes a third
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
        name = hashlib.sha256(data).hexdigest()[:16] + ".png"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / name).exists():
            write_atomically(self.folder / name, data)
        return name

    def read(self, name: object) -> bytes | None:
        """The PNG of that name; None where it is not one of ours.

        Names come from a file that anybody may have written: nothing but a file of this folder is
        ever read, and nothing but a PNG ends up in a page.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return None
        path = self.folder / name
        try:
            if path.is_symlink() or path.stat().st_size > _LARGEST:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def neighbours(
    subject: Subject,
    gallery: Gallery,
    *,
    bank: str = "train",
    queries: str = "test",
    rows: int = 5,
    columns: int = 5,
) -> dict[str, Any] | None:
    """Held-out images with the images of ``bank`` that the encoder finds most like them.

    Args:
        subject: an encoder before a data set.
        gallery: where thumbnails go.
        bank: split that is searched, by cosine over summaries.
        queries: split that the held-out images come from: one of each of the first ``rows``
            classes, or evenly spread ones where there are no labels.
        rows: held-out images.
        columns: neighbours of each.

    Returns:
        ``details["neighbours"]``: ``{"queries": [{"picture", "class", "neighbours": [{"picture",
        "class", "similarity"}]}]}``; None where the data set has no two such splits.
    """
    if bank not in subject.splits or queries not in subject.splits:
        return None
    searched, asked = subject.splits[bank], subject.splits[queries]
    if len(searched) == 0 or len(asked) == 0:
        return None
    chosen = _one_of_each(asked, rows)
    stored = subject.features(bank).summary
    seen = subject.features(queries).summary
    if stored is None or seen is None:
        return None
    found = nearest_neighbours(stored, seen[chosen], min(columns, len(searched)))

    def shown(split: EvalSplit, index: int) -> dict[str, Any]:
        return {
            "picture": gallery.add(_thumbnail(split, index)),
            "class": _class_name(split, index),
        }

    return {
        "queries": [
            {
                **shown(asked, index),
                "neighbours": [
                    {**shown(searched, j), "similarity": round(similarity, 4)}
                    for j, similarity in zip(near, similarities, strict=True)
                ],
            }
            for index, near, similarities in zip(
                chosen, found.indices.tolist(), found.similarities.tolist(), strict=True
            )
        ]
    }


def patch_components(
    subject: Subject, gallery: Gallery, *, split: str = "test", images: int = 4
) -> dict[str, Any] | None:
    """The first three principal components of an encoder's patch tokens as red, green and blue.

    As DINOv2 (Oquab et al. 2023, figure 1) draws them, over the patches of all ``images`` together
    and without masking the background. Each component is scaled from its 1st to its 99th
    percentile; its sign, which the method leaves open, is that of its largest loading.

    Returns:
        ``details["pca"]``: ``{"grid": [h, w], "explained": [3 shares], "images": [{"picture",
        "map", "class"}]}``; None where the encoder has no patch tokens, or fewer than 16, or the
        split is missing.
    """
    if split not in subject.splits or subject.spec.widths.patches is None:
        return None
    shown = subject.splits[split]
    if len(shown) == 0:
        return None
    chosen = _one_of_each(shown, images)
    size = subject.spec.image_size
    views = np.stack([shown.view(index, size) for index in chosen])
    with torch.no_grad():
        output = subject.encode(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255)
    if output.patches is None or output.grid is None or math.prod(output.grid) < _FEWEST_PATCHES:
        return None
    maps, explained = component_maps(output.patches.float().cpu(), output.grid)
    return {
        "grid": list(output.grid),
        "explained": [round(share, 4) for share in explained],
        "images": [
            {
                "picture": gallery.add(_thumbnail(shown, index)),
                "map": gallery.add(picture),
                "class": _class_name(shown, index),
            }
            for index, picture in zip(chosen, maps, strict=True)
        ],
    }


def component_maps(patches: Tensor, grid: Grid) -> tuple[list[Pixels], list[float]]:
    """Three principal components of patch tokens as pictures, one pixel a patch.

    Args:
        patches: ``(B, N, D)``.
        grid: ``(h, w)`` with h·w = N.

    Returns:
        B pictures uint8 ``(h, w, 3)`` and the share of the variance that each component explains.

    Raises:
        ValueError: the grid is not that of the patches, or they are not finite.
    """
    if patches.ndim != 3 or grid[0] * grid[1] != patches.shape[1]:
        raise ValueError(
            f"patches must be (B, {grid[0]}·{grid[1]}, D), received {tuple(patches.shape)}"
        )
    rows = patches.flatten(0, 1).double().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("patch tokens must be finite, received NaN or infinity")
    rows = rows - rows.mean(axis=0)
    _, strengths, directions = np.linalg.svd(rows, full_matrices=False)
    count = min(3, len(directions))
    directions = directions[:count]
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(count), largest])[:, None]
    projected = np.zeros((len(rows), 3))
    projected[:, :count] = rows @ directions.T
    low, high = np.percentile(projected, [1, 99], axis=0)
    span = high - low
    # A component without variance is grey, not noise.
    flat = span <= 1e-12 * max(float(np.abs(projected).max()), 1e-300)
    scaled = np.where(flat, 0.5, (projected - low) / np.where(flat, 1, span))
    pixels = (255 * scaled.clip(0, 1)).round().astype(np.uint8)
    variance = strengths**2
    total = float(variance.sum())
    shares = [float(v) / total if total > 0 else 0.0 for v in variance[:count]]
    return list(pixels.reshape(len(patches), *grid, 3)), shares + [0.0] * (3 - count)


def _one_of_each(split: EvalSplit, count: int) -> list[int]:
    """The first image of each of the first classes, or evenly spread images without labels."""
    labels = split.labels
    count = min(count, len(split))
    if labels is not None and labels.ndim == 1:
        first: dict[int, int] = {}
        for index, label in enumerate(labels.tolist()):
            if label >= 0:
                first.setdefault(label, index)
        if len(first) >= count:
            return [first[label] for label in sorted(first)[:count]]
    return [int(i) for i in np.linspace(0, len(split) - 1, count).round()]


def _class_name(split: EvalSplit, index: int) -> str | None:
    labels: Tensor | None = split.labels
    if labels is None or labels.ndim != 1:
        return None
    label = int(labels[index])
    if label < 0:
        return None
    classes: Sequence[str] | None = split.classes
    return str(label) if classes is None or label >= len(classes) else classes[label]


def _thumbnail(split: EvalSplit, index: int) -> Pixels:
    return split.view(index, (SIZE, SIZE))
