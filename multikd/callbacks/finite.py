"""Skip steps that are not finite on all ranks together, stop after some, and say whose they are."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from multikd.distributed import all_gather_object, all_reduce_max
from multikd.modules.distillation import DistillationModule
from multikd.modules.records import StepRecord, gradient_norm
from multikd.modules.resumable import Resumable
from multikd.modules.undo import StepUndo

log = logging.getLogger(__name__)

# Modules that can put back what the batches of a skipped step changed.
_UNDOING = (DistillationModule, Resumable)


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names teacher and sample keys."""


class FiniteLossGuard(pl.Callback):
    """Skip optimiser steps whose loss or gradient is not finite, on all ranks together; stop after
    some in a row.

    A skipped step leaves everything as it was before its batches: parameters, optimiser, running
    statistics of normalisers, balancers and batch norms, the average of the student. It still
    counts as a step: the schedule goes by the place in the data. Every skipped step is logged with
    its teachers and sample keys. ``max_in_a_row`` of them stop the run, on all ranks, before a
    checkpoint is written.

    The verdict is one reduction of one number and one look at it an optimiser step. On an
    accelerator that look waits for the device, as a gradient scaler's does each step;
    ``max_in_a_row: 1`` skips nothing and looks only every ``every_n_steps`` and before each
    checkpoint. With 16-bit precision and its scaler the scaler skips what overflowed, as always;
    then only losses are judged here.

    Args:
        every_n_steps: steps between looks on an accelerator with ``max_in_a_row: 1``; else 1.
        max_in_a_row: so many steps in a row that are not finite stop the run.
    """

    def __init__(self, every_n_steps: int = 50, max_in_a_row: int = 3) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, received {every_n_steps}")
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be 1 or more, received {max_in_a_row}")
        self.every_n_steps = every_n_steps
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self._pending: list[tuple[int, StepRecord]] = []
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Counts survive a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts up again."""
        self.skipped, self.in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a run that was stopped."""
        self._pending, self._steps = [], 0
        if isinstance(pl_module, _UNDOING):
            pl_module.undo = None if self.max_in_a_row == 1 else StepUndo()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note this step's losses and, when it is time, look at them."""
        records: tuple[StepRecord, ...] = getattr(pl_module, "last_records", ())
        if not records:
            return
        self._pending += [(trainer.global_step, record) for record in records]
        if self.max_in_a_row > 1:
            return  # looked at when gradients are complete
        self._steps += 1
        if self._steps >= (1 if pl_module.device.type == "cpu" else self.every_n_steps):
            self.check(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step that is about to be taken, and skip it if need be.

        Raises:
            NonFiniteLossError: on every rank, after too many in a row.
        """
        if self.max_in_a_row == 1 or not self._pending:
            return
        pending, self._pending = self._pending, []
        bad = _any_bad(pending, pl_module.device)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if scaler is None and any(g is not None for g in gradients):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            bad = torch.maximum(bad, (~torch.isfinite(gradient_norm(parameters))).float())
        skip = float(all_reduce_max(bad)) != 0.0
        if isinstance(pl_module, _UNDOING):
            pl_module.skip_step = skip
        if not skip:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        said = [s for part in all_gather_object(describe(pending)) for s in part]
        said = said or [f"the gradient at step {trainer.global_step} (each loss is finite)"]
        if isinstance(pl_module, _UNDOING) and pl_module.undo is not None:
            pl_module.undo.undo()
        if scaler is None:  # which finds that they are not finite, and skips the step itself
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = None  # optimisers pass over these
        if self.in_a_row >= self.max_in_a_row:
            raise _stopped(said, f"{self.in_a_row} steps in a row were skipped; training")
        log.warning(
            "optimiser step %d is skipped on all ranks, since %s is not finite (%d skipped so far)",
            trainer.global_step,
            "; ".join(said[:8]),
            self.skipped,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is left."""
        if self.max_in_a_row == 1:
            self.check(pl_module.device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never write a checkpoint after a broken step."""
        if self._pending and self.max_in_a_row == 1:
            self.check(pl_module.device)

    def check(self, device: torch.device) -> None:
        """Look at the pending records.

        Raises:
            NonFiniteLossError: on every rank, if a loss of any rank is not finite.
        """
        pending, self._pending, self._steps = self._pending, [], 0
        if float(all_reduce_max(_any_bad(pending, device))) == 0.0:
            return
        raise _stopped([s for part in all_gather_object(describe(pending)) for s in part])


def _stopped(sentences: list[str], what: str = "Training") -> NonFiniteLossError:
    return NonFiniteLossError(
        "the loss is not finite: "
        + "; ".join(sentences[:8])
        + f". {what} stopped on all ranks and the last checkpoint is as it was. Look at these "
        "images, lower the learning rate, or give that teacher dtype=float32"
    )


def _any_bad(pending: list[tuple[int, StepRecord]], device: torch.device) -> Tensor:
    bad = torch.zeros((), device=device)
    for _, record in pending:
        bad = torch.maximum(bad, _is_bad(record).to(device))
    return bad


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
