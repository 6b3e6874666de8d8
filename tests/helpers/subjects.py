"""Small data sets and subjects held in memory, for the tests of protocols."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from multikd.evaluation.task import EncodedSplit
from multikd.types import Batch, EncoderSpec, TokenFeatures, Widths


class MemorySplit:
    """A split whose images (uint8, (M, 3, H, W)) and dense targets are tensors."""

    def __init__(
        self,
        images,
        labels=None,
        name="data/split",
        classes=None,
        metadata=None,
        targets=None,
        dense=None,
    ):
        self.images = images
        self.labels = labels
        self.name = name
        self.keys = [f"{name}:{i}" for i in range(len(images))]
        self.classes = classes
        self.metadata = metadata or {}
        self.targets = targets
        self.dense = dense

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        return str(int(self.images.long().sum()))

    def batches(self, size, interpolation="bicubic", batch=8):
        for start in range(0, len(self.images), batch):
            images = self.images[start : start + batch]
            if tuple(images.shape[-2:]) != tuple(size):
                images = (
                    torch.nn.functional.interpolate(
                        images.float(), size, mode=interpolation, antialias=True
                    )
                    .round()
                    .clamp(0, 255)
                    .to(torch.uint8)
                )
            count = len(images)
            positions = torch.arange(start, start + count)
            labels = torch.full((count,), -1) if self.labels is None else self.labels[positions]
            # A filler behind the last batch, as the loader pads it.
            if start + count == len(self.images):
                images = torch.cat([images, images[-1:]])
                positions = torch.cat([positions, torch.tensor([-1])])
                labels = torch.cat([labels, labels[-1:]])
            yield Batch(
                views=[images],
                labels=labels if labels.ndim == 1 else torch.full((len(images),), -1),
                keys=[self.keys[int(p)] for p in positions],
                dataset=torch.zeros(len(images), dtype=torch.long),
                positions=positions,
                samples=positions,
            )

    def target(self, index, size):
        target = self.targets[index]
        rows = (np.arange(size[0]) + 0.5) * target.shape[0] / size[0]
        columns = (np.arange(size[1]) + 0.5) * target.shape[1] / size[1]
        return np.asarray(target)[rows.astype(int)][:, columns.astype(int)]


class MemorySubject:
    """An encoder (callable on float images, or fixed features) before memory splits."""

    def __init__(self, splits, encoder=None, features=None, name="encoder", head=None, text=None):
        self.splits = splits
        self.encoder = encoder
        self.fixed = features or {}
        self.name = name
        self.head = head
        self.text = text
        self.fingerprint = name
        if encoder is not None:
            self.spec = encoder.spec
        else:
            first = next(iter(self.fixed.values()))
            patches = None if first.patches is None else first.patches.shape[-1]
            widths = Widths(None if first.summary is None else first.summary.shape[-1], patches)
            self.spec = EncoderSpec(name, widths, (32, 32), 8, (0.5,) * 3, (0.5,) * 3)

    def features(self, split, tokens=("summary",), size=None):
        if split in self.fixed:
            return self.fixed[split]
        size = size or self.spec.image_size
        parts = []
        for batch in self.splits[split].batches(size, self.spec.interpolation):
            with torch.no_grad():
                out = self.encode(batch.views[0].float() / 255)
            parts.append(out.map(lambda t, keep=batch.positions >= 0: t[keep]))
        summary = patches = None
        if "summary" in tokens:
            summary = torch.cat(
                [p.patches.mean(1) if p.summary is None else p.summary for p in parts]
            )
        if "patches" in tokens:
            patches = torch.cat([p.patches for p in parts])
        return EncodedSplit(summary, patches, parts[0].grid)

    def encode(self, images):
        return self.encoder(images)

    @property
    def has_texts(self):
        return self.text is not None

    def text_weights(self, classes, templates):
        if self.text is None:
            raise ValueError(f"{self.name} has no text tower")
        return self.text(classes, templates)


class PooledPixels:
    """An encoder whose patch tokens are the mean colour of each patch: position is exact."""

    def __init__(self, image_size=(32, 32), patch=8, name="pixels"):
        self.spec = EncoderSpec(name, Widths(3, 3), image_size, patch, (0.5,) * 3, (0.5,) * 3)

    def __call__(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, self.spec.patch_size)
        patches = pooled.flatten(2).transpose(1, 2)
        return TokenFeatures(patches.mean(1), patches, tuple(pooled.shape[-2:]))


def fixed(**splits):
    """``split=summary`` → encoded splits."""
    return {name: EncodedSplit(summary) for name, summary in splits.items()}


def renamed(subject, **changes):
    """The same spec with changes."""
    subject.spec = dataclasses.replace(subject.spec, **changes)
    return subject
