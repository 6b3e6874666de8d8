"""How sure a classifier should be: one temperature for its logits, found on held-out labels.

Guo et al. 2017 (arXiv 1706.04599, section 4.2); of two classes Platt's scaling (1999), which is a
temperature and a bias. Shapes: M images, K classes. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.evaluation.calibration import expected_calibration_error

LEAST_IMAGES = 100
"""Labelled images that a calibration needs."""
# Of 1/T: logits that are always right would be sharpened without end.
_LEAST, _MOST = 1e-3, 1e3


@dataclass(frozen=True)
class Calibrated:
    """``softmax(z / temperature + bias)``, and what it changed on the images it was found on.

    Attributes:
        temperature: T, above 0.
        bias: K numbers with two classes, else None.
        nll_before: mean negative log likelihood with T = 1, in nats.
        nll: with the calibration; never more.
        ece_before: expected calibration error (15 bins) with T = 1.
        ece: with the calibration.
        accuracy: with the calibration (a temperature leaves it as it is).
    """

    temperature: float
    bias: list[float] | None
    nll_before: float
    nll: float
    ece_before: float
    ece: float
    accuracy: float


def calibrate(logits: Tensor, labels: Tensor) -> Calibrated:
    """Minimise the NLL of held-out labels.

    Where no calibration lowers it, T is 1.

    Args:
        logits: ``(M, K)``.
        labels: int64 ``(M,)`` in [0, K).

    Raises:
        ValueError: too few images, shapes that do not fit, labels out of range, or logits that are
            not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            "calibration needs logits (M, K) and labels (M,), received "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) < LEAST_IMAGES:
        raise ValueError(
            f"calibration needs {LEAST_IMAGES} labelled images or more, received {len(labels)}: "
            "give a larger held-out set"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[1] - 1}, the teacher's classes, received "
            f"{int(labels.min())} to {int(labels.max())}: calibrate on data of its label space"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits must be finite, received NaN or infinity")
    z, y = logits.detach().cpu().double(), labels.cpu()
    before = nll(z, y)
    chosen: tuple[float, list[float] | None] = (1.0, None)
    best = before
    tried: list[tuple[float, list[float] | None]] = [(1.0 / inverse_temperature(z, y), None)]
    if z.shape[1] == 2:
        slope, offset = platt(z[:, 1] - z[:, 0], y)
        if slope > 0:  # else it would turn the answers round
            tried.append((1.0 / slope, [0.0, offset]))
    for temperature, bias in tried:
        after = nll(scaled(z, temperature, bias), y)
        if after < best:
            best, chosen = after, (temperature, bias)
    p, q = (torch.softmax(x, dim=1) for x in (z, scaled(z, *chosen)))
    return Calibrated(
        *chosen,
        nll_before=before,
        nll=best,
        ece_before=expected_calibration_error(p, y),
        ece=expected_calibration_error(q, y),
        accuracy=float((q.argmax(dim=1) == y).double().mean()),
    )


def scaled(logits: Tensor, temperature: float, bias: list[float] | None = None) -> Tensor:
    """``z / T + bias``."""
    z = logits / temperature
    return z if bias is None else z + z.new_tensor(bias)


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood in nats."""
    return float(torch.nn.functional.cross_entropy(logits, labels))


def inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """β = 1/T at which the NLL of ``softmax(β z)`` is least, within [0.001, 1000].

    The NLL is convex in β, and its derivative ``mean(E_p[z] − z_y)`` is bisected on a logarithmic
    scale.
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)

    def slope(beta: float) -> float:
        p = torch.softmax(beta * logits, dim=1)
        return float(((p * logits).sum(1) - own).mean())

    low, high = _LEAST, _MOST
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float((low * high) ** 0.5)


def platt(difference: Tensor, labels: Tensor) -> tuple[float, float]:
    """(a, b) of ``P(1) = σ(a·d + b)``, by Newton's method on Platt's smoothed targets.

    Args:
        difference: ``(M,)``, logit of class 1 less that of class 0.
        labels: ``(M,)`` of 0 and 1.
    """
    ones = labels.double().sum()
    zeros = len(labels) - ones
    target = torch.where(labels == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    x = torch.stack([difference, torch.ones_like(difference)], dim=1)
    found = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ridge = 1e-10 * torch.eye(2, dtype=torch.float64)

    def loss(parameters: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ parameters, target)

    for _ in range(100):
        p = torch.sigmoid(x @ found)
        gradient = x.T @ (p - target) / len(x)
        hessian = (x * (p * (1 - p)).unsqueeze(1)).T @ x / len(x) + ridge
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8 and not bool(loss(found - size * step) <= loss(found)):
            size /= 2
        found = found - size * step
        if float(step.abs().max()) < 1e-12 or size <= 1e-8:
            break
    return float(found[0]), float(found[1])
