"""What an encoder turns out to be: found by running one image through it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multikd.teachers.base import Teacher
from multikd.types import Grid


@dataclass(frozen=True)
class EncoderReport:
    """One encoder and one image.

    ``milliseconds`` is the time of one image after a first one; ``top_classes`` the five largest
    logits as (class index, probability), empty without a classifier.
    """

    name: str
    source: str
    licence: str
    parameters: int
    image_size: Grid
    patch_size: int
    fixed_size: bool
    prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    summary: tuple[int, ...] | None
    patches: tuple[int, ...] | None
    grid: Grid | None
    classes: int
    top_classes: tuple[tuple[int, float], ...]
    image: str
    device: str
    milliseconds: float
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def text(self) -> str:
        """The report as lines."""
        size = "×".join(map(str, self.image_size))
        rows = [
            ("encoder", self.name),
            ("weights", self.source),
            ("licence", self.licence),
            ("parameters", f"{self.parameters / 1e6:.2f} M"),
            ("image size", f"{size} px{' (no other)' if self.fixed_size else ''}"),
            ("patch", f"{self.patch_size} px"),
            ("prefix tokens", str(self.prefix_tokens)),
            ("mean / std", f"{_rounded(self.mean)} / {_rounded(self.std)}"),
            ("summary", "none" if self.summary is None else f"{self.summary} (B, D)"),
            ("patches", "none" if self.patches is None else f"{self.patches} (B, N, D)"),
            ("grid", "none" if self.grid is None else f"{self.grid[0]}×{self.grid[1]}"),
            ("classes", str(self.classes or "none")),
            ("image", self.image),
            ("time", f"{self.milliseconds:.1f} ms an image on {self.device}"),
            ("fingerprint", self.fingerprint[:16]),
        ]
        if self.top_classes:
            best = ", ".join(f"{index} ({p:.0%})" for index, p in self.top_classes)
            rows.insert(12, ("top classes", best))
        return "\n".join(f"{key:<14} {value}" for key, value in rows)


def inspect_encoder(
    name: str,
    checkpoint: str | None = None,
    image: str | Path | None = None,
    image_size: int | None = None,
) -> EncoderReport:
    """Load an encoder and run one image (random pixels without one).

    Raises:
        ValueError: unknown name, or a file that is no image.
    """
    teacher = Teacher(name, checkpoint=checkpoint, image_size=image_size)
    spec = teacher.spec
    pixels = _random(spec.image_size) if image is None else read_image(image, spec.image_size)
    teacher(pixels)
    start = time.perf_counter()
    features = teacher(pixels)
    milliseconds = (time.perf_counter() - start) * 1000
    top: tuple[tuple[int, float], ...] = ()
    if features.logits is not None:
        values, indices = features.logits.float().softmax(-1)[0].topk(min(5, spec.num_classes))
        top = tuple((int(i), float(v)) for i, v in zip(indices, values, strict=True))
    return EncoderReport(
        name=spec.name,
        source=spec.source,
        licence=spec.licence,
        parameters=teacher.num_parameters,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        fixed_size=spec.fixed_size,
        prefix_tokens=spec.num_prefix_tokens,
        mean=spec.mean,
        std=spec.std,
        summary=None if features.summary is None else tuple(features.summary.shape),
        patches=None if features.patches is None else tuple(features.patches.shape),
        grid=features.grid,
        classes=spec.num_classes,
        top_classes=top,
        image="random pixels" if image is None else str(image),
        device="cpu",
        milliseconds=milliseconds,
        fingerprint=teacher.fingerprint(),
    )


def _random(size: Grid) -> Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))


def read_image(path: str | Path, size: Grid) -> Tensor:
    """An image file as float ``(1, 3, H, W)`` in [0, 1]: shorter side resized, centre cropped."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.fit(
                file.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC
            )
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pixels[None].float() / 255.0


def _rounded(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.3f}" for v in values) + ")"
