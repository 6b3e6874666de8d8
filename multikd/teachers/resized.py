"""Images that several teachers want in one size are resized once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch.nn import functional

from multikd.types import Grid

_Key = tuple[int, Grid, bool]
_SIZES: ContextVar[dict[_Key, tuple[Tensor, Tensor]] | None] = ContextVar("_SIZES", default=None)


@contextmanager
def shared_sizes() -> Iterator[None]:
    """Within, ``resized`` keeps what it made: for the teachers of one batch."""
    token = _SIZES.set({})
    try:
        yield
    finally:
        _SIZES.reset(token)


def resized(images: Tensor, size: Grid, align_corners: bool = False) -> Tensor:
    """Float images ``(B, 3, H, W)`` in [0, 1], bicubic to ``size``.

    Antialiased; with ``align_corners`` not, and the centres of the corner pixels stay (DUNE).

    Bicubic weights overshoot; an 8-bit image, which encoders were trained on, cannot: the result is
    cut to [0, 1]. It may be shared, so it must not be written to.
    """
    if size == (images.shape[2], images.shape[3]):
        return images
    known = _SIZES.get()
    key = (id(images), size, align_corners)
    # The images themselves are kept beside, so that no other tensor takes their id.
    if known is not None and key in known:
        return known[key][1]
    made = functional.interpolate(
        images.float(),
        size,
        mode="bicubic",
        antialias=not align_corners,
        align_corners=align_corners,
    ).clamp_(0.0, 1.0)
    if known is not None:
        known[key] = (images, made)
    return made
