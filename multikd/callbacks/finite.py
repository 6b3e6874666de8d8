"""Stop all ranks together when a loss is no longer finite, and say whose it was."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from multikd.distributed import all_gather_object, all_reduce_max
from multikd.modules.records import StepRecord


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names teacher and sample keys."""


class FiniteLossGuard(pl.Callback):
    """Check the losses before the optimiser may use them.

    On a CPU every step is checked. On an accelerator a check costs a synchronisation, so it runs
    every ``every_n_steps`` and before each checkpoint: a checkpoint of broken weights is never
    written, and the last good one stays. Between two checks the records are kept on the device,
    so that the first bad step is the one that is named. The verdict is reduced over the ranks;
    all of them raise together and none is left waiting in a collective.

    Args:
        every_n_steps: steps between checks on an accelerator; 1 on a CPU whatever this says.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, received {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._pending: list[tuple[int, StepRecord]] = []
        self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a run that was stopped."""
        self._pending, self._steps = [], 0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note this step's losses and, when it is time, look at them."""
        records: tuple[StepRecord, ...] = getattr(pl_module, "last_records", ())
        if not records:
            return
        self._pending += [(trainer.global_step, record) for record in records]
        self._steps += 1
        if self._steps >= (1 if pl_module.device.type == "cpu" else self.every_n_steps):
            self.check(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is left."""
        self.check(pl_module.device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never write a checkpoint after a broken step."""
        if self._pending:
            self.check(pl_module.device)

    def check(self, device: torch.device) -> None:
        """Look at the pending records.

        Raises:
            NonFiniteLossError: on every rank, if a loss of any rank is not finite.
        """
        pending, self._pending, self._steps = self._pending, [], 0
        bad = torch.zeros((), device=device)
        for _, record in pending:
            bad = torch.maximum(bad, _is_bad(record).to(device))
        if float(all_reduce_max(bad)) == 0.0:
            return
        sentences = [s for part in all_gather_object(describe(pending)) for s in part]
        raise NonFiniteLossError(
            "the loss is not finite: "
            + "; ".join(sentences[:8])
            + ". Training stopped on all ranks and the last checkpoint is as it was. Look at these "
            "images, lower the learning rate, or give that teacher dtype=float32"
        )


def _is_bad(record: StepRecord) -> Tensor:
    finite = torch.isfinite(record.total) & torch.isfinite(record.losses).all()
    for term in record.terms.values():
        finite = finite & torch.isfinite(term).all()
    return (~finite).float()


def describe(pending: list[tuple[int, StepRecord]]) -> list[str]:
    """One sentence part for each teacher or term of the first step that is not finite."""
    for step, record in pending:
        if float(_is_bad(record)) == 0.0:
            continue
        parts = []
        rows = {f"teacher '{n}'": record.losses[i] for i, n in enumerate(record.names)}
        rows |= {f"term '{n}'": values for n, values in record.terms.items()}
        for who, values in rows.items():
            where = (~torch.isfinite(values)).nonzero().flatten().tolist()
            if where:
                keys = ", ".join(record.keys[i] for i in where[:5])
                more = f" and {len(where) - 5} more" if len(where) > 5 else ""
                parts.append(f"{who} at step {step}, images {keys}{more}")
        return parts or [f"the weighted sum at step {step} (each teacher's loss is finite)"]
    return []
