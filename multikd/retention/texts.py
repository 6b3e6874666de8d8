"""Text embeddings of class names, kept on disk: the tower is loaded for new ones alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
from torch import Tensor

from multikd.files import write_atomically

if TYPE_CHECKING:
    from multikd.retention.encoders import TextSource


def cached_weights(
    folder: Path, key: str, text: TextSource, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """``(K, D)`` unit rows for these classes; read from ``folder`` or computed and kept there.

    Raises:
        ValueError: the tower can't be had here, or a template has no ``{}``.
    """
    path = folder / f"{key[:32]}.safetensors"
    try:
        return safetensors.torch.load(path.read_bytes())["weights"]
    except (OSError, KeyError, safetensors.SafetensorError):
        pass
    weights = text.open().class_weights(classes, templates).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save({"weights": weights}))
    return weights
