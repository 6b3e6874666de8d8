"""What each teacher's loss asks of the encoder: how much, and whether they pull the same way."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from multikd.modules.distillation import DistillationModule

log = logging.getLogger(__name__)


class GradientShare(pl.Callback):
    """Sample each teacher's gradient on the student's encoder every ``every_n_steps`` steps.

    Logged are ``gradient/share/TEACHER``, ``‖g_t‖ / Σ‖g‖`` of the weighted, dropped loss that this
    teacher contributes, and ``gradient/cosine/A/B`` of two teachers' gradients: below 0 they pull
    against each other. Of several ranks, each takes its own images'. A sampled step costs one more
    backward pass through the encoder for each teacher.

    Args:
        every_n_steps: how often.
        starved: a teacher whose share stays below so much of an equal share is warned of, once.
        dominating: one whose share stays above so much (of 1) as well, among several.
        patience: so many samples in a row.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        starved: float = 0.2,
        dominating: float = 0.8,
        patience: int = 3,
    ) -> None:
        if every_n_steps < 1 or patience < 1:
            raise ValueError(
                "every_n_steps and patience must be 1 or more, received "
                f"{every_n_steps} and {patience}"
            )
        if not 0 <= starved < 1 or not 0 < dominating <= 1:
            raise ValueError(
                "starved must lie in [0, 1) and dominating in (0, 1], received "
                f"{starved} and {dominating}"
            )
        self.every_n_steps = every_n_steps
        self.starved = starved
        self.dominating = dominating
        self.patience = patience
        self._low: dict[str, int] = {}
        self._high: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Have the step keep each teacher's loss with its graph."""
        if isinstance(pl_module, DistillationModule):
            pl_module.keeps_parts = batch_idx % self.every_n_steps == 0

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Differentiate each teacher's part, before the graph is used up."""
        if not isinstance(pl_module, DistillationModule) or not pl_module.kept_parts:
            return
        parts, pl_module.kept_parts = pl_module.kept_parts, {}
        gradients = teacher_gradients(parts, list(pl_module.student.parameters()))
        shares, cosines = shares_and_cosines(gradients)
        values = {f"gradient/share/{name}": share for name, share in shares.items()}
        values |= {f"gradient/cosine/{a}/{b}": cosine for (a, b), cosine in cosines.items()}
        # Past Lightning's own logging: the sampled steps need not be those that it logs.
        numbers = {key: float(value) for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        self._judge({name: float(share) for name, share in shares.items()})

    def _judge(self, shares: Mapping[str, float]) -> None:
        if len(shares) < 2:
            return
        for name, share in shares.items():
            for kind, counts, hit, words in (
                (
                    "starved", self._low, share < self.starved / len(shares),
                    "hardly moves the student: raise its weight (model.balancer), or leave it out",
                ),
                (
                    "dominating", self._high, share > self.dominating,
                    "moves the student nearly alone: lower its weight (model.balancer), or look at "
                    "its normaliser",
                ),
            ):  # fmt: skip
                counts[name] = counts.get(name, 0) + 1 if hit else 0
                if counts[name] >= self.patience and (kind, name) not in self._told:
                    self._told.add((kind, name))
                    log.warning(
                        "teacher %r is %s: %.1f %% of the gradient on the encoder over %d samples "
                        "(an equal share is %.1f %%); it %s",
                        name, kind, 100 * share, self.patience, 100 / len(shares), words,
                    )  # fmt: skip


def teacher_gradients(parts: Mapping[str, Tensor], parameters: list[Tensor]) -> dict[str, Tensor]:
    """Each part's gradient on the parameters, as one vector; the graph stays."""
    trained = [p for p in parameters if p.requires_grad]
    found = {}
    for name, part in parts.items():
        if not part.requires_grad:
            continue
        given = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros(p.numel(), device=p.device) if g is None else g.detach().float().flatten()
            for p, g in zip(trained, given, strict=True)
        ]
        found[name] = torch.cat(flat)
    return found


def shares_and_cosines(
    gradients: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """``‖g_t‖ / Σ‖g‖`` of each, and the cosine of each pair; 0 where a gradient is 0."""
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    if not norms:
        return {}, {}
    total = torch.stack(list(norms.values())).sum().clamp(min=1e-30)
    names = list(gradients)
    cosines = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            scale = (norms[a] * norms[b]).clamp(min=1e-30)
            cosines[a, b] = gradients[a] @ gradients[b] / scale
    return {name: norm / total for name, norm in norms.items()}, cosines
