"""Which training samples help the student on held-out images, and which do it harm?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from multikd.modules.influence import InfluenceModule
from multikd.types import Batch


class InfluentialSamples(pl.Callback):
    """Note the images of highest and lowest influence: ``influence.RANK.jsonl`` beside the logs.

    Influence (LGTM, arXiv 2305.09651) is the slope of an image's distillation loss along the
    held-out gradient: above 0 where learning this image lowers the held-out loss. One row for each
    batch that is noted, with ``top`` images on either side; every rank notes its own.

    Args:
        top: images on either side.
        every_n_batches: note every so-manieth batch.
    """

    def __init__(self, top: int = 3, every_n_batches: int = 1) -> None:
        if top < 1 or every_n_batches < 1:
            raise ValueError(
                f"top and every_n_batches must be 1 or more, received {top} and {every_n_batches}"
            )
        self.top = top
        self.every_n_batches = every_n_batches
        self._folder = Path()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the log folder.

        Raises:
            ValueError: the run computes no influence.
        """
        if not isinstance(pl_module, InfluenceModule):
            raise ValueError(
                "InfluentialSamples notes what InfluenceModule computes, and the model is a "
                f"{type(pl_module).__name__}: leave the callback out"
            )
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Note this batch, if it is one of those."""
        influence = getattr(pl_module, "last_influence", None)
        if batch_idx % self.every_n_batches or not isinstance(influence, Tensor):
            return
        pairs = sorted(
            (
                (key, value)
                for key, value in zip(batch.keys, influence.float().tolist(), strict=True)
                if math.isfinite(value)
            ),
            key=lambda pair: -pair[1],
        )
        row = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "helpful": pairs[: self.top],
            "harmful": pairs[::-1][: self.top],
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"influence.{trainer.global_rank}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
