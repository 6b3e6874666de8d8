"""What can be known to fail, or to destroy something, before training: said before training."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from multikd.callbacks import KNNProbe, LinearProbe
from multikd.callbacks.feature_probe import FeatureProbe
from multikd.checkpoints import read_config
from multikd.data.claims import PARTIAL, claims
from multikd.data.module import ShardDataModule
from multikd.data.resuming import LoaderState
from multikd.data.views import ShiftedViews
from multikd.losses.term import Term
from multikd.modules.distillation import DistillationModule
from multikd.modules.resumable import Resumable
from multikd.teachers.deferred import DeferredTeacher

log = logging.getLogger(__name__)

_LABELS_SEEN = 64

_PROBES: dict[str, type[FeatureProbe]] = {p.metric: p for p in (KNNProbe, LinearProbe)}
# Settings that may differ from a checkpoint's: speed, evaluation, where things lie, layout (the
# epoch goes on in another one, see data/resuming.py), how long the run is.
_HARMLESS = re.compile(
    r"data\.(num_workers|prefetch_factor|persistent_workers|worker_start|in_memory|in_memory_gb"
    r"|max_fault_rate|index_dir|shard_cache|shard_cache_gb|val|bank|eval_views|eval_batch_size"
    r"|batch_size|cache|cache_dtype|cache_storage|allow_pipe"
    r"|train(?!\.[^:]*\.(teachers|generic|views)(\.|$))|\w*(retries|timeout|checksum)\w*)(\.|$)"
    r"|model\.(validate_losses|compile_student|teacher_streams)$|model\.student\.grad_checkpointing$"
    r"|trainer\.(accumulate_grad_batches|devices|num_nodes|max_epochs|max_steps)$"
)
_TRAINER = (
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision"),
    *("max_epochs", "max_steps"),
)
# Lightning's own words for checkpoints that it finds by itself.
CKPT_WORDS = ("last", "best", "hpc")


def check_output(root: str | Path) -> None:
    """Make the output folder (unless it is an address), or say why it can't be.

    Raises:
        ValueError: it is a file, or can't be made or written to.
    """
    if "://" in str(root):
        return
    folder, remedy = Path(root), "give another --trainer.default_root_dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"the output folder {folder} is, or lies in, a file: {remedy}") from error
    except OSError as error:
        raise ValueError(
            f"the output folder {folder} can't be made ({error.strerror}): {remedy}"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"the output folder {folder} can't be written to: {remedy}")


def check_earlier_run(trainer: pl.Trainer) -> None:
    """Refuse a new run whose checkpoints would mix with those of an earlier one.

    Lightning would write ``last-v1.ckpt`` beside ``last.ckpt``, and the next command would read
    the wrong one. A run that SLURM requeued goes on from Lightning's own ``hpc_ckpt``.

    Raises:
        ValueError: there are checkpoints where the run would write its own.
    """
    requeued = any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    if trainer.global_rank != 0 or requeued or getattr(trainer, "fast_dev_run", False):
        return
    for folder in checkpoint_folders(trainer):
        found = sorted(path.name for path in folder.glob("*.ckpt"))
        if found:
            name = "last.ckpt" if "last.ckpt" in found else found[0]
            raise ValueError(
                f"{shown(folder)} holds an earlier run ({name}): add --ckpt_path=last to go on "
                "with it, or --trainer.default_root_dir=FOLDER for a new one"
            )


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Where the run's checkpoints go."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return list(dict.fromkeys(Path(c.dirpath) for c in callbacks if c.dirpath is not None))


def shown(path: Path) -> str:
    """A path as one would type it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def check_images(module: DistillationModule, data: ShardDataModule) -> None:
    """Refuse image sizes that student or teachers can't take, without running any of them.

    Raises:
        ValueError: names the teacher, or the student, and the size.
    """
    student = module.student
    claims(data.mixture(), module.teacher_names, module.teacher_data)  # says what does not fit
    check_schedule(module, data)
    for size in sorted({policy.size for policy in [*data.train_views, data.eval_views]}):
        student.grids((size, size))
        for name in module.teacher_names:
            try:
                module.teacher(name).grid_for((size, size), student.spec.patch_size)
            except ValueError as error:
                raise ValueError(f"teacher {name!r} on views of {size} px: {error}") from error
    check_shifts(module, data)
    view = data.train_views[0].size
    if (view, view) != student.spec.image_size:
        log.warning(
            "the training views have %d px and the student is built for %d px: is "
            "model.student.image_size meant to be %d?",
            view,
            student.spec.image_size[0],
            view,
        )


def check_partition(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse a partition with more groups than processes.

    Raises:
        ValueError: nobody would run the teachers of a group.
    """
    if isinstance(module, DistillationModule) and module.partition is not None:
        module.partition.check_ranks(trainer.world_size)


def check_schedule(module: DistillationModule, data: ShardDataModule) -> None:
    """Refuse schedules and weights of views, and partitions, that can't be.

    Raises:
        ValueError: names the setting.
    """
    count, weights = len(data.train_views), module.view_weights
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"model.view_weights has {len(weights)} entries and data.train_views {count}: give one "
            "for each view"
        )
    if module.teacher_view is not None and data.schedule.settings():
        raise ValueError(
            "with model.teacher_view the teachers see another view of the same images in the same "
            "step: leave data.view_mode and data.view_images out"
        )
    # Terms and curricula that compare with teachers on every image, where there are such.
    reading = [name for name, t in module.terms.items() if getattr(t, "uses_teachers", False)]
    reading += ["curriculum"] if getattr(module, "curriculum", None) is not None else []
    if reading and (module.partition is not None or module.teacher_data in PARTIAL):
        raise ValueError(
            f"{reading[0]} asks the teachers about every image, and with model.partition or "
            "model.teacher_data a teacher sees only some of them: leave out one or the other"
        )
    if module.partition is not None and data.cache is not None:
        raise ValueError(
            "with a feature cache no teacher is loaded in training, so there is nothing to divide "
            "over ranks: leave model.partition out, or data.cache"
        )


def check_labels(module: DistillationModule, data: ShardDataModule) -> None:
    """Refuse terms on labels where the training shards have none, or others than the student's.

    Looks at a few samples of each data set, spread over it; of the indexed mode alone.

    Raises:
        ValueError: names the term, and what is missing.
    """
    terms = {name: cast(Term, term) for name, term in module.terms.items()}
    for name, term in terms.items():
        if term.column is not None and term.column not in data.label_columns:
            raise ValueError(
                f"term {name!r} learns the label column {term.column!r}, which is not read: add it "
                "to data.label_columns"
            )
    reading = [name for name, term in terms.items() if term.reads_labels and term.weight > 0]
    if not reading or data.sequential:
        return
    labels = data.some_labels("train", _LABELS_SEEN)
    if labels and max(labels) < 0:
        raise ValueError(
            f"term {reading[0]!r} learns from labels, and none of the {len(labels)} training "
            "samples that were looked at has one: give labelled shards (`multikd shards inspect` "
            "counts labels), or leave the term out"
        )
    classes = module.student.num_classes
    if labels and max(labels) >= classes > 0:
        raise ValueError(
            f"the training shards have the label {max(labels)} and the student {classes} classes: "
            f"set model.student.num_classes to {max(labels) + 1} or more"
        )


def check_shifts(module: DistillationModule, data: ShardDataModule) -> None:
    """Refuse a teacher's view that is none, and shifts that are no whole patches where they meet.

    Raises:
        ValueError: names the setting.
    """
    views, chosen = data.train_views, module.teacher_view
    module.student_views(len(views))
    shifting = [n for n in module.teacher_names if getattr(module.losses[n], "uses_shift", False)]
    if chosen is None or not shifting:
        return
    first, every = views[chosen], data.all_views()
    if not all(isinstance(v, ShiftedViews) and v.describe() == first.describe() for v in every):
        raise ValueError(
            f"the loss of teacher {shifting[0]!r} compares shifted views: set data.train_views to "
            "multikd.data.views.ShiftedViews with the same settings for all"
        )
    step = first.patch if isinstance(first, ShiftedViews) else 1
    size = (first.size, first.size)
    for name in shifting:
        grid = module.target_grid(name, size)
        if grid is not None and any(side * step % first.size for side in grid):
            raise ValueError(
                f"views shifted by {step} px are not shifted by whole patches on the "
                f"{grid[0]}×{grid[1]} grid where teacher {name!r} and the student meet: set "
                "data.train_views' patch to a multiple of view size / grid"
            )


def check_monitors(trainer: pl.Trainer, data: ShardDataModule) -> None:
    """Refuse a watched ``val/…`` value that will not be there, or would be read the wrong way.

    Raises:
        ValueError: the callback and what is missing; Lightning would find out after an epoch, or
            stop a run because it gets better.
    """
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not monitor.startswith("val/"):
            continue
        needed = ["val", "bank"] if monitor in _PROBES else ["val"]
        missing = [role for role in needed if not data.has(role)]
        if missing:
            raise ValueError(
                f"{type(callback).__name__} watches {monitor}, which needs "
                f"{' and '.join('data.' + role for role in missing)}: give shards for it, or set "
                "the callback's monitor to null"
            )
        if monitor in _PROBES and isinstance(callback, EarlyStopping | ModelCheckpoint):
            _check_probe(trainer, callback, monitor, callbacks)


def _check_probe(
    trainer: pl.Trainer,
    watcher: EarlyStopping | ModelCheckpoint,
    monitor: str,
    callbacks: Sequence[Callback],
) -> None:
    """Refuse what would read a probe that is absent, upside down, or of an earlier epoch."""
    name, kind = type(watcher).__name__, _PROBES[monitor]
    probes = [c for c in callbacks if isinstance(c, kind)]
    if not probes:
        raise ValueError(
            f"{name} watches {monitor}, which {kind.__name__} logs: add it to trainer.callbacks"
        )
    if watcher.mode != "max":
        raise ValueError(
            f"{name} watches {monitor} with mode {watcher.mode}, but more is better: set its mode "
            "to max"
        )
    # Lightning keeps the last value of a metric, so an epoch without a score would count as one
    # without progress; before the first score there is none, and the run would break off.
    scored = probes[0].every_n_epochs
    validated = getattr(trainer, "check_val_every_n_epoch", None) or 1
    looked = validated
    if isinstance(watcher, ModelCheckpoint):
        looked = math.lcm(validated, getattr(watcher, "_every_n_epochs", 0) or 1)
    if looked % scored:
        remedy = (
            f"its every_n_epochs to {scored}"
            if isinstance(watcher, ModelCheckpoint)
            else f"trainer.check_val_every_n_epoch to {scored}"
        )
        raise ValueError(
            f"{name} reads {monitor} every {looked} epoch{'s' * (looked > 1)} and "
            f"{kind.__name__} scores every {scored}: set {remedy}, or the probe's every_n_epochs "
            f"to {looked}"
        )


def check_checkpoint(
    path: Path,
    checkpoint: dict[str, Any],
    module: pl.LightningModule,
    config: dict[str, Any],
    resuming: bool,
    allow_changes: bool = False,
) -> None:
    """Refuse a checkpoint that this config can't go on from.

    Settings of speed, of evaluation and of the layout (ranks, workers, batch size) may change;
    others change what is trained, and do so with ``allow_changes`` only.

    Raises:
        ValueError: it is not ours, or of another config; names what differs.
    """
    if not isinstance(module, DistillationModule | Resumable):
        return
    kept = read_config(checkpoint, path)
    changed = list(differences(kept, config))
    problem = _another_teacher(checkpoint, module) or _other_tensors(checkpoint, module)
    if problem:
        said = [d for d in changed if d.startswith("model.")]
        raise ValueError(
            f"{path} is of another config: {'; '.join(said[:3]) or problem}; give the config it "
            "was made with, or start a student from its weights with "
            f"--model.student.checkpoint={path}"
        )
    if not changed or not resuming:
        return
    grave = [c for c in changed if not _HARMLESS.match(c.partition(": ")[0])]
    if grave and not allow_changes:
        raise ValueError(
            f"{len(grave)} settings differ from those of {path} and change what is trained: "
            f"{'; '.join(grave[:8])}{'; …' if len(grave) > 8 else ''}: give the config it was made "
            "with (no --config takes the checkpoint's own), or add --allow_changes to go on with "
            "these"
        )
    log.warning("settings that differ from the checkpoint's: %s", "; ".join(changed))


def check_place(checkpoint: dict[str, Any], data: ShardDataModule) -> None:
    """Refuse other shards, or another order of them, inside an epoch; opens the training shards.

    Raises:
        ValueError: what is left of the epoch can't be known.
    """
    state = LoaderState.from_state_dict(checkpoint.get(type(data).__qualname__, {}))
    if state is not None:
        data.check_resumed(state)


def _fingerprints(module: DistillationModule | Resumable) -> dict[str, str | None]:
    """Of every teacher; None of those that only other ranks load: these look at them."""
    if not isinstance(module, DistillationModule):
        return {name: facts["fingerprint"] for name, facts in module.teacher_facts().items()}
    found: dict[str, str | None] = {}
    for name in module.teacher_names:
        teacher = module.teacher(name)
        waits = isinstance(teacher, DeferredTeacher) and not teacher.loaded
        found[name] = None if waits else teacher.fingerprint()
    return found


def _another_teacher(
    checkpoint: dict[str, Any], module: DistillationModule | Resumable
) -> str | None:
    kept, own = checkpoint.get("teachers"), _fingerprints(module)
    if not isinstance(kept, dict):
        return None
    if sorted(kept) != sorted(own):
        names, here = ", ".join(sorted(kept)), ", ".join(sorted(own))
        return f"its teachers are {names}, and here they are {here}"
    for name, fingerprint in own.items():
        if fingerprint is not None and kept[name].get("fingerprint") != fingerprint:
            return f"its teacher {name!r} has other weights or another input"
    return None


def _other_tensors(
    checkpoint: dict[str, Any], module: DistillationModule | Resumable
) -> str | None:
    kept, own = checkpoint["state_dict"], module.state_dict()
    for key in [*own, *kept]:
        if key not in kept:
            return f"it lacks {key}"
        if key not in own:
            return f"its {key} has no place here"
        if kept[key].shape != own[key].shape:
            return f"its {key} is {tuple(kept[key].shape)} and here it is {tuple(own[key].shape)}"
    return None


def differences(kept: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """``key: kept → now`` of every setting of model and data that is not the same, and of those of
    the trainer that enter into what is trained."""
    for section in ("model", "data", "trainer"):
        old, new = (dict(_leaves(part.get(section), (section,))) for part in (kept, config))
        if section == "trainer":
            old, new = (
                {f"trainer.{k}": s.get(f"trainer.{k}") for k in _TRAINER} for s in (old, new)
            )
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                yield f"{key}: {old.get(key)} → {new.get(key)}"


def _leaves(value: Any, path: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, path if key == "init_args" else (*path, str(key)))
    else:
        yield ".".join(path), value
