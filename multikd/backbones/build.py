"""timm models by name, with the settings that the family has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import timm
from torch import nn

from multikd.backbones.kernels import use_quick_operators
from multikd.backbones.weights import load_weights, read_state_dict
from multikd.errors import unknown_name

_skeleton: ContextVar[bool] = ContextVar("multikd_skeleton", default=False)

# A value that a family may lack without harm; any other refused setting is the user's mistake.
_OPTIONAL = ("dynamic_img_size", "img_size")
# timm's names of settings that have names here, which would otherwise have two values.
_OURS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "drop_path_rate": "drop_path",
    "num_classes": "num_classes",
    "global_pool": "global_pool",
    "in_chans": "nothing (images are RGB)",
    "dynamic_img_size": "nothing (it is always on)",
    "pretrained": "pretrained",
}


@contextmanager
def skeleton() -> Iterator[None]:
    """Inside, no model loads weights: any config builds anywhere, on the meta device too."""
    token = _skeleton.set(True)
    try:
        yield
    finally:
        _skeleton.reset(token)


def is_skeleton() -> bool:
    """Whether ``skeleton()`` is in force."""
    return _skeleton.get()


@cache
def known_names() -> tuple[str, ...]:
    """Every timm architecture, and every ``architecture.tag`` with pretrained weights."""
    return (*timm.list_models(), *timm.list_pretrained())


def build_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    num_classes: int | None = None,
    global_pool: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model and load its weights.

    Args:
        name: ``architecture``, ``architecture.tag`` or ``local-dir:PATH``.
        pretrained: weights from the hub (for ``local-dir:``, from the folder).
        checkpoint: a weight file; excludes ``pretrained``.
        image_size: square input in pixels; families without such a setting take any size.
        patch_size: patch of a ViT; a ValueError for families without one.
        drop_path: stochastic depth rate; a ValueError for families without it.
        num_classes: None keeps the classifier that the weights have, 0 removes it.
        global_pool: pooling of the head (``token``, ``avg``, ``map``…); None keeps the model's.
        model_args: further arguments of the family's timm constructor (``depth``, ``embed_dim``…).

    Raises:
        ValueError: unknown name (nearest offered), a setting the family lacks, weights that
            do not fit or cannot be fetched.
    """
    if not name.startswith(("local-dir:", "hf-hub:")):
        architecture, _, _ = name.partition(".")
        if name not in known_names() and architecture not in known_names():
            raise unknown_name("timm model", name, known_names())
        if "." in name and name not in known_names():
            tags = [n for n in known_names() if n.startswith(architecture + ".")]
            raise unknown_name("pretrained tag", name, tags)
    if pretrained and checkpoint is not None:
        raise ValueError(f"{name}: give either pretrained=True or checkpoint, not both")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path must be in [0, 1), received {drop_path}")
    settings: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch_size,
        # Said even where it is 0: Swin, for one, has a rate of its own by default.
        "drop_path_rate": drop_path,
        "num_classes": num_classes,
        "global_pool": global_pool,
        # Positions are resampled only when an image of another size comes, so that at the native
        # size the numbers are those of the plain model, bit for bit.
        "dynamic_img_size": True,
    }
    own = dict(model_args or {})
    for key in own:
        if key in _OURS:
            raise ValueError(f"model_args names {key!r}: give it as {_OURS[key]}")
    # Before the model is built: a large one takes longer than the sentence about its file.
    tensors = None if checkpoint is None or is_skeleton() else read_state_dict(checkpoint)
    model = _create(
        name,
        pretrained and not is_skeleton(),
        {key: value for key, value in settings.items() if value is not None} | own,
        frozenset(own),
    )
    if tensors is not None:
        load_weights(
            model,
            tensors,
            Path(str(checkpoint)).name,
            adapt_classifier=num_classes is None,
        )
    return model


def _create(
    name: str, pretrained: bool, settings: dict[str, Any], asked: frozenset[str]
) -> nn.Module:
    while True:
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
            use_quick_operators(model)
            return model
        except TypeError as error:
            refused = [key for key in settings if f"'{key}'" in str(error)]
            if "unexpected keyword" not in str(error) or not refused:
                if not asked:
                    raise
                raise ValueError(
                    f"timm cannot build {name} with model_args {sorted(asked)}: {_short(error)}"
                ) from error
            wrong = [
                key
                for key in refused
                if key in asked or (key not in _OPTIONAL and settings[key] != 0)
            ]
            if wrong:
                raise ValueError(
                    f"{name} has no setting {wrong[0]!r} (received {settings[wrong[0]]!r}): "
                    "leave it out"
                ) from error
            settings = {key: value for key, value in settings.items() if key not in refused}
        except Exception as error:
            if not pretrained:
                raise ValueError(f"timm cannot build {name}: {_short(error)}") from error
            if "No pretrained weights exist" in str(error):
                raise ValueError(
                    f"timm has no pretrained weights for {name}: name a tag "
                    f"('{name.partition('.')[0]}.TAG'), give checkpoint=PATH or pretrained=False"
                ) from error
            raise ValueError(
                f"the weights of {name} could not be loaded from their source ({_short(error)}): "
                "without a connection give checkpoint=PATH of a local weight file"
            ) from error


def _short(error: Exception) -> str:
    """Kind of error and its first sentence: hubs explain at length."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
