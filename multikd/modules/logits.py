"""Losses of class logits, one value an image, and what validation says of them."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multikd.backbones import final_features
from multikd.data.module import ShardDataModule
from multikd.functional import full_precision, where_images, without_autocast
from multikd.types import Batch, TokenFeatures

_LOOKED_AT = 64  # labels that are read before training


def divergence(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``τ²·KL(softmax(target/τ) ‖ softmax(logits/τ))`` of each image (Hinton 1503.02531).

    Args:
        target: ``(B, K)`` logits of the one that teaches; its gradient is not stopped here.
        logits: ``(B, K)`` of the one that learns.
        temperature: τ, above 0.

    Returns:
        ``(B,)`` in float32 (float64 stays), ≥ 0.
    """
    with without_autocast(logits.device):
        log_p = F.log_softmax(full_precision(target) / temperature, dim=-1)
        log_q = F.log_softmax(full_precision(logits) / temperature, dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, ``(B,)`` in float32; 0 without gradient where a label is −1."""
    with without_autocast(logits.device):
        labelled = labels >= 0
        rows = where_images(labelled, full_precision(logits))
        values = F.cross_entropy(rows, labels.clamp(min=0), reduction="none")
        return torch.where(labelled, values, 0.0)


def logits_of(features: TokenFeatures) -> Tensor:
    """The logits ``(B, K)`` of a student.

    Raises:
        ValueError: it has no classifier.
    """
    if features.logits is None:
        raise ValueError("the student has no classifier: set student.init_args.num_classes")
    return features.logits


def read_logits(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the losses here read of a timm model, for ``freeze_unread``."""
    logits = final_features(model, images).logits
    return [] if logits is None else [logits]


def mean_real(values: Tensor, batch: Batch) -> Tensor:
    """Mean of ``(B,)`` over the batch, in which places that only pad it count 0."""
    return torch.where(batch.positions >= 0, values, 0.0).mean()


def mean_logits(rows: list[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the rows' probabilities: each ``(B, K)`` → ``(B, K)``."""
    if len(rows) == 1:
        return rows[0]
    with without_autocast(rows[0].device):
        logs = torch.stack([F.log_softmax(full_precision(row), dim=-1) for row in rows])
        return torch.logsumexp(logs, dim=0) - math.log(len(rows))


def log_scores(module: pl.LightningModule, logits: Tensor, batch: Batch, suffix: str = "") -> None:
    """Log cross-entropy and accuracy over the real, labelled images of a validation batch."""
    chosen = (batch.positions >= 0) & (batch.labels >= 0)
    count = int(chosen.sum())
    right = (logits.argmax(dim=-1) == batch.labels) & chosen
    values = {
        f"val/loss{suffix}": torch.where(chosen, label_loss(logits, batch.labels), 0.0).sum(),
        f"val/accuracy{suffix}": right.sum().float(),
    }
    # Weighted with the labelled images: a batch without any counts nothing. Times the ranks, since
    # Lightning takes the mean over them of these integers, rounded down.
    module.log_dict(
        {name: value / max(count, 1) for name, value in values.items()},
        batch_size=count * module.trainer.world_size,
        sync_dist=True,
        add_dataloader_idx=False,
    )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is none.

    Raises:
        ValueError: 0 or less, or not finite.
    """
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, received {temperature}")


def check_weights(**weights: float) -> None:
    """Refuse weights of loss terms that are negative or not finite, and all of them 0.

    Raises:
        ValueError: names the first that is wrong.
    """
    for name, weight in weights.items():
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"{name} must be 0 or more and finite, received {weight}")
    if len(weights) > 1 and not any(weights.values()):
        raise ValueError(
            f"nothing is learned: {', '.join(weights)} are all 0; set at least one above 0"
        )


def check_labels(module: pl.LightningModule, classes: int) -> None:
    """Look at some training labels before training.

    Raises:
        ValueError: all of those looked at are missing, or one is no class of the classifiers.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, ShardDataModule) or data.sequential:
        return
    labels = data.some_labels("train", _LOOKED_AT)
    known = [label for label in labels if label >= 0]
    if labels and not known:
        raise ValueError(
            f"{type(module).__name__} learns from labels, and none of {len(labels)} training "
            "samples that were looked at has one (a .cls member, or a label in .json): write "
            "shards with labels"
        )
    if known and max(known) >= classes:
        raise ValueError(
            f"the training labels reach {max(known)} and the classifiers have {classes} classes "
            f"(labels 0 to {classes - 1}): set num_classes to the labels' number of classes"
        )
