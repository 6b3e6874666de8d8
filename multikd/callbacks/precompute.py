"""Run the teachers once over every recorded view, so that training only reads their features."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multikd.data.cache import FeatureCacheWriter
from multikd.data.loader import ShardLoader
from multikd.data.module import ShardDataModule
from multikd.distributed import all_or_none, barrier
from multikd.modules.distillation import DistillationModule, to_float

log = logging.getLogger(__name__)


class PrecomputeFeatures(pl.Callback):
    """Fill the data module's feature cache before the first step (``data.cache`` must be set).

    Each image has ``recorded`` views (a setting of the training views); the teachers see each of
    them once, ranks share the work, and the loader reads the features of exactly the view that it
    yields. Interrupted, it goes on where it stopped; complete, it is skipped. A cache of other
    weights, views or data is refused by name.

    Args:
        progress: show a progress bar on rank 0.
    """

    def __init__(self, progress: bool = True) -> None:
        self.progress = progress

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compute what is missing, before Lightning builds the training loader.

        (The schedule asks for the loader's length in ``configure_optimizers``, which comes before
        every ``on_…_start`` hook.)
        """
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ShardDataModule) or not isinstance(pl_module, DistillationModule):
            raise ValueError(
                "PrecomputeFeatures works with multikd's ShardDataModule and DistillationModule"
            )
        if data.cache is None:
            raise ValueError(
                "PrecomputeFeatures needs a folder for the features: set data.init_args.cache"
            )
        fingerprints = {name: _fingerprint(pl_module, name) for name in pl_module.teacher_names}
        complete = data.cache_complete(fingerprints)
        barrier()  # every rank has looked before any of them writes
        if complete:
            log.info("teachers' features: complete in %s, no teacher runs", data.cache)
        else:
            self._fill(trainer, pl_module, data, fingerprints)

    @torch.no_grad()
    def _fill(
        self,
        trainer: pl.Trainer,
        module: DistillationModule,
        data: ShardDataModule,
        fingerprints: dict[str, str],
    ) -> None:
        """Each rank its share; what stops one (a full disk, a sample without a stand-in) stops all,
        which would otherwise wait for it."""
        with all_or_none():
            writer = self._open(trainer, module, data, fingerprints)
        with all_or_none():
            loader = data.precompute_dataloader(trainer.global_rank, trainer.world_size)
        with all_or_none():
            if loader is not None:
                self._compute(trainer, module, loader, writer)

    def _open(
        self,
        trainer: pl.Trainer,
        module: DistillationModule,
        data: ShardDataModule,
        fingerprints: dict[str, str],
    ) -> FeatureCacheWriter:
        device = trainer.strategy.root_device
        module.teachers.to(device)  # the rest follows when Lightning places the module
        size = data.train_views[0].size
        blank = torch.zeros(1, 3, size, size, device=device)  # for the shapes alone
        return data.open_cache_writer(
            {n: (fingerprints[n], module.run_teacher(n, blank)) for n in module.teacher_names}
        )

    def _compute(
        self,
        trainer: pl.Trainer,
        module: DistillationModule,
        loader: ShardLoader,
        writer: FeatureCacheWriter,
    ) -> None:
        device = trainer.strategy.root_device
        columns = (
            TextColumn("   teachers' features"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} batches"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        shown = self.progress and trainer.global_rank == 0
        with Progress(*columns, disable=not shown, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(loader))
            try:
                for batch in loader:
                    images = to_float(batch.views[0].to(device))
                    for name in module.teacher_names:
                        writer.put(batch, name, module.run_teacher(name, images))
                    bar.advance(task)
            finally:
                writer.finish()  # interrupted, too: what was computed is kept


def _fingerprint(module: DistillationModule, name: str) -> str:
    """The teacher's own, and the student's patch size where the teacher resizes by it."""
    teacher = module.teacher(name)
    if teacher.resize != "grid":
        return teacher.fingerprint()
    return f"{teacher.fingerprint()}, for student patches of {module.student.spec.patch_size} px"
