"""Write what ``multikd predict`` computes: the student's features with their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from multikd.types import Batch


class FeatureWriter(pl.Callback):
    """One ``features-RANK.npz`` per rank with ``keys``, ``labels`` and ``summary (M, D)`` float32.

    Fillers (position −1) are left out. (Lightning's own prediction writer asks for the indices
    of batches, which its data loaders know and ours do not.)

    Args:
        out: folder to write to.
    """

    def __init__(self, out: str = "features") -> None:
        self.out = Path(out)
        self._keys: list[str] = []
        self._labels: list[Tensor] = []
        self._summaries: list[Tensor] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._keys, self._labels, self._summaries = [], [], []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the real rows of this batch."""
        real = batch.positions >= 0
        self._keys += [k for k, r in zip(batch.keys, real.tolist(), strict=True) if r]
        self._labels.append(batch.labels[real].cpu())
        self._summaries.append(outputs["features"].summary[real].float().cpu())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write this rank's file."""
        if not self._keys:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        np.savez(
            self.out / f"features-{trainer.global_rank:04d}.npz",
            keys=np.asarray(self._keys),
            labels=torch.cat(self._labels).numpy(),
            summary=torch.cat(self._summaries).numpy(),
        )
        self._keys, self._labels, self._summaries = [], [], []
