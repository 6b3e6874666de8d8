"""Logistic regression on frozen features: the linear probe.

L-BFGS of scikit-learn on standardised features, so that the penalty means the same for every
encoder whatever the scale of its features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

C_CANDIDATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Choosing C needs the order of a few candidates, not their last digit.
_SELECTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LogisticFit:
    """What logistic regression says of the test images, and how it came to say so.

    Attributes:
        predictions: int64 ``(B,)``, one of the train labels for every test row.
        probabilities: float64 ``(B, K)`` of the ``classes``, rows summing to 1.
        classes: int64 ``(K,)``, the train labels, ascending.
        weight: float64 ``(K, D)`` on features as they are: ``softmax(x @ weightᵀ + bias)`` are the
            probabilities.
        bias: float64 ``(K,)``.
        c: inverse strength of the penalty that was used.
        iterations: L-BFGS iterations of the final fit.
        converged: False where the final fit stopped at ``max_iterations``.
        validation: ``(c, accuracy on the validation split)`` of every candidate; empty where C
            was given.
    """

    predictions: Tensor
    probabilities: Tensor
    classes: Tensor
    weight: Tensor
    bias: Tensor
    c: float
    iterations: int
    converged: bool
    validation: tuple[tuple[float, float], ...] = ()


def logistic_regression(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    c: float | None = None,
    candidates: Sequence[float] = C_CANDIDATES,
    validation_fraction: float = 0.2,
    held: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
    standardise: bool = True,
) -> LogisticFit:
    """Fit a multinomial logistic regression on ``train`` and predict ``test``.

    Minimises ``C · Σ cross-entropy + ½‖W‖²`` (the bias is free of the penalty) over features
    standardised by the train split's mean and standard deviation; a constant feature becomes 0.

    Args:
        train_x: ``(M, D)`` features; float64 is fitted in float64, everything else in float32.
        train_y: int64 ``(M,)`` labels, at least two classes.
        test_x: ``(B, D)``.
        c: C; by default the best of ``candidates`` on a stratified part of the **train** split
            (the smallest of equally good ones), refitted on the whole of it.
        candidates: values of C to choose from.
        validation_fraction: share of every class held out for the choice.
        held: bool ``(M,)``, the train rows held out for the choice, in place of a drawn part.
        seed: of that split.
        max_iterations: bound on L-BFGS iterations.
        tolerance: largest gradient component of the mean loss at which L-BFGS stops.
        standardise: False takes the features as they are.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, fewer than two classes, or
            a class too small to be split.
    """
    train, labels, test = _arrays(train_x, train_y, test_x)
    validation: tuple[tuple[float, float], ...] = ()
    if c is None:
        if held is None:
            mask = stratified(labels, validation_fraction, seed)
        else:
            mask = _held(held, labels)
        validation = _validate(train, labels, candidates, mask, max_iterations, standardise)
        # The strongest penalty among equals: it generalises no worse and converges soonest.
        c = min(validation, key=lambda pair: (-pair[1], pair[0]))[0]
    model = _model(max_iterations, tolerance)
    scaled_train, scaled_test = _standardise(train, test) if standardise else (train, test)
    _fit(model, c, scaled_train, labels)
    weight, bias = _affine(model, train if standardise else None)
    iterations = int(np.max(model.n_iter_))
    return LogisticFit(
        predictions=torch.from_numpy(model.predict(scaled_test).astype(np.int64)),
        probabilities=torch.from_numpy(_probabilities(model, scaled_test)),
        classes=torch.from_numpy(model.classes_.astype(np.int64)),
        weight=weight,
        bias=bias,
        c=float(c),
        iterations=iterations,
        converged=iterations < max_iterations,
        validation=validation,
    )


def _validate(
    train: Array,
    labels: Array,
    candidates: Sequence[float],
    held: Array,
    max_iterations: int,
    standardise: bool,
) -> tuple[tuple[float, float], ...]:
    """Accuracy of every candidate on the held-out part of the train split."""
    if not candidates or min(candidates) <= 0:
        raise ValueError(f"candidates for C must be above 0, received {tuple(candidates)}")
    fitted, tested = train[~held], train[held]
    if standardise:
        fitted, tested = _standardise(fitted, tested)
    model = _model(max_iterations, _SELECTION_TOLERANCE)
    # Each fit starts from the one before, with a little less penalty: a third of the time.
    model.set_params(warm_start=True)
    scores = []
    for c in sorted(candidates):
        _fit(model, c, fitted, labels[~held])
        scores.append((float(c), float(np.mean(model.predict(tested) == labels[held]))))
    return tuple(scores)


def stratified(labels: Array, fraction: float, seed: int) -> Array:
    """Boolean mask that holds out ``fraction`` of every class, at least one image of each.

    Raises:
        ValueError: a fraction out of range, or a class of one image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, received {fraction}")
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(
                f"class {label} has {len(members)} train image, and choosing C by validation "
                "needs two of every class: give c"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[generator.permutation(members)[:count]] = True
    return held


def _held(held: Tensor, labels: Array) -> Array:
    mask: Array = held.cpu().numpy().astype(bool)
    if mask.shape != labels.shape or mask.all() or len(np.unique(labels[~mask])) < 2:
        raise ValueError(
            f"held must mark some of the {len(labels)} train rows and leave two classes, received "
            f"{int(mask.sum())} of {len(mask)}"
        )
    return mask


def _probabilities(model: Any, rows: Array) -> Array:
    """Float64 softmax of the decision values (scikit-learn's own stays in float32)."""
    scores = model.decision_function(rows).astype(np.float64)
    if scores.ndim == 1:  # two classes: one column, of the second against the first
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: Array = scores / scores.sum(axis=1, keepdims=True)
    return shares


def _affine(model: Any, train: Array | None) -> tuple[Tensor, Tensor]:
    """Weight and bias on features as they are, whatever the fit standardised."""
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(weight) == 1:  # two classes: one row, of the second against the first
        weight = np.concatenate([np.zeros_like(weight), weight])
        bias = np.concatenate([np.zeros_like(bias), bias])
    if train is not None:
        mean, std, constant = _scaling(train)
        weight = np.where(constant, 0.0, weight / std)
        bias = bias - weight @ mean
    return torch.from_numpy(weight), torch.from_numpy(bias)


def _scaling(train: Array) -> tuple[Array, Array, Array]:
    """Mean, deviation (1 where constant), and which features are constant."""
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    # A constant feature's deviation is rounding noise, and would be blown up to unit size.
    noise = 10 * np.finfo(train.dtype).eps * np.abs(mean)
    constant = std <= noise
    return mean, np.where(constant, 1.0, std), constant


def _standardise(train: Array, test: Array) -> tuple[Array, Array]:
    mean, std, constant = _scaling(train)

    def scale(rows: Array) -> Array:
        scaled = (rows.astype(np.float64) - mean) / std
        scaled[:, constant] = 0.0
        result: Array = scaled.astype(train.dtype)
        return result

    return scale(train), scale(test)


def _model(max_iterations: int, tolerance: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # late: it takes a second to import

    return LogisticRegression(solver="lbfgs", max_iter=max_iterations, tol=tolerance)


def _fit(model: Any, c: float, rows: Array, labels: Array) -> None:
    if c <= 0:
        raise ValueError(f"C must be above 0, received {c}")
    model.set_params(C=c)
    with warnings.catch_warnings():
        # What it would warn of, stopping at max_iter, is reported as `converged`.
        warnings.simplefilter("ignore")
        model.fit(rows, labels)


def _arrays(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> tuple[Array, Array, Array]:
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            "train_x and test_x must be (M, D) and (B, D) of one width, received "
            f"{tuple(train_x.shape)} and {tuple(test_x.shape)}"
        )
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(
            f"train_y must be ({train_x.shape[0]},), one label for every row, "
            f"received {tuple(train_y.shape)}"
        )
    dtype = torch.float64 if train_x.dtype == torch.float64 else torch.float32
    train, test = (rows.detach().to("cpu", dtype).numpy() for rows in (train_x, test_x))
    for name, rows in (("train_x", train), ("test_x", test)):
        if not np.isfinite(rows).all():
            raise ValueError(f"{name} must be finite, received NaN or infinity")
    labels = train_y.detach().cpu().numpy()
    if len(np.unique(labels)) < 2:
        raise ValueError(
            "logistic regression needs at least two classes among the train labels, "
            f"received {len(np.unique(labels))}"
        )
    return train, labels, test
