"""Answers that cost least, by Bayes' decision rule, and what answers did cost.

Shapes: M images, K classes, J answers (K, or K + 1 with abstaining).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bayes_decisions(probabilities: Tensor, costs: Tensor) -> Tensor:
    """The answer of least expected cost, ``argmin_j Σ_k p_k · costs[k, j]``; int64 ``(M,)``.

    Args:
        probabilities: ``(M, K)``.
        costs: ``(K, J)``, cost of answering j where the truth is k, at least 0. J is K, or K + 1
            where the last column is the cost of abstaining (its decision is K).

    Raises:
        ValueError: shapes that do not fit, or costs that are negative or not finite.
    """
    costs = check_costs(costs, probabilities.shape[1] if probabilities.ndim == 2 else 0)
    return (probabilities.detach().cpu().to(torch.float64) @ costs).argmin(dim=1)


def decision_costs(decisions: Tensor, labels: Tensor, costs: Tensor) -> Tensor:
    """What each decision cost, float64 ``(M,)``: ``costs[label, decision]``.

    Raises:
        ValueError: labels or decisions outside the matrix.
    """
    costs = check_costs(costs, costs.shape[0] if costs.ndim == 2 else 0)
    decisions, labels = decisions.cpu(), labels.cpu()
    for name, values, size in (
        ("labels", labels, costs.shape[0]),
        ("decisions", decisions, costs.shape[1]),
    ):
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= size):
            raise ValueError(
                f"{name} must be from 0 to {size - 1} for a {tuple(costs.shape)} matrix of costs, "
                f"received {int(values.min())} to {int(values.max())}"
            )
    return costs[labels, decisions]


def check_costs(costs: Tensor, classes: int) -> Tensor:
    """``costs`` in float64 on the CPU.

    Raises:
        ValueError: not ``(K, K)`` or ``(K, K + 1)``, negative or not finite.
    """
    if costs.ndim != 2 or costs.shape[0] != classes or costs.shape[1] not in (classes, classes + 1):
        raise ValueError(
            f"costs must be a ({classes}, {classes}) matrix, a row for each true class (one more "
            f"column prices abstaining), received {tuple(costs.shape)}"
        )
    costs = costs.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(costs).all()) or bool((costs < 0).any()):
        raise ValueError("costs must be finite and at least 0: count gains as lower costs")
    return costs
