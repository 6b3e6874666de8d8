"""The ``trainer`` section of a config whose run gets a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multikd.runs.folder import CHECKPOINTS, LAST

CHECKPOINT_CLASS = "lightning.pytorch.callbacks.ModelCheckpoint"


def own_folder(
    config: dict[str, Any],
    folder: Path,
    *,
    own: Sequence[Any] = (),
    without: Sequence[str] = (),
    save_every: int | None = None,
    quiet: bool = True,
) -> None:
    """Let a run write into ``folder`` alone, where ``--resume auto`` finds its checkpoints.

    Args:
        config: a whole config; changed in place.
        folder: of the run.
        own: callbacks to add.
        without: class names of callbacks of the config to leave out, beside its checkpoints.
        save_every: keep a checkpoint of every so many steps, too; None: of every epoch alone.
        quiet: no progress bar and no table of the model.
    """
    trainer = config.setdefault("trainer", {})
    given = trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    leave = ("ModelCheckpoint", *without)
    callbacks = [c for c in given if class_of(c) not in leave]
    place = {"dirpath": str(folder / CHECKPOINTS), "enable_version_counter": False}
    name = LAST.removesuffix(".ckpt")
    last = {**place, "filename": name, "save_on_train_epoch_end": True}
    callbacks.append({"class_path": CHECKPOINT_CLASS, "init_args": last})
    if save_every:
        step = {**place, "filename": "step", "every_n_train_steps": save_every}
        callbacks.append({"class_path": CHECKPOINT_CLASS, "init_args": step})
    callbacks += own
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # A version each time it goes on: Lightning empties a folder of logs that it finds.
        "init_args": {"save_dir": str(folder), "name": "logs"},
    }
    trainer |= {
        "callbacks": callbacks,
        "logger": [logger],
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
    }
    if quiet:
        trainer |= {"enable_progress_bar": False, "enable_model_summary": False}


def class_of(part: Any) -> str:
    """The bare class name of a part of a config."""
    path = part.get("class_path", "") if isinstance(part, dict) else part
    return str(path).rpartition(".")[2]
