"""Images per second, and how much of the time the step waited for data."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from multikd.types import Batch


class Throughput(pl.Callback):
    """Log ``train/images_per_second`` (all ranks) and ``train/data_wait`` (share of the time).

    Wall-clock times of the host: on an accelerator the step is queued, so a waiting device shows
    as data wait only when the loader is the bottleneck over a logging interval, which is the
    question. The first interval of a run is left out (it holds the warm-up of workers and kernels).
    """

    def __init__(self) -> None:
        self._batch_end = self._interval_start = 0.0
        self._waited = 0.0
        self._images = 0
        self._warm = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run begins cold, and may begin inside an epoch."""
        self._warm = False
        self._reset()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the pause between epochs (validation, checkpoints)."""
        self._reset()

    def _reset(self) -> None:
        self._batch_end = self._interval_start = time.perf_counter()
        self._waited, self._images = 0.0, 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The wait for this batch is over."""
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count, and log at Lightning's logging interval."""
        self._batch_end = time.perf_counter()
        self._images += len(batch) * trainer.world_size
        if trainer._logger_connector.should_update_logs:
            elapsed = max(self._batch_end - self._interval_start, 1e-9)
            if self._warm:
                pl_module.log("train/images_per_second", self._images / elapsed, prog_bar=True)
                pl_module.log("train/data_wait", self._waited / elapsed, prog_bar=True)
            self._warm = True
            self._reset()
