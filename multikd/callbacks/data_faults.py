"""Count samples that could not be read, and stop when there are too many."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from multikd.distributed import all_gather_object, all_reduce_sum
from multikd.types import Batch

DEFAULT_RATE = 0.01


class DataFaults(pl.Callback):
    """Each broken sample was replaced by a neighbour; here it is counted by cause and written down.

    All go to ``faults.RANK.jsonl`` beside the logs (the loader logs the first of each cause), and
    the run stops on all ranks when their share passes ``max_rate``, looked at every
    ``every_n_batches``.

    Args:
        max_rate: share of samples that may be broken, 0 to 1; None takes the data module's
            ``max_fault_rate``.
        every_n_batches: batches between two looks; each look is one small reduction over ranks.
        grace: samples read before the rate is judged at all.
    """

    def __init__(
        self, max_rate: float | None = None, every_n_batches: int = 100, grace: int = 256
    ) -> None:
        if max_rate is not None and not 0.0 <= max_rate <= 1.0:
            raise ValueError(f"max_rate must lie in [0, 1], received {max_rate}")
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be 1 or more, received {every_n_batches}")
        self.max_rate = max_rate
        self.every_n_batches = every_n_batches
        self.grace = grace
        self._limit = DEFAULT_RATE if max_rate is None else max_rate
        self._folder = Path()
        self.causes: Counter[str] = Counter()
        self.samples = 0
        self.faults = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the log folder, and the limit of the data module unless there is one of its own."""
        # Asked on all ranks together: Lightning broadcasts the answer.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self.max_rate is None:
            datamodule = getattr(trainer, "datamodule", None)
            self._limit = float(getattr(datamodule, "max_fault_rate", DEFAULT_RATE))

    def state_dict(self) -> dict[str, Any]:
        """Counts survive a checkpoint (those of rank 0, which stand for the others')."""
        return {"causes": dict(self.causes), "samples": self.samples, "faults": self.faults}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts up again."""
        self.causes = Counter(state_dict["causes"])
        self.samples, self.faults = int(state_dict["samples"]), int(state_dict["faults"])

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count this batch."""
        self.samples += len(batch)
        self.faults += len(batch.faults)
        if batch.faults:
            self._write_down(trainer, batch)
        if (batch_idx + 1) % self.every_n_batches == 0:
            self.check(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once an epoch at least, and log the total."""
        self.check(pl_module.device)
        pl_module.log("epoch/faults", float(self.faults), sync_dist=True, reduce_fx="sum")

    def _write_down(self, trainer: pl.Trainer, batch: Batch) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"faults.{trainer.global_rank}.jsonl").open(
            "a", encoding="utf-8"
        ) as file:
            for fault in batch.faults:
                self.causes[fault.cause] += 1
                file.write(json.dumps(fault._asdict()) + "\n")

    def check(self, device: torch.device) -> None:
        """Judge the rate over all ranks.

        Raises:
            ValueError: on every rank, if too many samples are broken.
        """
        counts = torch.tensor([self.samples, self.faults], dtype=torch.float64)
        if device.type != "mps":  # which has no float64
            counts = counts.to(device)
        samples, faults = all_reduce_sum(counts).tolist()
        if samples < self.grace or faults <= self._limit * samples:
            return
        causes: Counter[str] = Counter()
        for part in all_gather_object(dict(self.causes)):
            causes.update(part)
        by_cause = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(5))
        raise ValueError(
            f"{faults:.0f} of {samples:.0f} samples could not be read ({by_cause}), more than the "
            f"limit of {self._limit:.1%}: run `multikd shards inspect` on the training shards, "
            "or raise data.max_fault_rate"
        )
