"""A linear probe on top of an encoder, for images that were not extracted ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from multikd.evaluation.extract import summary_vectors
from multikd.evaluation.labelled import labelled_rows
from multikd.evaluation.linear import LogisticFit, logistic_regression
from multikd.evaluation.task import Subject
from multikd.types import Grid


class ProbedEncoder(nn.Module):
    """Images in [0, 1] ``(B, 3, H, W)`` → logits ``(B, K)``; differentiable in the images.

    Args:
        subject: encodes.
        fit: of the probe, on the subject's own features.
        classes: K; a class the probe never saw has logit −∞ (as a large finite number).
    """

    def __init__(self, subject: Subject, fit: LogisticFit, classes: int) -> None:
        super().__init__()
        # Not a submodule: the encoder stays where it is and as it is.
        self._encode = subject.encode
        weight = torch.zeros(classes, fit.weight.shape[1])
        bias = torch.full((classes,), -1e4)
        weight[fit.classes] = fit.weight.float()
        bias[fit.classes] = fit.bias.float()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    weight: Tensor
    bias: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = summary_vectors(self._encode(images)).float()
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return (features @ weight.T + bias).to(images.device)


def fit_probed(subject: Subject, classes: int, c: float | None, seed: int) -> ProbedEncoder:
    """A logistic regression on the train split's features, on top of the encoder."""
    train = labelled_rows(subject, "train")
    fit = logistic_regression(train.x, train.y, train.x[:1], c=c, seed=seed)
    return ProbedEncoder(subject, fit, classes)


def evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` places of ``count``, evenly spaced."""
    if count <= limit:
        return list(range(count))
    places = np.linspace(0, count - 1, limit).round().astype(int)
    return [int(place) for place in places]


def images_of(
    subject: Subject, split: str, places: Sequence[int], size: Grid, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(places, uint8 images) of a split, in order, ``batch_size`` at a time."""
    wanted = set(places)
    found: list[int] = []
    kept: list[Tensor] = []
    for batch in subject.splits[split].batches(size, subject.spec.interpolation):
        for position, image in zip(batch.positions.tolist(), batch.views[0], strict=True):
            if position in wanted:
                found.append(position)
                kept.append(image.cpu())
                if len(kept) == batch_size:
                    yield found, torch.stack(kept)
                    found, kept = [], []
    if kept:
        yield found, torch.stack(kept)
