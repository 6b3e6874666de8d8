"""Weights of the teachers, from their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from multikd.distributed import all_reduce_mean
from multikd.errors import unknown_name
from multikd.normalizers import KeepsDtype


class LossBalancer(KeepsDtype):
    """λ of each teacher, and a regulariser where λ is learned.

    ``bind`` comes before anything else (also before the optimiser and ``load_state_dict``), since
    it makes the state, which stays float32. Relative weights have mean 1 over the teachers of a
    step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def bind(self, names: Sequence[str]) -> None:
        """Tell the balancer its teachers; makes the state, one row each in this order."""
        if not names:
            raise ValueError("a balancer needs at least one teacher, received none")
        self.names = tuple(names)

    def forward(self, losses: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Weights for one step, whose losses also move the state in training mode.

        Args:
            losses: ``(T,)`` mean loss of each teacher that ran, of this rank; reduced and detached
                inside. All ranks must call this for the same teachers.
            names: the T teachers.

        Returns:
            lambdas ``(T,)`` float32 and a regulariser ``()`` float32 to add to the total.

        Raises:
            ValueError: for a teacher that was not bound, or a wrong number of losses.
        """
        raise NotImplementedError

    def end_epoch(self) -> None:
        """What a balancer does between epochs; called by the training module."""

    def _rows(self, losses: Tensor, names: Sequence[str]) -> list[int]:
        for name in names:
            if name not in self.names:
                hint = "" if self.names else "(call bind first)"
                raise unknown_name("teacher", name, self.names, hint)
        if losses.shape != (len(names),):
            raise ValueError(
                f"a balancer needs one loss for each of {len(names)} teachers, received "
                f"{tuple(losses.shape)}"
            )
        return [self.names.index(name) for name in names]


class FixedWeights(LossBalancer):
    """The same weights all the time.

    Args:
        weights: teacher → weight, only their ratios matter; 1 for those not named.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights: Mapping[str, float] = dict(weights or {})
        for name, weight in self.weights.items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name!r} must be 0 or more, received {weight}")

    def bind(self, names: Sequence[str]) -> None:
        """See ``LossBalancer``."""
        super().bind(names)
        for name in self.weights:
            if name not in self.names:
                raise unknown_name("teacher in weights", name, self.names)
        if sum(self.weights.get(name, 1.0) for name in names) <= 0:
            raise ValueError("all teachers have weight 0: give at least one a weight above 0")

    def forward(self, losses: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``LossBalancer``."""
        self._rows(losses, names)
        weights = [self.weights.get(name, 1.0) for name in names]
        scale = len(weights) / (sum(weights) or 1.0)
        # Fills, not a copy from the host: that would wait for the device.
        zero = losses.new_zeros((), dtype=torch.float32)
        return torch.stack([zero + weight * scale for weight in weights]), zero


class UncertaintyWeights(LossBalancer):
    """Homoscedastic uncertainty (Kendall, Gal & Cipolla 2018): learned, not relative, weights.

    ``mean_t [L_t/(2σ_t²) + log σ_t]`` with ``log σ²`` learned from 0. At its optimum σ_t² = L_t.
    The logarithm is what keeps the weights from falling to 0. The mean, not the published sum, so
    that the learning rate does not depend on the number of teachers.
    """

    log_variance: nn.Parameter

    def bind(self, names: Sequence[str]) -> None:
        """See ``LossBalancer``."""
        super().bind(names)
        self.log_variance = nn.Parameter(torch.zeros(len(names), dtype=torch.float32))

    def forward(self, losses: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``LossBalancer``; both results carry the gradient of log σ²."""
        rows = self._rows(losses, names)
        chosen = _take(self.log_variance, rows)
        # The loss of a teacher without an image on any rank is a NaN on all of them: it has nothing
        # to be balanced by.
        chosen = torch.where(torch.isnan(losses.detach()), chosen.detach(), chosen)
        return 0.5 * torch.exp(-chosen), 0.5 * chosen.mean()


class DynamicWeightAverage(LossBalancer):
    """Dynamic weight average (Liu, Johns & Davison 2019): more weight where a loss falls slowly.

    ``λ_t = T · softmax_t(r_t/temperature)`` with r the ratio of the mean losses of the last two
    epochs; 1 until there are two.

    Args:
        temperature: the higher, the more even.
    """

    total: Tensor
    count: Tensor
    last: Tensor
    before: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, received {temperature}")
        self.temperature = temperature

    def bind(self, names: Sequence[str]) -> None:
        """See ``LossBalancer``."""
        super().bind(names)
        for name in ("total", "count", "last", "before"):
            self.register_buffer(name, torch.zeros(len(names), dtype=torch.float32))

    def forward(self, losses: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``LossBalancer``."""
        rows = self._rows(losses, names)
        if self.training:
            means = all_reduce_mean(losses.detach().float())
            finite = torch.isfinite(means)
            _put(self.total, rows, _take(self.total, rows) + torch.where(finite, means, 0.0))
            _put(self.count, rows, _take(self.count, rows) + finite.float())
        last, before = _take(self.last, rows), _take(self.before, rows)
        known = (last > 0) & (before > 0)
        ratio = torch.where(known, last / torch.where(known, before, 1.0), 1.0)
        lambdas = len(rows) * torch.softmax(ratio / self.temperature, dim=0)
        return lambdas, lambdas.new_zeros(())

    @torch.no_grad()
    def end_epoch(self) -> None:
        """The epoch's mean losses become the last ones; teachers that never ran keep theirs."""
        ran = self.count > 0
        mean = self.total / self.count.clamp(min=1.0)
        self.before.copy_(torch.where(ran, self.last, self.before))
        self.last.copy_(torch.where(ran, mean, self.last))
        self.total.zero_()
        self.count.zero_()


class InverseLossScale(LossBalancer):
    """``λ_t ∝ 1/running mean of L_t``: every teacher contributes the same loss.

    Args:
        momentum: of the running mean, which starts at the first loss.
    """

    running: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), received {momentum}")
        self.momentum = momentum

    def bind(self, names: Sequence[str]) -> None:
        """See ``LossBalancer``."""
        super().bind(names)
        self.register_buffer("running", torch.ones(len(names), dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(len(names), dtype=torch.bool))

    def forward(self, losses: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``LossBalancer``."""
        rows = self._rows(losses, names)
        running = _take(self.running, rows)
        if self.training:
            means = all_reduce_mean(losses.detach().float())
            finite, seen = torch.isfinite(means), _take(self.seen, rows)
            moved = torch.where(seen, torch.lerp(means, running, self.momentum), means)
            running = torch.where(finite, moved, running)
            _put(self.running, rows, running)
            _put(self.seen, rows, seen | finite)
        inverse = 1.0 / running.clamp(min=1e-12)
        lambdas = inverse / inverse.mean()
        return lambdas, lambdas.new_zeros(())


def _take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a ``(T,)`` tensor without an index copied from the host."""
    if list(rows) == list(range(values.shape[0])):
        return values
    return torch.stack([values[row] for row in rows])


@torch.no_grad()
def _put(buffer: Tensor, rows: Sequence[int], values: Tensor) -> None:
    for index, row in enumerate(rows):
        buffer[row] = values[index]
