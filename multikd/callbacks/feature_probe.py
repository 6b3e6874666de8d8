"""What the probes during training share: features of validation, gathered once for all of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from multikd.distributed import all_gather_object
from multikd.types import Batch, TokenFeatures

Rows = tuple[Tensor, Tensor]


class Labelled(NamedTuple):
    """Summaries of labelled images over all ranks: those that are scored, those that are learnt."""

    queries: Tensor  # float32 (B, D) of data.val
    query_labels: Tensor  # int64 (B,)
    bank: Tensor  # float32 (M, D) of data.bank
    bank_labels: Tensor  # int64 (M,)


class FeatureProbe(pl.Callback):
    """Score the student's summaries after validation and log the accuracy as ``metric``.

    Needs ``data.bank`` beside ``data.val``. The features are those that ``validation_step`` gave
    anyway: of several probes of a trainer the first one keeps and gathers them, for all.

    Args:
        every_n_epochs: in `fit`, score the validations of every n-th epoch only.
    """

    metric: ClassVar[str]

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be 1 or more, received {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self._parts: dict[int, list[Rows]] = {}
        self._gathered: Labelled | None = None

    @abstractmethod
    def accuracy(self, found: Labelled) -> float:
        """Share of the queries answered rightly, in 0–1; called on one rank.

        Raises:
            ValueError: what the bank does not allow; raised on every rank.
        """

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether this validation is scored."""
        if trainer.sanity_checking:
            return False
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new collection."""
        self._parts, self._gathered = {0: [], 1: []}, None

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
        if self._keeper(trainer) is not self or not isinstance(outputs, dict):
            return
        features: TokenFeatures = outputs["features"]
        if features.summary is None or dataloader_idx > 1:
            return
        valid = (batch.positions >= 0) & (batch.labels >= 0)
        self._parts[dataloader_idx].append(
            (features.summary[valid].float().cpu(), batch.labels[valid].cpu())
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather over ranks, score on the first, log on all."""
        keeper = self._keeper(trainer)
        if keeper is None or not self.due(trainer):
            return
        if keeper is self:
            self._gathered = self._gather()
        found = keeper._gathered
        if found is None or len(found.query_labels) == 0 or len(found.bank_labels) == 0:
            return
        answer: float | str | None = None
        if trainer.global_rank == 0:  # the others wait: a fit would fight for the same cores
            try:
                answer = self.accuracy(found)
            except ValueError as error:
                answer = str(error)
        answer = all_gather_object(answer)[0]
        if not isinstance(answer, float):
            raise ValueError(f"{type(self).__name__} on data.bank: {answer}")
        value = torch.tensor(answer, dtype=torch.float32, device=pl_module.device)
        # The same on every rank, so that averaging over them changes nothing but Lightning's mind.
        pl_module.log(self.metric, value, prog_bar=True, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the features."""
        self._parts, self._gathered = {}, None

    def _keeper(self, trainer: pl.Trainer) -> FeatureProbe | None:
        """The first probe that is due; Lightning calls it before the others."""
        callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
        probes = (c for c in callbacks if isinstance(c, FeatureProbe))
        return next((probe for probe in probes if probe.due(trainer)), None)

    def _gather(self) -> Labelled:
        parts = {index: _join(rows) for index, rows in self._parts.items()}
        gathered = all_gather_object(parts)
        return Labelled(
            *_join([rank[0] for rank in gathered]), *_join([rank[1] for rank in gathered])
        )


def _join(parts: list[Rows]) -> Rows:
    """Concatenate, leaving out what holds nothing."""
    present = [(f, y) for f, y in parts if len(y)]
    if not present:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return torch.cat([f for f, _ in present]), torch.cat([y for _, y in present])
