"""A linear classifier that was fitted on a frozen encoder's summaries, and its file.

The file is safetensors: ``weight (K, D)``, ``bias (K,)``, and as metadata ``about``, a JSON object
with the class names, the encoder's name and fingerprint, and how the fit came about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from multikd.files import write_atomically
from multikd.untrusted import parse_json


class ClassifierHead:
    """``logits = summary @ weightᵀ + bias`` in float32; of features without a summary, the mean of
    their patches. Not a module: it belongs to a frozen teacher (see ``teachers/base.py``).

    Args:
        weight: ``(K, D)``.
        bias: ``(K,)``.
        about: what is known of it.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """

    def __init__(self, weight: Tensor, bias: Tensor, about: Mapping[str, Any]) -> None:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(bias) < 2:
            raise ValueError(
                "a classifier has weight (K, D) and bias (K,) with two classes or more, received "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
            raise ValueError("a classifier's weights must be finite")
        self.weight, self.bias = weight.float().contiguous(), bias.float().contiguous()
        self.about = dict(about)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.bias)

    def digest(self) -> str:
        """SHA-256 of weight and bias."""
        found = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def to(self, device: torch.device) -> None:
        """Move it, in place."""
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)

    def __call__(self, summary: Tensor) -> Tensor:
        """``(B, D)`` → ``(B, K)`` float32."""
        return torch.nn.functional.linear(summary.float(), self.weight, self.bias)


def write_head(path: Path, head: ClassifierHead) -> None:
    """Write a classifier, whole or not at all."""
    tensors = {"weight": head.weight.cpu(), "bias": head.bias.cpu()}
    write_atomically(path, save(tensors, {"about": json.dumps(head.about)}))


def read_head(path: str | Path, width: int | None, encoder: str) -> ClassifierHead:
    """Read a classifier for an encoder whose vectors have ``width`` (None: it has none).

    Raises:
        ValueError: no such file, no classifier in it, or one of another width.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"there is no classifier at {path}: `multikd teachers fit-head --out {path}` fits one"
        )
    try:
        with safe_open(file, framework="pt") as content:
            about = (content.metadata() or {}).get("about", "{}")
            weight, bias = content.get_tensor("weight"), content.get_tensor("bias")
        told = parse_json(about, path)
        head = ClassifierHead(weight, bias, told if isinstance(told, dict) else {})
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(
            f"{path} holds no classifier ({' '.join(str(error).split())[:120]}): fit one with "
            "`multikd teachers fit-head`"
        ) from error
    if head.weight.shape[1] != width:
        raise ValueError(
            f"the classifier {path} is for vectors of {head.weight.shape[1]}, and {encoder} gives "
            f"{width}: fit one on this encoder with `multikd teachers fit-head`"
        )
    return head
