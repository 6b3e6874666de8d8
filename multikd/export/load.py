"""``multikd.load(FOLDER)``: an exported student to use, with its heads and, for CLIP, its texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.backbones import shrink
from multikd.errors import unknown_name
from multikd.export import standalone
from multikd.export.folder import CONFIG, MANIFEST
from multikd.export.text import TEMPLATES, TextTower
from multikd.types import TokenFeatures
from multikd.untrusted import read_json


def load(folder: str | Path, device: torch.device | str = "cpu") -> LoadedStudent:
    """An exported student, in eval mode.

    Args:
        folder: what ``multikd export`` wrote.
        device: where to run.

    Raises:
        ValueError: not such a folder, or one that is damaged.
    """
    place = Path(folder)
    if not (place / CONFIG).is_file():
        raise ValueError(
            f"{str(place)!r} is no exported student (it has no config.json): give a folder that "
            "`multikd export` wrote"
        )
    try:
        model = standalone.load(place, _pruned(place))
        about = read_json(place / MANIFEST)
        if not isinstance(about, dict):
            raise ValueError(f"{MANIFEST} holds no mapping")
    except FileNotFoundError as error:
        raise ValueError(
            f"{place} lacks {Path(str(error.filename)).name}: export the student again"
        ) from error
    except Exception as error:  # timm, safetensors and torch have errors of their own
        raise ValueError(
            f"{place} can't be loaded ({' '.join(str(error).split())[:160]}): export it again"
        ) from error
    return LoadedStudent(place, model.to(device), about)


def _pruned(place: Path) -> nn.Module | None:
    """The encoder of a pruned student, which timm alone does not build; None of any other."""
    config = read_json(place / CONFIG)
    return shrink.load(place) if isinstance(config, dict) and config.get("pruned") else None


class LoadedStudent:
    """An exported student. Images are float ``(B, 3, H, W)`` in [0, 1] throughout.

    Attributes:
        folder: where it was loaded from.
        model: the torch module (encoder and heads).
        manifest: the content of ``manifest.json``.
    """

    def __init__(self, folder: Path, model: standalone.Student, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.model = model
        self.manifest = manifest
        self._texts: dict[tuple[str, str | None], TextTower] = {}

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the teachers whose heads are here."""
        return self.model.names

    def preprocess(self, images: Any) -> Tensor:
        """A PIL image, or a list of them → ``(B, 3, H, W)`` in [0, 1] at the student's size."""
        return self.model.preprocess(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> TokenFeatures:
        """The student's own features: ``summary (B, D)``, ``patches (B, N, D)``, ``grid``."""
        return TokenFeatures(*self.model.encode(images))

    def head(self, name: str) -> Callable[[Tensor], TokenFeatures]:
        """Images → features in the space of teacher ``name``.

        Raises:
            ValueError: there is no such head; the nearest is offered.
        """
        if name not in self.heads:
            raise unknown_name(
                "head", name, self.heads, "(heads are chosen by `multikd export --heads`)"
            )

        @torch.no_grad()
        def answer(images: Tensor) -> TokenFeatures:
            return TokenFeatures(*self.model([name], images)[name])

        return answer

    def text(self, name: str, checkpoint: str | None = None) -> TextTower:
        """The text tower of an open_clip teacher; loaded once.

        Args:
            name: the head.
            checkpoint: a local weight file of the whole CLIP model; None takes the teacher's tag,
                or the file that it was trained with where that is still there.
        """
        self.head(name)
        teacher = self.model.about["heads"][name]["teacher"]
        source = str(teacher.get("source", ""))
        if checkpoint is None and Path(source).is_file():
            checkpoint = source
        if (name, checkpoint) not in self._texts:
            encoder = str(teacher.get("encoder", ""))
            device = self.model.mean.device
            self._texts[name, checkpoint] = TextTower(encoder, checkpoint, device)
        return self._texts[name, checkpoint]

    def zero_shot(
        self,
        name: str,
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        checkpoint: str | None = None,
    ) -> ZeroShot:
        """A classifier of these classes: head ``name`` against its teacher's text tower."""
        tower = self.text(name, checkpoint)
        weights = tower.class_weights(classes, templates)
        return ZeroShot(self.head(name), tuple(classes), weights, tower.scale, tower.bias)

    def similarity(
        self, name: str, images: Tensor, texts: Sequence[str], checkpoint: str | None = None
    ) -> Tensor:
        """Cosine of images and texts ``(B, K)``: ``.topk`` of a column retrieves images."""
        found = _summary(self.head(name)(images))
        return found @ self.text(name, checkpoint).encode(texts).T

    def __repr__(self) -> str:
        heads = ", ".join(self.heads) or "none"
        return f"LoadedStudent({self.manifest.get('architecture')}, heads: {heads})"


class ZeroShot:
    """Images → class probabilities, without training.

    Attributes:
        classes: K names.
        weights: ``(K, D)``, L2-normalised.
    """

    def __init__(
        self,
        head: Callable[[Tensor], TokenFeatures],
        classes: tuple[str, ...],
        weights: Tensor,
        scale: float,
        bias: float,
    ) -> None:
        self.classes, self.weights = classes, weights
        self._head, self._scale, self._bias = head, scale, bias

    def logits(self, images: Tensor) -> Tensor:
        """``(B, K)``: scaled cosines, as the teacher was trained to compare."""
        return self._scale * _summary(self._head(images)) @ self.weights.T + self._bias

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities ``(B, K)``: softmax over the classes."""
        return self.logits(images).softmax(dim=-1)


def _summary(features: TokenFeatures) -> Tensor:
    if features.summary is None:
        raise ValueError(
            "this head predicts patches alone, so images can't be compared with texts: train with "
            "a loss on the summary"
        )
    return nn.functional.normalize(features.summary.float(), dim=-1)
