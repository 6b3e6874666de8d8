"""A teacher whose features are kept: known by what its cache says, loaded only if it must run.

A run on a complete feature cache asks a teacher for its widths, its grid, its licence and its
fingerprint. A cache notes these, with an identity of the settings that the teacher was made from
(and size and time of its weight file); where the settings of a config have that identity, no
encoder is built. If the teacher is run after all, it is built then, and must have the noted
fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.teachers.base import Teacher
from multikd.types import EncoderSpec, Grid, TokenFeatures, Widths

_SCHEMES = ("timm:", "packaged:", "open_clip:", "torchvision:")
_SETTINGS = "made_from"


def identity(settings: Mapping[str, Any]) -> str | None:
    """What the weights and preprocessing of ``Teacher(**settings)`` depend on, without loading it.

    None where that can't be known: encoders that are modules, folders, or classes of a user's own.
    """
    encoder = settings.get("encoder")
    if not isinstance(encoder, str) or not encoder.startswith(_SCHEMES) or "local-dir" in encoder:
        return None
    files = {"checkpoint": "weights", "head": "head"}
    facts = {k: v for k, v in sorted(settings.items()) if v is not None and k not in files}
    for setting, fact in files.items():
        if settings.get(setting) is None:
            continue
        path = Path(settings[setting])
        try:
            status = path.stat()
        except OSError:
            return None
        facts[fact] = [path.name, status.st_size, status.st_mtime_ns]
    for package in ("timm", "open_clip_torch", "torchvision", "multikd"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return json.dumps(facts, default=str)


def remember(teacher: Teacher, settings: Mapping[str, Any]) -> Teacher:
    """Note the settings that a teacher was made from."""
    teacher.__dict__[_SETTINGS] = dict(settings)
    return teacher


def facts_of(teacher: Teacher, sizes: Sequence[Grid], student_patch: int | None) -> dict[str, Any]:
    """What a cache notes of a teacher, as JSON values."""
    facts: dict[str, Any] = {"encoder": teacher.spec.name, "parameters": teacher.num_parameters}
    settings = teacher.__dict__.get(_SETTINGS)
    known = None if settings is None else identity(settings)
    if known is None or teacher.resize == "grid":
        return facts
    grids = [[*size, teacher.grid_for(size, student_patch)] for size in sizes]
    return facts | {
        "identity": known,
        "fingerprint": teacher.fingerprint(),
        "spec": dataclasses.asdict(teacher.spec),
        "grids": grids,
    }


def make_teacher(known: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> Teacher:
    """Build a teacher, or stand in for one that a cache knows.

    Args:
        known: identity → facts, of the cache that the run reads.
        kwargs: the teacher's settings.
    """
    facts = known.get(identity(kwargs) or "")
    if facts is not None:
        try:
            return remember(KeptTeacher(facts, kwargs), kwargs)
        except (KeyError, TypeError, ValueError):
            pass  # a stranger's notes: the teacher itself is better
    return load_teacher(kwargs)


def load_teacher(settings: Mapping[str, Any]) -> Teacher:
    """``Teacher(**settings)``, which draws no random numbers from the run.

    Weights are drawn before they are loaded: the student's must not depend on who teaches it, on
    whether the teachers are loaded at all or when, nor, with a partition, on the rank.
    """
    with torch.random.fork_rng(devices=[]):
        return remember(Teacher(**settings), settings)


class KeptTeacher(Teacher):
    """Stands in for ``Teacher(**settings)`` until it must run.

    Args:
        facts: of :func:`facts_of`.
        settings: of the teacher.
    """

    def __init__(self, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        told = dict(facts["spec"])
        for name in ("image_size", "mean", "std"):
            told[name] = tuple(told[name])
        self._spec = EncoderSpec(**{**told, "widths": Widths(*told["widths"])})
        self._fingerprint = str(facts["fingerprint"])
        self._parameters_known = int(facts["parameters"])
        self._grids = {
            (int(h), int(w)): None if grid is None else (int(grid[0]), int(grid[1]))
            for h, w, grid in facts["grids"]
        }
        self._make: Callable[[], Teacher] = functools.partial(load_teacher, settings)
        self._device = torch.device("cpu")
        self._borrowed = False
        self._digest = None
        self.resize = settings.get("resize", "own")
        self.align_corners = settings.get("align_corners", False)
        self.dtype_name = settings.get("dtype", "auto")
        self.mosaic = settings.get("mosaic", 1)
        self.channels_last = False
        self._head = self._bias = None  # come with the encoder
        self.temperature = settings.get("temperature", 1.0)
        self.training = False

    @property
    def loaded(self) -> bool:
        """Whether the encoder was built after all."""
        return "_encoder" in self.__dict__

    @property
    def encoder(self) -> nn.Module:
        """The frozen encoder; built when it is first asked for.

        Raises:
            ValueError: it is not the one whose features were kept.
        """
        if not self.loaded:
            real = self._make()
            self._check(real)
            real._apply(lambda tensor: tensor.to(self._device))
            self.__dict__["_encoder"] = real.encoder
            self.channels_last, self._digest = real.channels_last, real._digest
            self._head, self._bias = real._head, real._bias
        found: nn.Module = self.__dict__["_encoder"]
        return found

    def _check(self, real: Teacher) -> None:
        if real.fingerprint() != self._fingerprint:
            raise ValueError(
                f"the weights of {self._spec.name} are not those whose features were kept "
                f"(their fingerprint is {real.fingerprint()[:12]}… and was "
                f"{self._fingerprint[:12]}…): remove the cache, or give the former weights"
            )

    @property
    def spec(self) -> EncoderSpec:
        """As noted."""
        return self._spec

    @property
    def num_parameters(self) -> int:
        """As noted."""
        return self._parameters_known

    def fingerprint(self) -> str:
        """As noted."""
        return self._fingerprint

    def grid_for(self, image_size: Grid, student_patch: int | None = None) -> Grid | None:
        """As noted for the sizes of the run; others ask the encoder."""
        size = (image_size[0], image_size[1])
        if not self.loaded and size in self._grids:
            return self._grids[size]
        return super().grid_for(image_size, student_patch)

    def forward(self, images: Tensor, student_patch: int | None = None) -> TokenFeatures:
        """Build it if need be, and run it."""
        if not self.loaded:
            _ = self.encoder
        features: TokenFeatures = super().forward(images, student_patch)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptTeacher:
        if self.loaded:
            super()._apply(fn, recurse)
        elif not self._borrowed:
            self._device = fn(torch.zeros((), device=self._device)).device
        return self
