"""Optimisers of modules: groups, a rate scaled with the batch, warm-up; and one beside Lightning's.

A second optimiser is kept out of Lightning's sight on purpose. With two, Lightning wants manual
optimisation, which counts each of their steps as one of the run's, and gives up accumulation,
clipping and the places at which a run goes on.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from multikd.distributed import all_reduce_mean
from multikd.modules.distillation import default_optimizer
from multikd.optim import (
    OptimizerFactory,
    WarmupCosine,
    fuse,
    parameter_groups,
    scale_learning_rate,
)

log = logging.getLogger(__name__)

# Where a checkpoint keeps the state of a module's second optimiser.
SECOND_KEY = "second_optimizer"


def scheduled_optimizer(
    module: pl.LightningModule,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    factory: OptimizerFactory | None,
    lr_batch: int | None,
    schedule: WarmupCosine,
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns for these parameters.

    Raises:
        ValueError: nothing to train, or a run of unknown length.
    """
    trainer = module.trainer
    optimizer = scaled_optimizer(module, named_parameters, factory, lr_batch)
    if getattr(trainer, "scaler", None) is None:
        fuse(optimizer)
    total = trainer.estimated_stepping_batches
    if not math.isfinite(float(total)):
        raise ValueError(
            "the learning rate follows the length of the run, which is unbounded here: "
            "set trainer.max_epochs or trainer.max_steps"
        )
    if not math.isfinite(float(trainer.num_training_batches)):
        trainer.fit_loop.setup_data()  # with max_steps alone nobody has asked yet
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    scheduler = schedule.build(optimizer, int(total), per_epoch)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
    }


def scaled_optimizer(
    module: pl.LightningModule,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    factory: OptimizerFactory | None,
    lr_batch: int | None,
) -> Optimizer:
    """An optimiser over what needs gradients, its rate scaled with the global batch."""
    optimizer = (factory or default_optimizer)(parameter_groups(named_parameters))
    trainer = module.trainer
    batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if batch is None:
        if lr_batch is not None:
            log.warning("the data module has no batch_size, so the learning rate is used as it is")
        return optimizer
    world = int(batch) * trainer.world_size * trainer.accumulate_grad_batches
    scale_learning_rate(optimizer, world, lr_batch)
    return optimizer


class SecondOptimizer:
    """An optimiser beside Lightning's: stepped by hand, its rate on the same schedule.

    Args:
        optimizer: at its full rate.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What it updates, in order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], factor: float
    ) -> None:
        """One step with a gradient for each parameter, at ``factor`` of the full rate."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def schedule_factor(optimizer: Optimizer) -> float:
    """Where the schedule of Lightning's optimiser stands: its present rate over its full one."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / max(float(group.get("initial_lr", group["lr"])), 1e-30)


def virtual_step(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Where one step of ``optimizer`` would take ``parameters``; nothing is changed.

    Args:
        optimizer: any of torch's, which holds the parameters. Its state and present rate count.
        parameters: those that are moved; others that it holds stay out of the step.
        gradients: one each.

    Returns:
        The parameters after the step, leaves that need gradients.
    """
    moved = {
        id(p): nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in parameters
    }
    for parameter, gradient in zip(parameters, gradients, strict=True):
        moved[id(parameter)].grad = gradient
    shadow = copy.copy(optimizer)
    # A scheduler wraps ``step`` of the instance, which is the other optimiser's.
    shadow.__dict__.pop("step", None)
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    shadow.param_groups = [
        {**group, "params": [moved[id(p)] for p in group["params"] if id(p) in moved]}
        for group in optimizer.param_groups
    ]
    shadow.state = defaultdict(dict)
    for parameter in parameters:
        kept: dict[str, Any] = optimizer.state.get(parameter, {})
        shadow.state[moved[id(parameter)]] = {
            k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in kept.items()
        }
        if not kept:
            del shadow.state[moved[id(parameter)]]
    shadow.step()
    return [moved[id(p)].detach().requires_grad_(True) for p in parameters]


def reduced(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The mean over ranks of gradients that DDP did not see, in one collective."""
    flat = torch.cat([gradient.detach().reshape(-1) for gradient in gradients])
    sizes = [gradient.numel() for gradient in gradients]
    parts = torch.split(all_reduce_mean(flat), sizes)
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
