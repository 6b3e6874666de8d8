"""Does an exported file answer as the torch model does? On several batches and resolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from multikd.export.deployed import DeployedEncoder

Runner = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]

BATCHES = (1, 2, 5)


def relative_error(received: Tensor, expected: Tensor) -> float:
    """Largest ``max|received − expected| / max|expected|`` of an image; inf where not finite.

    Each image has its own denominator, so that a strong one cannot hide a weak one.

    Raises:
        ValueError: of different shapes.
    """
    if received.shape != expected.shape:
        raise ValueError(
            f"the exported model gives {tuple(received.shape)} where the torch model gives "
            f"{tuple(expected.shape)}"
        )
    difference = (received.double() - expected.double()).flatten(1).abs().amax(dim=1)
    size = expected.double().flatten(1).abs().amax(dim=1)
    # An image whose features are all 0 must get exactly that.
    ratio = torch.where(difference == 0, 0.0, difference / size.clamp(min=1e-300))
    worst = float(ratio.max())
    return worst if math.isfinite(worst) else math.inf


def parity_shapes(encoder: DeployedEncoder, dynamic_size: bool) -> list[Shape]:
    """(batch, height, width) to compare at: batches at the own size, then other sizes."""
    height, width = encoder.spec.image_size
    shapes = [(batch, height, width) for batch in BATCHES]
    if encoder.preprocessing:
        return [*shapes, (2, 2 * height + 3, width + 17), (1, max(height // 2, 1), width)]
    if dynamic_size:
        # Multiples of the stride that every hierarchical family can halve.
        step = max(encoder.spec.patch_size or 32, 32)
        shapes += [(2, height + step, width + step), (1, height + 2 * step, width)]
    return shapes


def at_shape(images: Tensor, shape: Shape) -> Tensor:
    """Images repeated and resized to ``(B, 3, H, W)``, float in [0, 1]."""
    batch, height, width = shape
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    pixels = pixels[torch.arange(batch) % len(pixels)]
    if pixels.shape[-2:] != (height, width):
        pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1)


def synthetic_images(size: tuple[int, int], count: int = 5) -> Tensor:
    """Images with the 1/f spectrum of photographs, float ``(count, 3, H, W)`` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, *size, generator=generator)
    rows = torch.fft.fftfreq(size[0])[:, None]
    columns = torch.fft.rfftfreq(size[1])[None, :]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp(min=1 / max(size))
    images = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=size)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    scaled: Tensor = (images - low) / (high - low)
    return scaled


def check_images(images: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, str]:
    """The images to compare on, and whether they are ``real`` or ``synthetic``.

    Raises:
        ValueError: not ``(N, 3, H, W)``.
    """
    if images is None:
        return synthetic_images(size), "synthetic"
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"images to compare on must be (N, 3, H, W) with N > 0, received {tuple(images.shape)}"
        )
    return images, "real"


@torch.inference_mode()
def measure_parity(
    encoder: DeployedEncoder,
    run: Runner,
    shapes: Sequence[Shape],
    images: Tensor | None,
    tolerance: float,
) -> dict[str, Any]:
    """Compare ``run`` with the torch model at every shape.

    Args:
        encoder: the torch model.
        run: the exported one; same input, same output.
        shapes: (batch, height, width).
        images: uint8 or float in [0, 1]; None: synthetic ones.
        tolerance: largest relative error allowed.

    Returns:
        ``max_relative_error``, ``tolerance``, ``images``, ``cases``.

    Raises:
        ValueError: an error beyond the tolerance; it names the shape.
    """
    source, kind = check_images(images, encoder.spec.image_size)
    cases = []
    for shape in shapes:
        inputs = encoder.inputs(at_shape(source, shape)).contiguous()
        error = relative_error(run(inputs), encoder(inputs))
        batch, height, width = shape
        cases.append({"batch": batch, "height": height, "width": width, "error": error})
    worst = max(cases, key=lambda case: float(case["error"]))
    if not float(worst["error"]) <= tolerance:
        raise ValueError(
            f"the exported {encoder.spec.name} differs from the torch model by "
            f"{worst['error']:.1e} of its largest feature (allowed {tolerance:g}) at "
            f"{worst['batch']} images of {worst['height']}×{worst['width']}: nothing was written; "
            "use another format, or allow more on purpose"
        )
    return {
        "max_relative_error": worst["error"],
        "tolerance": tolerance,
        "images": kind,
        "cases": cases,
    }
