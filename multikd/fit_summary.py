"""What a command says when Lightning is done: figures, files, and what comes next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from multikd.preflight import checkpoint_folders, shown
from multikd.saving import steps_in

_SAID = ("epoch/loss", "val/knn", "val/linear", "val/accuracy")


def figures_of(trainer: pl.Trainer, seconds: float) -> dict[str, Any]:
    """The last value of everything logged, epochs, steps, seconds, files; as JSON values."""
    metrics = {
        name: float(value)
        for name, value in sorted(trainer.callback_metrics.items())
        if math.isfinite(float(value))
    }
    return {
        "metrics": metrics,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": seconds,
        "checkpoint": checkpoint_of(trainer),
        "best": best_of(trainer),
        "logs": [shown(Path(logger.log_dir)) for logger in trainer.loggers if logger.log_dir],
    }


def checkpoint_of(trainer: pl.Trainer) -> str | None:
    """The run's newest checkpoint; None where there is none, or a trial run wrote none."""
    if getattr(trainer, "fast_dev_run", False):
        return None
    written = [path for folder in checkpoint_folders(trainer) for path in folder.glob("*.ckpt")]
    last = [path for path in written if path.name == "last.ckpt"]
    newest = max(last or written, key=steps_in, default=None)
    return None if newest is None else shown(newest)


def best_of(trainer: pl.Trainer) -> dict[str, Any] | None:
    """The best checkpoint by a watched value, and how good it was; None where none is kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            score = callback.best_model_score
            return {
                "path": shown(Path(callback.best_model_path)),
                "monitor": callback.monitor,
                "value": None if score is None else float(score),
            }
    return None


def fit_text(figures: dict[str, Any]) -> str:
    """A few lines for the end of ``multikd fit``."""
    metrics = figures["metrics"]
    said = [f"{name} {metrics[name]:.4g}" for name in _SAID if name in metrics]
    minutes, seconds = divmod(round(figures["seconds"]), 60)
    lines = [
        f"trained  {figures['epochs']} epochs, {figures['steps']} steps in {minutes}:{seconds:02d}"
        + (f" ({', '.join(said)})" if said else "")
    ]
    if figures["logs"]:
        lines.append(f"logs     {', '.join(figures['logs'])}")
    if figures.get("best"):
        best = figures["best"]
        value = "" if best["value"] is None else f" {best['value']:.4g}"
        lines.append(f"best     {best['path']} ({best['monitor']}{value})")
    if figures["checkpoint"]:
        lines += [
            f"saved    {figures['checkpoint']}",
            f"next     multikd export {figures['checkpoint']} my-student/",
        ]
    return "\n".join(lines)
