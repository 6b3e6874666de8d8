"""A callback that writes every batch of a run to a file, for ``kill_resume.py``."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Recorder(pl.Callback):
    """Appends a row a batch to ``rows.RANK.jsonl``: keys, views, losses, weights of teachers, and a
    digest of what is trained after it. At the end of the run, a digest of its whole state.

    Args:
        folder: where the rows go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._file = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; another attempt writes after what is there."""
        path = Path(self.folder) / f"rows.{trainer.global_rank}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._write({"attempt": os.getpid()})

    def _write(self, row: dict[str, Any]) -> None:
        # One call: a kill leaves a whole row or none.
        os.write(self._file, (json.dumps(row) + "\n").encode())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write this batch's row."""
        views = hashlib.sha256()
        for view in batch.views:
            views.update(view.numpy().tobytes())
        records: Any = pl_module.last_records
        self._write(
            {
                "at": [trainer.current_epoch, batch_idx],
                "keys": batch.keys,
                "views": views.hexdigest()[:16],
                "losses": [r.losses.tolist() for r in records],
                "totals": [float(r.total) for r in records],
                "lambdas": [r.lambdas.tolist() for r in records],
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
                "weights": digest_of(pl_module)[:16],
            }
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last row."""
        self._write({"final": digest_of(pl_module), "steps": trainer.global_step})


def digest_of(module: pl.LightningModule) -> str:
    """SHA-256 of the module's state: student, average, ladder, normalisers, balancers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
