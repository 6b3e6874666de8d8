"""Count samples that could not be read, and stop when there are too many."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from multikd.data.dataset import NO_STAND_IN
from multikd.distributed import all_gather_object, all_reduce_sum, world_size
from multikd.redaction import redact
from multikd.types import Batch, Fault

DEFAULT_RATE = 0.01
FILE = "faults.jsonl"
_MOST_DETAIL = 300  # characters


@dataclass
class _Counts:
    """What was read, and what of it was broken."""

    samples: int = 0
    faults: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.samples + other.samples,
            self.faults + other.faults,
            self.causes + other.causes,
            self.shards + other.shards,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "faults": self.faults,
            "causes": dict(self.causes),
            "shards": dict(self.shards),
        }

    @staticmethod
    def from_dict(state: dict[str, Any]) -> _Counts:
        return _Counts(
            int(state["samples"]),
            int(state["faults"]),
            Counter(state["causes"]),
            Counter(state.get("shards", {})),
        )


class DataFaults(pl.Callback):
    """Each broken sample was replaced by a neighbour; here it is counted by cause and written down.

    All go to one ``faults.jsonl`` beside the logs, a line each: cause, shard, key, detail, and the
    set, epoch, step and rank that met it (the loader logs the first of each cause). Rank 0 writes
    it for all ranks at every look; a rank that ends early adds what it has not handed over. The
    run stops on all ranks, at the same step, when the share of broken training samples passes
    ``max_rate``, or some rank found a sample for which nothing near could stand in.

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
        self._folder: Path | None = None
        self._before = _Counts()  # of all ranks, from the checkpoint
        self._own = _Counts()  # of this rank, in this process
        self._pending: list[dict[str, Any]] = []
        self._lost: list[Fault] = []  # nothing could stand in for these

    @property
    def samples(self) -> int:
        """Training samples read: by this rank, and by all before the checkpoint it began from."""
        return self._before.samples + self._own.samples

    @property
    def faults(self) -> int:
        """Those of them that were broken."""
        return self._before.faults + self._own.faults

    @property
    def causes(self) -> Counter[str]:
        """The same by cause."""
        return self._before.causes + self._own.causes

    @property
    def shards(self) -> Counter[str]:
        """The same by shard."""
        return self._before.shards + self._own.shards

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the log folder, and the limit of the data module unless there is one of its own."""
        # Asked on all ranks together: Lightning broadcasts the answer.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self.max_rate is None:
            datamodule = getattr(trainer, "datamodule", None)
            self._limit = float(getattr(datamodule, "max_fault_rate", DEFAULT_RATE))

    def state_dict(self) -> dict[str, Any]:
        """Counts survive a checkpoint; ``on_save_checkpoint`` puts in those of all ranks."""
        return (self._before + self._own).as_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts up again."""
        self._before, self._own = _Counts.from_dict(state_dict), _Counts()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the counts of all ranks in (Lightning has every rank save at once)."""
        if world_size() > 1 and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = self._total().as_dict()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count this batch."""
        self._own.samples += len(batch)
        self._own.faults += len(batch.faults)
        for fault in batch.faults:
            self._own.causes[fault.cause] += 1
            self._own.shards[fault.shard] += 1
        self._note(trainer, batch, "train")
        if (batch_idx + 1) % self.every_n_batches == 0:
            self.check(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once an epoch at least, and log the total."""
        self.check(pl_module.device)
        mine = self._own.faults + (self._before.faults if trainer.is_global_zero else 0)
        pl_module.log("epoch/faults", float(mine), sync_dist=True, reduce_fx="sum")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write down what is broken in the validation sets; it does not count for the rate."""
        if isinstance(batch, Batch):
            self._note(trainer, batch, ("val", "bank")[min(dataloader_idx, 1)])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, so that a validation set that cannot be read stops every rank."""
        if trainer.training:
            self.check(pl_module.device)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep what was not handed over; the other ranks are not asked, they may be gone."""
        with contextlib.suppress(OSError):
            self._write(self._pending)
        self._pending = []

    def check(self, device: torch.device) -> None:
        """Judge the rate over all ranks, and write down what they found.

        Raises:
            ValueError: on every rank, if too many samples are broken, or one had no stand-in.
        """
        own, before = self._own, self._before
        counts = torch.tensor(
            [own.samples, own.faults, len(self._pending), len(self._lost)], dtype=torch.float64
        )
        if device.type != "mps":  # which has no float64
            counts = counts.to(device)
        samples, faults, pending, lost = all_reduce_sum(counts).tolist()
        samples, faults = samples + before.samples, faults + before.faults
        if pending:
            found = all_gather_object(self._pending)
            self._pending = []
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                self._write([line for part in found for line in part])
        if lost:
            first = next(fault for part in all_gather_object(self._lost[:1]) for fault in part)
            raise ValueError(f"{first.detail} (found by one rank; all of them stop)")
        if samples < self.grace or faults <= self._limit * samples:
            return
        total = self._total()
        by_cause = ", ".join(f"{count} {cause}" for cause, count in total.causes.most_common(5))
        worst, count = total.shards.most_common(1)[0]
        raise ValueError(
            f"{faults:.0f} of {samples:.0f} samples could not be read ({by_cause}; {count} of them "
            f"in {worst}), more than the limit of {self._limit:.1%}: see {FILE} beside the logs, "
            "run `multikd shards inspect` on the training shards, or raise data.max_fault_rate"
        )

    def _total(self) -> _Counts:
        total = self._before
        for part in all_gather_object(self._own.as_dict()):
            total = total + _Counts.from_dict(part)
        return total

    def _note(self, trainer: pl.Trainer, batch: Batch, role: str) -> None:
        for fault in batch.faults:
            line = fault._asdict() | {"detail": redact(fault.detail)[:_MOST_DETAIL]}
            place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            self._pending.append(line | {"set": role} | place | {"rank": trainer.global_rank})
            if fault.cause == NO_STAND_IN:
                self._lost.append(fault)
        if world_size() == 1:
            self._write(self._pending)
            self._pending = []

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not lines or self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / FILE).open("a", encoding="utf-8") as file:
            # In one go, as another rank may be adding its last words to the same file.
            file.write("".join(json.dumps(line) + "\n" for line in lines))
