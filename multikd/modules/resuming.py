"""A run that goes on inside an epoch: Lightning's counters, the learning rate, the lengths.

Lightning restores its loops differently for each hook that a checkpoint may have been written in,
and by that leaves out a validation that was due, or counts a step twice. Here the counters are
brought to one form, *between two batches*, before Lightning reads them; whether the validation
that is due there has run is noted in the checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from multikd.data.module import ShardDataModule
from multikd.data.resuming import LoaderState
from multikd.distributed import all_reduce_mean
from multikd.functional import hash_unit

VALIDATED_KEY = "validated"
GRADIENTS_KEY = "gradients"
# Of the seeds of dropout and drop path, apart from the streams of teacher dropping.
_RANDOM_STREAM = 1 << 33


def go_on(module: Any) -> LoaderState | None:
    """After a checkpoint was restored: read the seed from its device, once; go on inside an epoch.

    Args:
        module: with ``seed``, ``lr_batch`` and what ``read_place`` left in ``_resumed`` and
            ``_gradients``.

    Returns:
        Where the data stood; None where nothing was restored, or the data are another module's.
    """
    module._run_seed = int(module.seed)
    module.skip_step = False
    state, module._resumed = module._resumed, None
    data = getattr(module.trainer, "datamodule", None)
    if state is None or not isinstance(data, ShardDataModule):
        return None
    if state.inside:
        for loader in module.trainer.fit_loop._combined_loader.flattened:
            if not getattr(loader, "fixed_epoch", False):
                loader.set_epoch(module.current_epoch)
        settle_lengths(module.trainer)
        settle_counters(module.trainer)
    else:
        # Of runs that are limited by steps, Lightning takes every start for one in an epoch.
        module.trainer.fit_loop.epoch_loop.restarting = False
    put_gradients(module, module._gradients)
    module._gradients = {}
    rescale_schedule(module.trainer, state, linear=module.lr_batch is not None)
    return cast(LoaderState, state)


def begin_batch(module: Any, batch_idx: int) -> None:
    """Seed dropout and drop path, and remember what a skipped step puts back."""
    if module.undo is not None and batch_idx % module.trainer.accumulate_grad_batches == 0:
        module.undo.remember(module)
    stream = _RANDOM_STREAM + module.global_rank
    draw = hash_unit(module._run_seed, module.current_epoch, batch_idx, stream)
    torch.manual_seed(int(draw * 2**24))


def note_validation(module: Any) -> None:
    """Note that the validation due after this batch has run."""
    if not module.trainer.sanity_checking:
        module._validated_at = module.trainer.fit_loop.epoch_loop.total_batch_idx


def read_place(module: Any, checkpoint: dict[str, Any]) -> None:
    """Bring Lightning's counters to one form, whatever hook the checkpoint was written in."""
    data = getattr(module._trainer, "datamodule", None)
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if not isinstance(data, ShardDataModule) or loops is None:
        return
    state = LoaderState.from_state_dict(checkpoint.get(type(data).__qualname__, {}))
    module._resumed = state
    if state is not None and state.inside:
        module._gradients = checkpoint.get(GRADIENTS_KEY, {})
        between_batches(loops, data.batches_before(state), bool(checkpoint.get(VALIDATED_KEY)))


def write_place(module: Any, checkpoint: dict[str, Any]) -> None:
    """Note whether validation ran, and gradients that are being accumulated."""
    done = module.trainer.fit_loop.epoch_loop.total_batch_idx
    checkpoint[VALIDATED_KEY] = module._validated_at == done
    if done >= 0 and module.device_mesh is None and module.trainer.fit_loop._should_accumulate():
        checkpoint[GRADIENTS_KEY] = gradients_of(module)


def between_batches(fit_loop: dict[str, Any], batches: int, validated: bool) -> None:
    """Bring the saved counters of an epoch under way to "``batches`` are done, the next is not
    begun", in place.

    Args:
        fit_loop: the state of Lightning's fit loop, in a checkpoint written inside an epoch.
        batches: done in this epoch, in the layout of the run that goes on.
        validated: whether a validation that is due after them has run.
    """
    epochs = fit_loop["epoch_progress"]
    done = epochs["current"]["processed"]
    for tracker in epochs.values():
        finished = tracker["processed"]
        tracker.update(ready=finished + 1, started=finished + 1, completed=finished)
    epochs["current"]["processed"] = done
    progress = fit_loop["epoch_loop.batch_progress"]
    for tracker, count in (
        (progress["total"], progress["total"]["processed"]),
        (progress["current"], batches),
    ):
        tracker.update(ready=count, started=count, processed=count, completed=count)
    # What Lightning takes for a validation that was broken off: it begins it anew if it is due.
    pending = fit_loop["epoch_loop.val_loop.batch_progress"]
    behind = 0 if validated else 1
    pending["total"].update(ready=1, started=1, processed=1 - behind, completed=1 - behind)
    pending["current"].update(ready=0, started=0, processed=0, completed=0)


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Gradients that are being accumulated, by parameter: their mean over ranks.

    Every rank must call it. Ranks have not exchanged them yet; that each goes on from their mean
    leads to the same step, rounding apart.
    """
    return {
        name: all_reduce_mean(parameter.grad)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def put_gradients(module: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Go on accumulating from ``gradients_of`` an interrupted run."""
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device, parameter.dtype)


def settle_lengths(trainer: pl.Trainer) -> None:
    """Tell Lightning the length of the epoch under way, which may differ from that of others.

    Only after a change of layout inside an epoch: then it has a batch more or less.
    """
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    if combined is None or fetcher is None or not math.isfinite(float(loop.max_batches)):
        return
    longest = max(len(loader) for loader in combined.flattened)
    if trainer.limit_train_batches != 1.0 or longest == loop.max_batches:
        return
    limits: list[int | float] = [longest for _ in combined.flattened]
    combined.limits = limits
    if combined._iterator is not None:
        combined._iterator.limits = limits
    loop.max_batches = fetcher.length = longest
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(longest * trainer.val_check_interval))


def settle_counters(trainer: pl.Trainer) -> None:
    """The last counters of a run that goes on inside an epoch; at the start of training."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or loop._should_accumulate():
        return
    # Lightning counts the step that was saved once more if it comes by a validation that is due.
    if not loop._should_check_val_fx(fetcher):
        loop._batches_that_stepped += 1


def rescale_schedule(trainer: pl.Trainer, state: LoaderState, linear: bool) -> None:
    """After a change of the global batch: the schedule by samples, the rate by the linear rule.

    Args:
        trainer: with optimiser and schedule restored.
        state: of the run that was interrupted.
        linear: the learning rate is scaled with the batch (``lr_batch`` is given).
    """
    ratio = step_samples(trainer) / state.step_samples
    if ratio == 1.0:
        return
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, LambdaLR):
            continue
        step = scheduler.last_epoch
        if trainer.max_steps == -1:  # a run of so many steps stays one of so many steps
            step = round(step / ratio)
        scheduler.last_epoch = step
        _scale(scheduler.optimizer, scheduler, ratio if linear else 1.0, step)


def step_samples(trainer: pl.Trainer) -> int:
    """Samples of an optimiser step of this run."""
    batch = int(getattr(trainer.datamodule, "batch_size", 1))  # type: ignore[attr-defined]
    return batch * trainer.world_size * trainer.accumulate_grad_batches


def _scale(optimizer: Optimizer, scheduler: LambdaLR, ratio: float, step: int) -> None:
    scheduler.base_lrs = [rate * ratio for rate in scheduler.base_lrs]
    rows = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in rows:
        group["initial_lr"] = base
        group["lr"] = base * factor(step)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
