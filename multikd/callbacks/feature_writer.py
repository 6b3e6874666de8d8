"""Write what ``multikd predict`` computes: the student's features with their keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter


class FeatureWriter(BasePredictionWriter):
    """One ``.npz`` per rank with ``keys``, ``labels`` and ``summary (M, D)`` float32.

    Args:
        out: folder to write to.
    """

    def __init__(self, out: str = "features") -> None:
        super().__init__(write_interval="epoch")
        self.out = Path(out)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write this rank's rows; fillers (position −1) are left out."""
        # Lightning nests the predictions of several loaders; those of one loader come flat.
        flat: list[dict[str, Any]] = []
        for item in predictions:
            flat.extend(item if isinstance(item, list) else [item])
        keys: list[str] = []
        summaries, labels = [], []
        for prediction in flat:
            valid = prediction["positions"] >= 0
            keys += [k for k, v in zip(prediction["keys"], valid.tolist(), strict=True) if v]
            labels.append(prediction["labels"][valid])
            summaries.append(prediction["features"].summary[valid].float())
        if not keys:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        np.savez(
            self.out / f"features-{trainer.global_rank:04d}.npz",
            keys=np.asarray(keys),
            labels=torch.cat(labels).cpu().numpy(),
            summary=torch.cat(summaries).cpu().numpy(),
        )
