"""Lightning's ``predict`` over pieces of work, on one device or many."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from multikd.console import take_over_lightning
from multikd.retention.encoders import Network
from multikd.retention.extract import ExtractOptions, ShardBatches, ShardSink, Work
from multikd.types import Batch


class Extractor(pl.LightningModule):
    """A network whose features go into stores instead of being returned."""

    def __init__(self, network: Network, sink: ShardSink) -> None:
        super().__init__()
        self.network = network
        self.sink = sink

    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        """Images become float in [0, 1] on the device; one forward pass gives everything."""
        images = batch.views[0].to(torch.float32).div_(255)
        self.sink.put(batch, self.network(images))
        return len(batch)  # Lightning warns of a step that returns nothing


class Bar(Callback):
    """One line a piece of work, on rank 0."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._progress: Progress | None = None
        self._task = TaskID(0)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While anything is extracted."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} images"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        shown = self.shown
        with Progress(*columns, disable=not shown, console=Console(stderr=True)) as bar:
            self._progress = bar
            yield

    def begin(self, label: str, images: int) -> None:
        """A piece of work, of so many images on this rank."""
        if self._progress is not None:
            self._task = self._progress.add_task(f"  {label}", total=images)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        if self._progress is not None:
            self._progress.advance(self._task, len(batch))


class Runner:
    """A trainer for extraction alone.

    Args:
        options: devices, batches, threads.
        progress: show bars.
        trainer: to be used instead of one that is made.
    """

    def __init__(
        self, options: ExtractOptions, progress: bool, trainer: pl.Trainer | None = None
    ) -> None:
        self.options = options
        self.progress = progress
        self.given = trainer

    def run(self, works: Sequence[Work]) -> bool:
        """See ``extract``."""
        take_over_lightning()
        handler = signal.getsignal(signal.SIGINT)
        with _without_noise():
            bar = Bar(self.progress)
            trainer = self.given or self._trainer(bar)
            try:
                with bar.open():
                    for work in works:
                        self._one(trainer, work, bar)
            except SystemExit as stop:
                # What Lightning makes of Ctrl-C.
                if not isinstance(stop.__context__, KeyboardInterrupt):
                    raise
                if handler is not None:
                    signal.signal(signal.SIGINT, handler)
                raise KeyboardInterrupt from None
            trainer.strategy.barrier()
        return bool(trainer.is_global_zero)

    def _trainer(self, bar: Bar) -> pl.Trainer:
        options = self.options
        many = options.devices > 1
        try:
            trainer = pl.Trainer(
                accelerator=options.accelerator,
                devices=options.devices,
                strategy="ddp" if many else "auto",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                callbacks=[bar],
            )
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise ValueError(
                f"can't run on {options.devices} × {options.accelerator}: "
                f"{' '.join(str(error).split())}"
            ) from error
        bar.shown = self.progress and trainer.is_global_zero
        return trainer

    def _one(self, trainer: pl.Trainer, work: Work, bar: Bar) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        batches = ShardBatches(work, self.options, rank, world)
        bar.begin(work.label, sum(end - start for start, end in batches.spans))
        sink = ShardSink(work, batches.spans)
        module = Extractor(work.network, sink)
        before = next((p.device for p in work.network.parameters()), torch.device("cpu"))
        try:
            trainer.predict(module, dataloaders=batches, return_predictions=False)
        finally:
            work.network.to(before)
        faults = sum(store.fault_count() for store in list(work.stores.values())[:1])
        work.data.check_faults(work.split.name.rpartition("/")[2], faults, len(work.split))


@contextmanager
def _without_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        warnings.filterwarnings("ignore", r".*does not have many workers", UserWarning)
        warnings.filterwarnings(
            "ignore", r"Total length of `\w+` across ranks is zero", UserWarning
        )
        logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        level = logger.level
        logger.setLevel(logging.WARNING)  # which device it runs on is in our own summary
        try:
            yield
        finally:
            logger.setLevel(level)
