"""Signals of a scheduler: finish the step, save, and end with a code that asks to be run again."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from multikd.distributed import all_gather_object, all_reduce_max
from multikd.errors import EXIT_AGAIN, PreemptedError
from multikd.saving import CheckpointNotWrittenError, VerifiedCheckpointIO

log = logging.getLogger(__name__)


class SaveOnSignal(pl.Callback):
    """On SIGTERM or SIGUSR1: finish the optimiser step, write a checkpoint, end with code 75.

    The signal may come to any rank; all stop after the same step (one reduction of two numbers a
    step, among several ranks only). Lightning's own handlers, which save in the middle of whatever
    is being done, are replaced while training runs. In validation the run stops after the batch at
    hand, and validates again when it goes on. Further signals change nothing.

    Under SLURM with ``auto_requeue`` (Lightning's default there) the checkpoint is Lightning's
    ``hpc_ckpt_N.ckpt``, from which the same command goes on by itself, and rank 0 asks for the job
    to be requeued.

    It also ends all ranks when rank 0 could not write a checkpoint.

    Args:
        signals: names of the signals.
        filename: of the checkpoint, beside the others.
    """

    def __init__(
        self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), filename: str = "preempted"
    ) -> None:
        for name in signals:
            if not hasattr(signal, name) or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"signals must be names of signals that can be caught, such as SIGTERM, "
                    f"received {name!r}"
                )
        if not filename or "/" in filename:
            raise ValueError(f"filename must be a plain name, received {filename!r}")
        self.signals = tuple(signals)
        self.filename = filename
        self._received = 0
        self._handlers: dict[int, Any] = {}
        self._io: VerifiedCheckpointIO | None = None

    # --- signals ------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, after Lightning has."""
        self._received = 0
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, VerifiedCheckpointIO):
            self._io, plugin.failure = plugin, None
            plugin.deferred = trainer.world_size > 1
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {int(getattr(signal, name)) for name in self.signals}
        environment = _slurm(trainer)
        if environment is not None and environment.requeue_signal is not None:
            numbers.add(int(environment.requeue_signal))
        for number in numbers:
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        self._handlers = {}

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lightning's handlers again."""
        self._give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's handlers again."""
        self._give_back()

    # --- where all ranks look ------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an optimiser step."""
        if not trainer.fit_loop._should_accumulate():
            self.look(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """In the validation of a fit."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint may have failed; a signal this late is not needed any more."""
        self._received = 0
        self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop all ranks if one of them has a reason.

        Raises:
            CheckpointNotWrittenError: a checkpoint could not be written.
            PreemptedError: a signal came, and everything is saved.
        """
        failed = self._io is not None and self._io.failure is not None
        flags = [float(self._received), float(failed)]
        if trainer.world_size > 1:
            here = torch.tensor(flags, dtype=torch.float32, device=pl_module.device)
            flags = all_reduce_max(here).tolist()
        if flags[1]:
            own = None if self._io is None else self._io.failure
            words = [w for w in all_gather_object(None if own is None else str(own)) if w]
            raise CheckpointNotWrittenError(words[0])
        if flags[0]:
            self._stop(trainer, int(flags[0]))

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        environment = _slurm(trainer)
        path = self._path(trainer, environment is not None)
        if self._io is not None:
            self._io.deferred = False  # the end is near in any case
        trainer.save_checkpoint(path)
        name = signal.Signals(number).name
        if environment is not None:
            if trainer.is_global_zero:
                requeue()
            how = "SLURM starts the same command again"
        else:
            how = "the same command with --resume auto goes on"
        raise PreemptedError(
            f"stopped by {name} after step {trainer.global_step}, saved to {path}: {how} "
            f"(exit code {EXIT_AGAIN})"
        )

    def _path(self, trainer: pl.Trainer, slurm: bool) -> str:
        if slurm:  # where Lightning looks for it
            return str(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
        folders = [
            callback.dirpath
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None
        ]
        folder = str(folders[0] if folders else trainer.default_root_dir)
        return f"{folder.rstrip('/')}/{self.filename}.ckpt"


def _slurm(trainer: pl.Trainer) -> SLURMEnvironment | None:
    """The cluster, where the job is to be requeued."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment
    return None


def requeue() -> bool:
    """Ask SLURM to run this job again; whether it said yes."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        log.warning("this SLURM job has no number, so it is not requeued: %r", job)
        return False
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("SLURM job %s could not be requeued: %s", job, error)
        return False
    if done.returncode:
        log.warning("SLURM job %s could not be requeued: %s", job, done.stderr.strip()[:200])
        return False
    log.info("SLURM job %s is requeued", job)
    return True


def hpc_checkpoints(root: str | Path) -> list[Path]:
    """What ``SaveOnSignal`` left under SLURM."""
    return [] if "://" in str(root) else sorted(Path(root).glob("hpc_ckpt_*.ckpt"))
