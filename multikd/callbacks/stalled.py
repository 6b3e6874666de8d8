"""A rank that makes no progress any more ends, and says where it hung."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from multikd.errors import EXIT_AGAIN

log = logging.getLogger(__name__)


class StallWatch(pl.Callback):
    """End this process when no batch has begun or ended for ``minutes``, with exit code 75.

    A rank that hangs (a stuck file system, a dead device, a collective that another rank never
    joins) holds all others up and keeps its machines for nothing. Each rank watches itself, in a
    thread, by the monotonic clock; the stack of every thread is written to ``stalled.RANK.txt``
    beside the logs, so that one sees which rank waited for data and which for the others.

    The main thread may be inside a call that never returns, so that an exception would never be
    raised: the process is ended as a kill would end it, and the last checkpoint is as it was.

    Args:
        minutes: longer than the longest validation batch, checkpoint or first batch takes. The
            process group has a time-out of its own (``trainer.strategy.init_args.timeout``).
    """

    def __init__(self, minutes: float = 30.0) -> None:
        if minutes <= 0:
            raise ValueError(f"minutes must be above 0, received {minutes}")
        self.seconds = 60.0 * minutes
        self._beat = 0.0
        self._where = ""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_end": None, "_thread": None}  # threads can't be copied

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all ranks together
        self._end = threading.Event()
        self._touch("before the first batch")
        self._thread = threading.Thread(
            target=self._watch, args=(trainer.global_rank, folder), daemon=True
        )
        self._thread.start()

    def _touch(self, where: str) -> None:
        self._beat, self._where = time.monotonic(), where

    def _watch(self, rank: int, folder: Path) -> None:
        while not self._end.wait(min(self.seconds / 10, 10.0)):
            waited = time.monotonic() - self._beat
            if waited > self.seconds:
                self._give_up(rank, folder, waited)

    def _give_up(self, rank: int, folder: Path, waited: float) -> None:
        path = folder / f"stalled.{rank}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {rank}: nothing for {waited:.0f} s, {self._where}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        # Not by way of logging alone: its lock may be what the main thread hangs in.
        sys.stderr.write(
            f"multikd: rank {rank} made no progress for {waited:.0f} s ({self._where}) and ends; "
            f"its stack is in {path}: start the same command again with --resume auto\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_AGAIN)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Progress."""
        self._touch(f"inside batch {batch_idx} of epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Progress."""
        self._touch(f"after batch {batch_idx} of epoch {trainer.current_epoch}")

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Progress."""
        self._touch(f"inside validation batch {batch_idx}")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Progress."""
        self._touch(f"after validation batch {batch_idx}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No more progress is expected."""
        self._end.set()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """No more progress is expected."""
        self._end.set()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """No more progress is expected."""
        self._end.set()
