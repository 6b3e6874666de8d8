"""One number for an encoder's weights, for caches to know theirs by."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weight_digest(encoder: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the weights, and the encoder's ``variant``.

    Values are rounded to bfloat16, the coarsest form a teacher's weights usually take, so that the
    float32 copy on a CPU and the bfloat16 one on a GPU have the same digest.

    Raises:
        ValueError: the encoder is on the meta device.
    """
    if any(tensor.is_meta for tensor in encoder.parameters()):
        raise ValueError("an encoder on the meta device has no weights to take a fingerprint of")
    digest = hashlib.sha256(str(getattr(encoder, "variant", "")).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        value = tensor.detach()
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{name}{tuple(value.shape)}".encode())
        plain = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()
