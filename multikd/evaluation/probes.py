"""Fit a linear probe and say what it answers, whichever solver suits the size.

Shapes: M train rows, B test rows, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from multikd.evaluation.linear import C_CANDIDATES, logistic_regression, stratified
from multikd.evaluation.metrics import mean_average_precision
from multikd.evaluation.sgd_probe import LEARNING_RATES, SgdSettings, train_layers

Solver = Literal["auto", "lbfgs", "sgd"]
SOLVERS: tuple[Solver, ...] = ("auto", "lbfgs", "sgd")
# M·D·K up to which L-BFGS is chosen: 60,000 × 1280 × 10 is below, ImageNet a hundred times above.
_SMALL = 10**10


@dataclass(frozen=True)
class ProbeSettings:
    """How a linear probe is fitted; what is chosen is chosen on images held out of the train split.

    Attributes:
        solver: ``lbfgs`` (C chosen), ``sgd`` (learning rate chosen), ``auto`` by size.
        c: fixed C, in place of the search.
        candidates: values of C.
        learning_rates: of SGD, for a batch of 256.
        epochs: of SGD.
        batch_size: of SGD.
        validation_fraction: held out where the data set has no ``val`` split.
        max_iterations: of L-BFGS.
        tolerance: of L-BFGS.
        seed: of the held-out part and of the order of rows.
    """

    solver: Solver = "auto"
    c: float | None = None
    candidates: Sequence[float] = C_CANDIDATES
    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: int = 10
    batch_size: int = 1024
    validation_fraction: float = 0.1
    max_iterations: int = 1000
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, received {self.solver}")
        if self.c is not None and not self.c > 0:
            raise ValueError(f"C must be above 0, received {self.c}")
        if not self.candidates or not min(self.candidates) > 0:
            raise ValueError(f"candidates for C must be above 0, received {self.candidates}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, received {self.validation_fraction}"
            )
        if self.max_iterations < 1 or not self.tolerance > 0:
            raise ValueError(
                "max_iterations must be at least 1 and tolerance above 0, received "
                f"{self.max_iterations} and {self.tolerance}"
            )
        self.sgd(self.learning_rates)

    def sgd(self, learning_rates: Sequence[float]) -> SgdSettings:
        """Settings of SGD with these rates."""
        return SgdSettings(tuple(learning_rates), self.epochs, self.batch_size, seed=self.seed)

    def chosen(self, rows: int, width: int, classes: int) -> Literal["lbfgs", "sgd"]:
        """The solver for a set of this size."""
        if self.solver != "auto":
            return self.solver
        return "lbfgs" if rows * width * classes <= _SMALL else "sgd"


@dataclass(frozen=True)
class ProbeFit:
    """Answers of a fitted probe.

    Attributes:
        probabilities: float64 ``(B, K)``; rows sum to 1, or each in 0–1 for several labels.
        answers: int64 ``(B,)``, the likeliest class; of several labels too.
        facts: what was chosen, and how: solver, C or learning rate, converged.
        validation: (C or learning rate, score on the held-out images) of every candidate.
    """

    probabilities: Tensor
    answers: Tensor
    facts: dict[str, float] = field(default_factory=dict)
    validation: tuple[tuple[float, float], ...] = ()


def fit_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    classes: int,
    settings: ProbeSettings,
    held: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> ProbeFit:
    """Fit on ``train``, choosing C or the learning rate on the rows ``held``; answer ``test``.

    The candidates are fitted without the held rows, the chosen one again on all of them.

    Args:
        train_x: ``(M, D)``.
        train_y: int64 ``(M,)`` in [0, K), or ``(M, K)`` of 0 and 1.
        test_x: ``(B, D)``.
        classes: K.
        settings: see there.
        held: bool ``(M,)``; None draws ``validation_fraction`` of every class.
        device: of SGD.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a class too small.
    """
    solver = settings.chosen(len(train_x), train_x.shape[1], classes)
    if solver == "sgd":
        return _by_sgd(train_x, train_y, test_x, classes, settings, held, device)
    if train_y.ndim == 2:
        return _one_against_rest(train_x, train_y, test_x, settings, held)
    fit = logistic_regression(
        train_x,
        train_y,
        test_x,
        c=settings.c,
        candidates=settings.candidates,
        validation_fraction=settings.validation_fraction,
        held=held,
        seed=settings.seed,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    )
    probabilities = torch.zeros(len(test_x), classes, dtype=torch.float64)
    probabilities[:, fit.classes] = fit.probabilities
    facts = {"C": fit.c, "iterations": float(fit.iterations), "converged": float(fit.converged)}
    return ProbeFit(probabilities, fit.predictions, facts, fit.validation)


def _by_sgd(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    classes: int,
    settings: ProbeSettings,
    held: Tensor | None,
    device: torch.device | str,
) -> ProbeFit:
    rates = tuple(settings.learning_rates)
    validation: tuple[tuple[float, float], ...] = ()
    if len(rates) > 1:
        mask = _held_out(train_y, settings) if held is None else held.cpu()
        layers = train_layers(
            train_x[~mask], train_y[~mask], classes, settings.sgd(rates), device=device
        )
        logits = torch.cat(list(layers.logits(train_x[mask])))
        scores = [_score(logits[:, i], train_y[mask]) for i in range(len(rates))]
        validation = tuple(zip(rates, scores, strict=True))
    # The smallest of equally good rates.
    rate = min(validation, key=lambda pair: (-pair[1], pair[0]))[0] if validation else rates[0]
    layers = train_layers(train_x, train_y, classes, settings.sgd([rate]), device=device)
    logits = torch.cat(list(layers.logits(test_x)))[:, 0].to(torch.float64)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"the linear probe diverged at learning rate {rate}: give smaller ones")
    probabilities = logits.sigmoid() if train_y.ndim == 2 else logits.softmax(dim=1)
    return ProbeFit(probabilities, logits.argmax(dim=1), {"learning_rate": rate}, validation)


def _one_against_rest(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    settings: ProbeSettings,
    held: Tensor | None,
) -> ProbeFit:
    """A binary logistic regression for every class, all with one C."""
    validation: tuple[tuple[float, float], ...] = ()
    c = settings.c
    if c is None:
        mask = _held_out(train_y, settings) if held is None else held.cpu()
        scores = []
        for candidate in sorted(settings.candidates):
            found = _columns(
                train_x[~mask], train_y[~mask], train_x[mask], candidate, settings, 1e-3
            )
            scores.append((float(candidate), mean_average_precision(found, train_y[mask])))
        validation = tuple(scores)
        c = min(validation, key=lambda pair: (-pair[1], pair[0]))[0]
    found = _columns(train_x, train_y, test_x, c, settings, settings.tolerance)
    return ProbeFit(found, found.argmax(dim=1), {"C": c}, validation)


def _columns(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    c: float,
    settings: ProbeSettings,
    tolerance: float,
) -> Tensor:
    columns = []
    for column in train_y.T:
        fit = logistic_regression(
            train_x,
            column.to(torch.int64),
            test_x,
            c=c,
            max_iterations=settings.max_iterations,
            tolerance=tolerance,
        )
        columns.append(fit.probabilities[:, 1])
    return torch.stack(columns, dim=1)


def _held_out(labels: Tensor, settings: ProbeSettings) -> Tensor:
    """A part of every class; of several labels, every n-th image of a shuffled order.

    The shuffle is drawn again until every class has both kinds on both sides, or a hundred times.
    """
    fraction, seed = settings.validation_fraction, settings.seed
    if labels.ndim == 1:
        return torch.from_numpy(stratified(labels.cpu().numpy(), fraction, seed))
    count = max(1, round(fraction * len(labels)))
    for attempt in range(100):
        generator = torch.Generator().manual_seed(seed + attempt)
        mask = torch.zeros(len(labels), dtype=torch.bool)
        mask[torch.randperm(len(labels), generator=generator)[:count]] = True
        kept, held = labels[~mask], labels[mask]
        if bool((kept.any(dim=0) & ~kept.all(dim=0)).all()) and bool(held.any()):
            return mask
    raise ValueError(
        "no part of the train split can be held out so that every class keeps images with and "
        "without it: give a val split, or leave the rare classes out"
    )


def _score(logits: Tensor, labels: Tensor) -> float:
    """Accuracy or mean average precision; −1 for what diverged."""
    if not bool(torch.isfinite(logits).all()):
        return -1.0
    if labels.ndim == 2:
        return mean_average_precision(logits, labels)
    return float((logits.argmax(dim=1) == labels.cpu()).double().mean())
