"""The hooks by which a module goes on inside an epoch, for LightningModules of every method."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from multikd.data.resuming import LoaderState
from multikd.modules.records import StepRecord
from multikd.modules.resuming import (
    begin_batch,
    go_on,
    note_validation,
    read_place,
    settle_lengths,
    write_place,
)
from multikd.modules.undo import StepUndo
from multikd.types import Batch, TokenFeatures


class Resumable(pl.LightningModule):
    """A mix-in: seeds of dropout, the place in the data, what a guard may put back, prediction.

    No method of distillation is in here: who mixes it in says who is optimised and when. It calls
    ``super()`` in the hooks that it overrides, and sets ``lr_batch`` (None: the rate is not scaled
    with the batch).
    """

    seed: Tensor
    lr_batch: int | None = None

    def __init__(self) -> None:
        super().__init__()
        seed = torch.initial_seed() & (2**63 - 1)
        # A buffer, so that a resumed run goes on with the same draws.
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self._run_seed = seed
        self._validated_at = -1
        self._resumed: LoaderState | None = None
        self._gradients: dict[str, Tensor] = {}
        self.last_records: tuple[StepRecord, ...] = ()
        # Set by a guard that may skip an optimiser step: what to put back then, and that it does.
        self.undo: StepUndo | None = None
        self.skip_step = False

    def teacher_facts(self) -> dict[str, dict[str, str]]:
        """Encoder, licence, source and fingerprint of every teacher; of none by default."""
        return {}

    def configure_model(self) -> None:
        """Refuse sharded parameters (FSDP2), for which these methods are not built.

        Raises:
            ValueError: under ``ModelParallelStrategy``.
        """
        if self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} trains whole models on each process: set "
                "trainer.strategy=ddp in place of ModelParallelStrategy"
            )

    def on_train_start(self) -> None:
        """After a checkpoint was restored: read the seed once; go on inside an epoch."""
        go_on(self)

    def on_train_epoch_start(self) -> None:
        """An epoch after one that went on in another layout has its own length again."""
        settle_lengths(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and drop path, and remember what a skipped step puts back."""
        begin_batch(self, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Note that the validation due after this batch has run."""
        note_validation(self)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As in validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Summaries and logits with the keys they belong to.

        Without the patches: Lightning keeps all predictions until the end.
        """
        features: TokenFeatures = self(batch.views[0])
        return answers(TokenFeatures(features.summary, logits=features.logits), batch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring Lightning's counters to one form, whatever hook the checkpoint was written in."""
        read_place(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the teachers, whether validation ran, and gradients that are being accumulated."""
        write_place(self, checkpoint)
        checkpoint["teachers"] = self.teacher_facts()


def log_step(module: pl.LightningModule, record: StepRecord) -> None:
    """Log every loss, weight and norm of a step as device tensors: no synchronisation here."""
    size = len(record.keys)
    module.log("train/loss", record.total, prog_bar=True, batch_size=size)
    module.log_dict(record.values(), batch_size=size)
    rows = record.losses.mean(dim=1)
    means = {f"epoch/loss/{name}": rows[i] for i, name in enumerate(record.names)}
    means["epoch/loss"] = record.total
    module.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)


def mean_over_views(module: Any, batch: Batch) -> Tensor:
    """Loss of a batch: the mean of ``module.step`` over its views, each logged and kept."""
    losses, records = [], []
    for view in range(len(batch.views)):
        loss, record = module.step(batch, view)
        losses.append(loss)
        records.append(record)
        log_step(module, record)
    module.last_records = tuple(records)
    return torch.stack(losses).mean()


def answers(features: TokenFeatures, batch: Batch) -> dict[str, Any]:
    """What validation and prediction hand to probes and writers."""
    return {
        "features": features,
        "labels": batch.labels,
        "positions": batch.positions,
        "keys": batch.keys,
    }


def refuse_views(module: pl.LightningModule) -> None:
    """Refuse several training views.

    Raises:
        ValueError: there are.
    """
    views = getattr(getattr(module.trainer, "datamodule", None), "train_views", [None])
    if len(views) != 1:
        raise ValueError(
            f"{type(module).__name__} learns from one view of each image, received {len(views)}: "
            "give data.train_views one policy"
        )


def refuse_accumulation(module: pl.LightningModule, why: str) -> None:
    """Refuse ``accumulate_grad_batches`` for a method in which it would mean something else.

    Raises:
        ValueError: it is not 1.
    """
    count = module.trainer.accumulate_grad_batches
    if count != 1:
        raise ValueError(
            f"{type(module).__name__} {why}, so gradients can't be accumulated over {count} "
            "batches: set trainer.accumulate_grad_batches to 1 and raise data.batch_size"
        )
