"""A teacher that is trained along with its student: a timm encoder with a classifier of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from multikd.backbones import freeze_unread, is_skeleton, read_state_dict
from multikd.teachers.encoder import BackboneEncoder
from multikd.teachers.fingerprint import weight_digest
from multikd.teachers.registry import load_encoder
from multikd.teachers.resized import resized
from multikd.types import EncoderSpec, TokenFeatures


class TrainableTeacher(nn.Module):
    """An encoder with a linear classifier on its summary; registered, trained and checkpointed.

    Unlike ``Teacher`` it follows ``train()``, has gradients, and stays in the dtype of the run.

    Args:
        encoder: ``timm:NAME``, ``packaged:efficientnet_lite0`` or ``exported:FOLDER``, or a
            ``BackboneEncoder``, which is taken over.
        num_classes: of the classifier. With ``head`` it must be the file's; without, a classifier
            of another size than the encoder's own starts at random. None: the file's, else the
            encoder's own.
        head: safetensors file with ``weight (K, D)`` and ``bias (K)``, as
            ``multikd teachers fit-head`` writes it.
        image_size: side of the images it sees (with ``resize="own"``); None takes its own.
        resize: ``own`` resizes to its image size (bicubic, antialiased); ``none`` leaves images.
        checkpoint: a local weight file, for encoders given by name.
        licence: overrides the recorded one.

    Raises:
        ValueError: an encoder that is no timm model, no classifier, or a head that does not fit.
    """

    def __init__(
        self,
        encoder: str | BackboneEncoder,
        num_classes: int | None = None,
        head: str | None = None,
        image_size: int | None = None,
        resize: Literal["own", "none"] = "own",
        checkpoint: str | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        if resize not in ("own", "none"):
            raise ValueError(f"resize must be 'own' or 'none', received {resize!r}")
        built: object = encoder
        if isinstance(encoder, str):
            built = load_encoder(encoder, checkpoint, image_size=image_size)
        if not isinstance(built, BackboneEncoder):
            raise ValueError(
                f"{encoder if isinstance(encoder, str) else type(encoder).__name__} can't be a "
                "teacher that is trained: give timm:NAME, packaged:NAME or exported:FOLDER"
            )
        self.encoder = built
        self.resize = resize
        self.licence = licence or built.spec.licence
        width = built.spec.widths.summary
        if width is None:
            raise ValueError(f"{built.spec.name} has no summary to classify: give another encoder")
        self.classifier = self._classifier(width, num_classes, head)
        built.model.reset_classifier(0)  # type: ignore[operator]
        self._digest: str | None = None
        if not any(p.is_meta for p in self.parameters()):
            self._digest = self._fingerprint()

    def _classifier(self, width: int, num_classes: int | None, head: str | None) -> nn.Linear:
        own = self._own_classifier(width)
        # Without weights a head still says how many classes there are; it may not be fitted yet.
        if head is not None and (not is_skeleton() or Path(head).is_file()):
            weight, bias = read_head(head, width)
            if num_classes not in (None, len(bias)):
                raise ValueError(
                    f"the head {head} has {len(bias)} classes and num_classes is {num_classes}: "
                    "leave num_classes out, or give the other head"
                )
            made = nn.Linear(width, len(bias))
            with torch.no_grad():  # onto the meta device of a skeleton nothing is copied
                made.weight.copy_(weight)
                made.bias.copy_(bias)
            return made
        if num_classes is None or (own is not None and own.out_features == num_classes):
            if own is None:
                raise ValueError(
                    f"the teacher {self.encoder.spec.name} has no classifier: give "
                    "head=FILE.safetensors (multikd teachers fit-head), or num_classes for one "
                    "that starts at random"
                )
            return own
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, received {num_classes}")
        return nn.Linear(width, num_classes)

    def _own_classifier(self, width: int) -> nn.Linear | None:
        model = self.encoder.model
        layer = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
        plain = isinstance(layer, nn.Linear) and layer.in_features == width
        return layer if plain and layer.bias is not None else None  # type: ignore[union-attr]

    # ------------------------------------------------------------------ what it is

    @property
    def spec(self) -> EncoderSpec:
        """Widths, patch size, image size and normalisation of the encoder."""
        return self.encoder.spec

    @property
    def num_classes(self) -> int:
        """K of the classifier."""
        return self.classifier.out_features

    @property
    def pools_patches(self) -> bool:
        """Whether its summary is the plain mean of its patches (as a CNN's is)."""
        if any(p.is_meta for p in self.parameters()):
            return True
        found = self._example()
        if found.summary is None or found.patches is None:
            return False
        mean = found.patches.mean(dim=1)
        return mean.shape == found.summary.shape and torch.allclose(
            mean, found.summary, rtol=1e-3, atol=1e-4
        )

    @property
    def is_rectified(self) -> bool:
        """Whether its patches are never negative (behind a ReLU)."""
        if any(p.is_meta for p in self.parameters()):
            return False
        patches = self._example().patches
        return patches is not None and bool((patches >= 0).all())

    @torch.no_grad()
    def _example(self) -> TokenFeatures:
        modes = [(m, m.training) for m in self.encoder.modules()]
        generator = torch.Generator().manual_seed(0)
        place = next(self.parameters())
        images = torch.rand(2, 3, *self.spec.image_size, generator=generator)
        features: TokenFeatures = self.encoder.eval()(images.to(place.device, place.dtype))
        for module, mode in modes:
            module.training = mode
        return features

    def facts(self) -> dict[str, str]:
        """Encoder, licence, source and fingerprint of the start, for checkpoints and cards."""
        return {
            "encoder": self.spec.name,
            "licence": self.licence,
            "source": self.spec.source,
            "fingerprint": self._digest or "",
        }

    def _fingerprint(self) -> str:
        parts = weight_digest(self.encoder) + weight_digest(self.classifier)
        facts = f"{self.spec.image_size}{self.spec.mean}{self.spec.std}{self.resize}"
        return hashlib.sha256(f"{parts}|{facts}".encode()).hexdigest()

    # ------------------------------------------------------------------ running it

    def forward(self, images: Tensor) -> TokenFeatures:
        """Features with ``logits (B, K)``. ``images``: float ``(B, 3, H, W)`` in [0, 1]."""
        size = self.spec.image_size if self.resize == "own" else (images.shape[2], images.shape[3])
        found: TokenFeatures = self.encoder(resized(images, size))
        found.logits = self.classifier(found.summary)
        return found

    def freeze_unread(self, read: Callable[[TokenFeatures], Sequence[Tensor | None]]) -> list[str]:
        """Freeze the encoder's parameters that none of the features ``read`` picks depends on.

        So that every parameter that is trained gets a gradient.
        """
        return freeze_unread(
            self.encoder,
            self.spec.image_size,
            lambda encoder, images: [t for t in read(encoder(images)) if t is not None],
        )


def read_head(path: str | Path, width: int) -> tuple[Tensor, Tensor]:
    """``weight (K, D)`` and ``bias (K)`` of a linear head, in float32.

    Raises:
        ValueError: no such file, other tensors, or another width than ``width``.
    """
    state = read_state_dict(path)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        held = {key: tuple(value.shape) for key, value in list(state.items())[:4]}
        raise ValueError(
            f"a head holds weight (K, D) and bias (K), and {path} holds {held}: give a file that "
            "`multikd teachers fit-head` wrote"
        )
    if weight.shape[1] != width:
        raise ValueError(
            f"the head {path} reads {weight.shape[1]} numbers and this teacher's summary has "
            f"{width}: give the head that was fitted on it"
        )
    return weight.float(), bias.float()
