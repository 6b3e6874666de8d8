"""Run the teachers once over every recorded view, so that training only reads their features."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multikd.data.cache import FeatureCacheWriter
from multikd.data.cache_record import read_meta
from multikd.data.loader import ShardLoader
from multikd.data.module import ShardDataModule
from multikd.distributed import all_or_none, barrier
from multikd.losses.term import Term
from multikd.modules.distillation import DistillationModule, to_float
from multikd.teachers.kept import facts_of
from multikd.types import TOKEN_TYPES, TokenFeatures, stack_token_features

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
        settle_logits(pl_module, data.cache)
        fingerprints = fingerprints_of(pl_module)
        complete = data.cache_complete(fingerprints, verify=True)
        barrier()  # every rank has looked before any of them writes
        if complete:
            log.info("teachers' features: complete in %s, no teacher runs", data.cache)
        else:
            fill_cache(trainer, pl_module, data, fingerprints, self.progress)
        barrier()


def settle_logits(module: DistillationModule, folder: str) -> None:
    """Give logits for the cache also where it keeps them and no term of this run reads them.

    Raises:
        ValueError: a term reads what the cache does not keep, or there are no teachers.
    """
    if not module.teacher_names:
        raise ValueError(
            f"data.cache ({folder}) keeps features of teachers, and this run has none: set it to "
            "null"
        )
    for term_name, term in module.terms.items():
        for name in cast(Term, term).layers_of:
            raise ValueError(
                f"term {term_name!r} reads a layer of teacher {name!r}, and a feature cache keeps "
                "final features only: set data.cache to null, or the term's layers to null for "
                "the final patches"
            )
    try:
        records = read_meta(Path(folder), None)
    except (FileNotFoundError, ValueError):  # said where the cache is opened
        return
    for name, record in records.items():
        if name in module.logits_of and record.logits is None:
            raise ValueError(
                f"a term reads the logits of teacher {name!r}, which the feature cache {folder} "
                "does not keep (it was made for a run without such a term): name another folder, "
                "or remove this one"
            )
        if record.logits is not None:
            module.logits_of.add(name)


def fingerprints_of(module: DistillationModule) -> dict[str, str]:
    """Name → what the features of each teacher depend on."""
    return {name: _fingerprint(module, name) for name in module.teacher_names}


@torch.no_grad()
def fill_cache(
    trainer: pl.Trainer,
    module: DistillationModule,
    data: ShardDataModule,
    fingerprints: dict[str, str],
    progress: bool = True,
) -> int:
    """Compute the rows that the data module's cache lacks; the ranks share them.

    Returns:
        How many views this rank computed.
    """
    device = trainer.strategy.root_device
    module.teachers.to(device)  # the rest follows when Lightning places the module
    writer = None
    # What stops one rank (a full disk, a sample without a stand-in) stops all, which would
    # otherwise wait for it.
    for first in (True, False):  # what is measured for int8 and PCA, rank 0 measures
        with all_or_none():
            if (trainer.global_rank == 0) is first:
                writer = open_writer(module, data, fingerprints, device)
                if first:
                    writer.mend()
    with all_or_none():
        loader = data.precompute_dataloader(trainer.global_rank, trainer.world_size)
    shown = progress and trainer.global_rank == 0
    with all_or_none():
        return (
            0
            if loader is None or writer is None
            else _compute(module, loader, writer, device, shown)
        )


def _compute(
    module: DistillationModule,
    loader: ShardLoader,
    writer: FeatureCacheWriter,
    device: torch.device,
    shown: bool,
) -> int:
    columns = (
        TextColumn("   teachers' features"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    done = 0
    with Progress(*columns, disable=not shown, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(loader))
        try:
            for batch in loader:
                images = to_float(batch.views[0].to(device))
                for name in module.teacher_names:
                    writer.put(batch, name, module.run_teacher(name, images))
                done += int((batch.positions >= 0).sum())
                bar.advance(task)
        finally:
            writer.finish()  # interrupted, too: what was computed is kept
    return done


def open_writer(
    module: DistillationModule,
    data: ShardDataModule,
    fingerprints: dict[str, str],
    device: torch.device,
) -> FeatureCacheWriter:
    """The writer, with features of real views where scales or bases are measured on them."""
    size = data.train_views[0].size
    blank = torch.zeros(1, 3, size, size, device=device)  # for the shapes alone
    kept = data.cached_teachers()
    examples: dict[str, TokenFeatures] = {}
    measured = any(data.cache_storage.measured(token) for token in TOKEN_TYPES)
    for name in module.teacher_names:
        if name in kept or not measured:
            examples[name] = module.run_teacher(name, blank)
    if len(examples) < len(module.teacher_names):
        views = [b.views[0] for b in data.example_dataloader(data.cache_storage.examples())]
        for name in module.teacher_names:
            if name not in examples:
                examples[name] = stack_token_features(
                    [module.run_teacher(name, to_float(v.to(device))).to("cpu") for v in views]
                )
    sizes = {data.train_views[0].size, data.eval_views.size}
    about = {
        name: facts_of(
            module.teacher(name), [(s, s) for s in sorted(sizes)], module.student.spec.patch_size
        )
        for name in module.teacher_names
    }
    return data.open_cache_writer({n: (fingerprints[n], examples[n]) for n in examples}, about)


def _fingerprint(module: DistillationModule, name: str) -> str:
    """The teacher's own, and the student's patch size where the teacher resizes by it."""
    teacher = module.teacher(name)
    if teacher.resize != "grid":
        return teacher.fingerprint()
    return f"{teacher.fingerprint()}, for student patches of {module.student.spec.patch_size} px"
