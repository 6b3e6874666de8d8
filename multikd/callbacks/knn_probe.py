"""k-NN accuracy of the student during training: is it learning?"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from multikd.distributed import all_gather_object
from multikd.evaluation.knn import knn_predict
from multikd.types import Batch, TokenFeatures


class KNNProbe(pl.Callback):
    """Score the student by weighted k-NN after validation and log ``val/knn``.

    Needs ``data.bank`` (labelled images that vote) beside ``data.val`` (images that are scored).
    k = 20, cosine, temperature 0.07, as DINO and its successors evaluate.

    Args:
        k: neighbours that vote.
        temperature: of the votes' weights ``exp(cosine / temperature)``.
        every_n_epochs: in `fit`, score the validations of every n-th epoch only.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07, every_n_epochs: int = 1) -> None:
        if k < 1 or every_n_epochs < 1:
            raise ValueError(
                f"k and every_n_epochs must be 1 or more, received {k} and {every_n_epochs}"
            )
        self.k = k
        self.temperature = temperature
        self.every_n_epochs = every_n_epochs
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new collection."""
        self._parts = {0: [], 1: []}

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the labelled, real (not filler) rows of this batch."""
        if not self._due(trainer) or not isinstance(outputs, dict) or dataloader_idx > 1:
            return
        features: TokenFeatures = outputs["features"]
        if features.summary is None:
            return
        valid = (batch.positions >= 0) & (batch.labels >= 0)
        self._parts[dataloader_idx].append(
            (features.summary[valid].float().cpu(), batch.labels[valid].cpu())
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather over ranks, vote, log."""
        if not self._due(trainer):
            return
        parts = {
            index: (
                torch.cat([f for f, _ in rows]) if rows else torch.empty(0, 0),
                torch.cat([y for _, y in rows]) if rows else torch.empty(0, dtype=torch.int64),
            )
            for index, rows in self._parts.items()
        }
        self._parts = {0: [], 1: []}
        gathered = all_gather_object(parts)
        queries, query_labels = _join([rank[0] for rank in gathered])
        bank, bank_labels = _join([rank[1] for rank in gathered])
        if len(query_labels) == 0 or len(bank_labels) == 0:
            return
        predicted = knn_predict(
            bank,
            bank_labels,
            queries,
            k=min(self.k, len(bank_labels)),
            temperature=self.temperature,
        )
        accuracy = (predicted == query_labels).double().mean().float()
        # The same on every rank, so that averaging over them changes nothing but Lightning's mind.
        pl_module.log("val/knn", accuracy.to(pl_module.device), prog_bar=True, sync_dist=True)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate what the ranks hold, leaving out ranks that hold nothing."""
    present = [(f, y) for f, y in parts if len(y)]
    if not present:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return torch.cat([f for f, _ in present]), torch.cat([y for _, y in present])
