"""What decides an encoder's features, as one number."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence

import timm
import torch
from torch import nn

from multikd import __version__
from multikd.types import EncoderSpec

FORMAT = 1  # of the features: raise it when extraction changes what it computes


def fingerprint(modules: Sequence[nn.Module], spec: EncoderSpec) -> str:
    """SHA-256 over the exact weights, the code's version and the normalisation.

    Unlike a teacher's fingerprint nothing is rounded: the smallest change of a weight counts. Names
    and licences do not.
    """
    digest = hashlib.sha256(f"{FORMAT}|{__version__}|{timm.__version__}".encode())
    for module in modules:
        digest.update(f"|{type(module).__qualname__}{getattr(module, 'variant', '')}".encode())
        digest.update(_source_of(module).encode())
        for name, tensor in sorted(module.state_dict().items()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    facts = (spec.mean, spec.std, spec.interpolation, spec.patch_size, spec.widths)
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def _source_of(module: nn.Module) -> str:
    """The code of a class that is neither ours nor timm's: users change theirs."""
    kind = type(module)
    if kind.__module__.split(".")[0] in ("multikd", "timm", "torch", "open_clip"):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
