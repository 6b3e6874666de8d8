"""A released file: its tensors, the arguments beside them, and whose layout they have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from multikd.backbones.weights import read_weight_file, tensors_of
from multikd.errors import unknown_name
from multikd.published.publishers import PUBLISHERS, Kind
from multikd.untrusted import read_json

# In front of names after wrapping for several GPUs, and by torch.compile.
_WRAPPING = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Released:
    """What was read of a file.

    Attributes:
        path: the file.
        tensors: by name, without the names of wrappers.
        arguments: of the program that trained it, from the file or the ``config.json`` beside it;
            empty where there are none.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any]

    def starting(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def has(self, part: str) -> bool:
        """Whether a tensor's name contains ``part``."""
        return any(part in key for key in self.tensors)


def read_released(path: Path) -> Released:
    """Read a file without running anything in it.

    Raises:
        ValueError: no such file, a truncated one, one that holds code, or no tensors.
    """
    if not path.is_file():
        raise ValueError(
            f"no file at {str(path)!r}: give the path of a downloaded checkpoint (nothing is "
            "fetched here)"
        )
    content = read_weight_file(path)
    tensors: dict[str, Tensor] = {}
    for key, tensor in tensors_of(content, path).items():
        name = key
        while name.startswith(_WRAPPING):
            name = name.removeprefix("module.").removeprefix("_orig_mod.")
        tensors[name.replace("._orig_mod.", ".")] = tensor
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if arguments is None and path.suffix == ".safetensors":
        arguments = _arguments_beside(path)
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return Released(path, tensors, arguments if isinstance(arguments, Mapping) else {})


def _arguments_beside(path: Path) -> Any:
    """The ``args`` of the ``config.json`` beside a file from the hub; None without.

    Raises:
        ValueError: it is damaged.
    """
    try:
        config = read_json(path.parent / "config.json")
    except FileNotFoundError:
        return None
    return config.get("args") if isinstance(config, Mapping) else None


def kind_of(released: Released) -> Kind:
    """Whose layout a file has.

    Raises:
        ValueError: nobody's that is known here, or one that others publish in, too.
    """
    if released.has("patch_generator."):
        return "radio"
    if released.has("embeddings.patch_embeddings.projection."):
        return "theia"
    if any(key.startswith("encoder.blocks.") for key in released.tensors):
        ours = "enc_args" in released.arguments or released.has("encoder.register_tokens")
        return "dune" if ours else "unic"
    if "storage_tokens" in released.tensors:
        if "eupe" in released.path.name.lower():
            return "eupe"
        raise ValueError(
            f"{released.path} has the layout of a DINOv3 ViT, which EUPE shares: say --kind eupe "
            "if it is EUPE's (its licence goes into the card); timm loads DINOv3 itself"
        )
    raise other_layout(released)


def other_layout(released: Released, kind: Kind | None = None) -> ValueError:
    """The sentence for a file that is not of ``kind`` (None: not of any)."""
    found = ", ".join(list(released.tensors)[:3])
    more = max(len(released.tensors) - 3, 0)
    if kind is None:
        wanted = "; ".join(f"{name}: {about.layout}" for name, about in PUBLISHERS.items())
        return ValueError(
            f"{released.path} has none of the layouts known here, expected one of ({wanted}), "
            f"found {found} and {more} more"
        )
    return ValueError(
        f"{released.path} is no file of {PUBLISHERS[kind].repository}: expected "
        f"{PUBLISHERS[kind].layout}, found {found} and {more} more"
    )


def check_kind(kind: str) -> Kind | None:
    """A kind by name; None for ``auto``.

    Raises:
        ValueError: there is no such kind; the nearest is offered.
    """
    if kind == "auto":
        return None
    for known in PUBLISHERS:
        if kind == known:
            return known
    raise unknown_name("kind of released file", kind, ("auto", *PUBLISHERS))
