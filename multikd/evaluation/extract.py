"""Features of every image of a loader, from any encoder, ready to be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multikd.types import Batch, StudentOutput, TokenFeatures

EncoderOutput = Tensor | TokenFeatures | StudentOutput


class ExtractedFeatures(NamedTuple):
    """M images as one encoder sees them, in the loader's order."""

    features: Tensor  # float32 (M, D) on the CPU
    labels: Tensor  # int64 (M,), −1 where there is none
    keys: list[str]


def extract_features(
    encoder: Callable[[Tensor], EncoderOutput],
    loader: Iterable[Batch],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> ExtractedFeatures:
    """Run ``encoder`` over the first view of every batch and keep one vector an image.

    Of a ``TokenFeatures`` (or of the features of a ``StudentOutput``) that vector is the summary,
    or the mean over the patches where there is none. Fillers (position −1) are left out. A module
    runs in eval mode and is afterwards as it was; nothing is recorded by autograd.

    Args:
        encoder: float images ``(B, 3, H, W)`` in [0, 1] → features; already on ``device``.
        loader: batches with uint8 views.
        device: where the images are sent.
        progress: called after every batch with the number of its images.

    Raises:
        ValueError: no images at all, or an encoder that gives no vector for each image.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    with evaluating(encoder), torch.inference_mode():
        for batch in loader:
            images = batch.views[0].to(device, non_blocking=True)
            vectors = summary_vectors(encoder(images.to(torch.float32) / 255))
            if vectors.ndim != 2 or len(vectors) != len(batch):
                raise ValueError(
                    f"an encoder must give one vector for each of {len(batch)} images, (B, D), "
                    f"received {tuple(vectors.shape)}"
                )
            kept = batch.positions.cpu() >= 0
            features.append(vectors.to("cpu", torch.float32)[kept])
            labels.append(batch.labels.cpu()[kept])
            keys += [key for key, keep in zip(batch.keys, kept.tolist(), strict=True) if keep]
            if progress is not None:
                progress(len(batch))
    if not keys:
        raise ValueError("there are no images to extract features of: the loader was empty")
    # Copies, since what inference mode made may not enter autograd again.
    with torch.inference_mode(False):
        return ExtractedFeatures(
            torch.cat([part.clone() for part in features]),
            torch.cat([part.clone() for part in labels]),
            keys,
        )


def summary_vectors(output: EncoderOutput) -> Tensor:
    """One vector an image ``(B, D)``: the summary, else the mean over the patches.

    Raises:
        ValueError: the output has neither.
    """
    if isinstance(output, Tensor):
        return output
    features = output.features if isinstance(output, StudentOutput) else output
    if features.summary is not None:
        return features.summary
    if features.patches is not None:
        return features.patches.mean(dim=1)
    raise ValueError("the encoder gave neither a summary nor patches, so there is nothing to score")


@contextmanager
def evaluating(encoder: object) -> Iterator[None]:
    """Eval mode for the time being; every submodule gets back the mode it had."""
    modes = (
        [(module, module.training) for module in encoder.modules()]
        if isinstance(encoder, nn.Module)
        else []
    )
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
