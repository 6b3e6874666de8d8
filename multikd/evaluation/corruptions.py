"""Common corruptions of images: the fifteen of ImageNet-C, five severities.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019). The functions are those of the library ``imagecorruptions-imaug``, which
carries the published ones to any image size; strengths in pixels (blur, pixelation, elastic shifts)
stay those of 224 px, so that small images suffer more from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from multikd.errors import MissingExtraError, unknown_name

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 32
# These two draw from generators of their own, which take a seed.
_SEEDED = ("impulse_noise", "glass_blur")


def corrupt(
    image: npt.NDArray[np.uint8], name: str, severity: int, seed: int = 0
) -> npt.NDArray[np.uint8]:
    """One image, corrupted; the same arguments always give the same pixels.

    Args:
        image: uint8 ``(H, W, 3)`` RGB, both sides at least 32.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of noise, flakes and directions; give every image its own.

    Returns:
        uint8 ``(H, W, 3)``. NumPy's global generator is afterwards as it was.

    Raises:
        MissingExtraError: the library is not installed.
        ValueError: an unknown name, a severity out of range, or an image that is too small.
    """
    check_corruptions((name,), (severity,))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image to corrupt must be uint8 (H, W, 3), received {image.dtype} {image.shape}"
        )
    if min(image.shape[:2]) < LEAST_SIDE:
        raise ValueError(
            f"corruptions need images of at least {LEAST_SIDE} px, received "
            f"{image.shape[0]}×{image.shape[1]}"
        )
    library = require_corruptions()
    digest = hashlib.sha256(f"{name}/{severity}/{seed}".encode()).digest()
    number = int.from_bytes(digest[:4], "little")
    options = {"seed": number} if name in _SEEDED else {}
    with _seeded(number):
        corrupted = library.corrupt(
            np.ascontiguousarray(image), severity=severity, corruption_name=name, **options
        )
    result: npt.NDArray[np.uint8] = np.asarray(corrupted, dtype=np.uint8)
    return result


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]
) -> float:
    """mCE: the mean over corruptions of ``Σ_s error / Σ_s reference error`` (1 = the reference's).

    Args:
        errors: corruption → error rate at each severity.
        reference: the same of the reference encoder (AlexNet in the paper).

    Raises:
        ValueError: other corruptions or severities, or a reference without any error.
    """
    if set(errors) != set(reference) or not errors:
        raise ValueError("mCE needs the same corruptions of both encoders, at least one")
    ratios = []
    for name, row in errors.items():
        base = sum(reference[name])
        if len(row) != len(reference[name]) or base <= 0:
            raise ValueError(
                f"mCE needs the same severities of both encoders and a reference that errs; "
                f"{name} has {len(row)} and {len(reference[name])}, and the sum {base}"
            )
        ratios.append(sum(row) / base)
    return sum(ratios) / len(ratios)


def check_corruptions(names: Sequence[str], severities: Sequence[int]) -> None:
    """Refuse unknown names and severities.

    Raises:
        ValueError: there is one, or none at all is given.
    """
    for name in names:
        if name not in CORRUPTIONS:
            raise unknown_name("corruption", name, CORRUPTIONS)
    if not names or not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(
            f"corruptions need at least one name and severities from 1 to 5, received "
            f"{len(names)} names and {list(severities)}"
        )


def require_corruptions() -> Any:
    """The library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise MissingExtraError(
            "imagecorruptions-imaug", "robustness", "scoring on corrupted images"
        ) from error
    return imagecorruptions


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The library draws from NumPy's global generator.
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
