"""The student as it is deployed: one tensor in, one tensor out, nothing of this project inside."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from multikd.backbones import Normalize
from multikd.export.resampling import crop_resize
from multikd.students import StudentEncoder
from multikd.types import EncoderSpec

Output = Literal["summary", "tokens"]


class DeployedEncoder(nn.Module):
    """What goes into a graph (ONNX, ``torch.export``, TorchScript).

    Without ``preprocessing`` the input is what the timm model takes: float32 ``(B, 3, H, W)``,
    already ``(x - mean) / std``. With it the input is uint8 RGB ``(B, 3, H', W')`` of any size; the
    graph takes the largest centred square (of the aspect ratio of ``spec.image_size``), resizes it
    (bicubic, antialiased, as PIL does) and normalises.

    Args:
        model: gives one tensor, like timm's models; in eval mode.
        spec: image size, mean and std.
        preprocessing: put crop, resize and normalisation into the graph.
        output: ``summary`` is the model's own answer (``(B, D)``, or logits with a classifier);
            ``tokens`` is timm's ``forward_features`` (a ViT's tokens, a CNN's map).

    Raises:
        ValueError: ``tokens`` of a model without ``forward_features``.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: EncoderSpec,
        *,
        preprocessing: bool = False,
        output: Output = "summary",
    ) -> None:
        super().__init__()
        if output == "tokens" and not hasattr(model, "forward_features"):
            raise ValueError(f"{spec.name} has no tokens to give: use output='summary'")
        self.model = model
        self.spec = spec
        self.normalize = Normalize(spec.mean, spec.std) if preprocessing else None
        self.output: Output = output
        self.eval().requires_grad_(False)

    @classmethod
    def from_student(
        cls,
        student: StudentEncoder,
        *,
        classifier: bool = False,
        preprocessing: bool = False,
        output: Output = "summary",
    ) -> DeployedEncoder:
        """A float32 copy of a student on the CPU, without its classifier unless asked for.

        Raises:
            ValueError: a classifier asked of a student without one.
        """
        if classifier and not student.num_classes:
            raise ValueError(
                f"the student {student.spec.name} has no classifier to export: leave it out"
            )
        model = student.export_model(classifier).cpu().float()
        return cls(model, student.spec, preprocessing=preprocessing, output=output)

    @property
    def preprocessing(self) -> bool:
        """Whether the input is uint8."""
        return self.normalize is not None

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, D)``, or tokens."""
        if self.normalize is not None:
            images = self.normalize(crop_resize(images, self.spec.image_size))
        if self.output == "tokens":
            tokens: Tensor = self.model.forward_features(images)  # type: ignore[operator]
            return tokens
        features: Tensor = self.model(images)
        return features

    def inputs(self, images: Tensor) -> Tensor:
        """The graph's input from images: uint8, or float in [0, 1]; ``(B, 3, H, W)`` either way."""
        if self.preprocessing:
            if images.dtype == torch.uint8:
                return images
            return (images * 255).round().clamp(0, 255).to(torch.uint8)
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        normalised: Tensor = Normalize(self.spec.mean, self.spec.std)(pixels)
        return normalised


def as_deployed(
    source: StudentEncoder | DeployedEncoder,
    *,
    classifier: bool,
    preprocessing: bool,
    output: Output,
) -> DeployedEncoder:
    """The module to export: a student is wrapped, a wrapped encoder is taken as it is."""
    if isinstance(source, DeployedEncoder):
        return source
    return DeployedEncoder.from_student(
        source, classifier=classifier, preprocessing=preprocessing, output=output
    )
