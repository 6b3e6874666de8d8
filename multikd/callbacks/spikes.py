"""Losses that jump: which images were in the batch?"""

from __future__ import annotations

import json
import logging
import statistics
from collections import deque
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from multikd.distributed import all_gather_object, rank, world_size
from multikd.modules.records import StepRecord

log = logging.getLogger(__name__)

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST = 0.01  # share of the median that always counts as ordinary variation


class LossSpikes(pl.Callback):
    """Note batches whose loss lies far above the recent ones: ``spikes.RANK.jsonl`` and the log.

    Far is ``threshold`` robust deviations (1.4826 × the median absolute deviation) above the
    median of the last ``window`` losses, so that spikes among them do not hide the next one. Every
    rank judges its own batches, without a reduction. On an accelerator the losses are read together
    every ``every_n_steps``, on a CPU at once.

    Args:
        threshold: in robust deviations.
        window: losses that are compared with; nothing is said before there are half as many.
        every_n_steps: batches between two looks on an accelerator.
    """

    def __init__(self, threshold: float = 8.0, window: int = 200, every_n_steps: int = 50) -> None:
        if threshold <= 0 or window < 10 or every_n_steps < 1:
            raise ValueError(
                "threshold must be above 0, window at least 10 and every_n_steps at least 1, "
                f"received {threshold}, {window} and {every_n_steps}"
            )
        self.threshold = threshold
        self.every_n_steps = every_n_steps
        self.spikes = 0
        self._recent: deque[float] = deque(maxlen=window)
        self._pending: list[tuple[int, int, StepRecord]] = []
        self._folder = Path()

    def state_dict(self) -> dict[str, Any]:
        """The recent losses survive; ``on_save_checkpoint`` puts in those of the other ranks."""
        return {"ranks": [self._own()]}

    def _own(self) -> dict[str, Any]:
        return {"spikes": self.spikes, "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each rank takes its own up again; of another number of ranks, what they have together.

        Then rank 0 keeps the count of all, and every rank compares with losses of all of them.
        """
        ranks = state_dict["ranks"]
        if len(ranks) == world_size():
            ranks = [ranks[rank()]]
        total = sum(int(one["spikes"]) for one in ranks)
        self.spikes = total if len(ranks) == 1 or rank() == 0 else 0
        self._recent.clear()
        for values in zip_longest(*(one["recent"] for one in ranks)):
            self._recent.extend(float(value) for value in values if value is not None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the log folder."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._pending = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note this batch and, when it is time, look."""
        for record in getattr(pl_module, "last_records", ()):
            self._pending.append((trainer.current_epoch, batch_idx, record))
        if pl_module.device.type == "cpu" or (batch_idx + 1) % self.every_n_steps == 0:
            self._look(trainer.global_rank)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is left."""
        self._look(trainer.global_rank)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at what is left, and keep what all ranks know (Lightning has all of them save)."""
        self._look(trainer.global_rank)
        if "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = {"ranks": all_gather_object(self._own())}

    def _look(self, number: int) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        totals = torch.stack([record.total.float() for *_, record in pending]).tolist()
        for (epoch, batch, record), total in zip(pending, totals, strict=True):
            limit = self.limit()
            if limit is not None and total > limit:
                self._say(number, epoch, batch, record, total, limit)
            if abs(total) < float("inf"):  # neither infinite nor NaN, which another callback names
                self._recent.append(total)

    def limit(self) -> float | None:
        """Losses above this are spikes; None while too few are known."""
        if 2 * len(self._recent) < (self._recent.maxlen or 0):
            return None
        median = statistics.median(self._recent)
        deviation = statistics.median(abs(value - median) for value in self._recent)
        spread = max(_MAD_TO_DEVIATION * deviation, _LEAST * abs(median))
        return median + self.threshold * spread

    def _say(
        self, number: int, epoch: int, batch: int, record: StepRecord, total: float, limit: float
    ) -> None:
        self.spikes += 1
        per_teacher = record.losses.mean(dim=1).tolist()
        row = {
            "epoch": epoch,
            "batch": batch,
            "loss": total,
            "limit": limit,
            "teachers": dict(zip(record.names, per_teacher, strict=True)),
            "keys": record.keys,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"spikes.{number}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.spikes == 10 ** (len(str(self.spikes)) - 1):  # the 1st, 10th, 100th …
            shown = ", ".join(record.keys[:5])
            log.warning(
                "the loss jumped to %.4g in batch %d of epoch %d (recent ones stay below %.4g): "
                "images %s%s; %d such batches so far, all in %s",
                *(total, batch, epoch, limit, shown, " …" if len(record.keys) > 5 else ""),
                *(self.spikes, f"spikes.{number}.jsonl"),
            )
