"""Accuracy of a linear classifier on the student's features during training."""

from __future__ import annotations

from multikd.callbacks.feature_probe import FeatureProbe, Labelled
from multikd.evaluation.linear import logistic_regression


class LinearProbe(FeatureProbe):
    """Fit a logistic regression on ``data.bank``, score it on ``data.val``, log ``val/linear``.

    The fit is that of ``multikd.evaluation``: L-BFGS on standardised summaries, on the CPU of the
    first process. It takes seconds for some thousand images and minutes for a million, so give a
    bank that is no larger than the probe needs.

    Args:
        every_n_epochs: in `fit`, score the validations of every n-th epoch only. What watches
            ``val/linear`` must look as seldom: ``trainer.check_val_every_n_epoch`` for early
            stopping, ``every_n_epochs`` of a ModelCheckpoint.
        c: inverse strength of the penalty; null chooses it on a part of the bank, which takes about
            five times as long and needs two images of every class.
        max_iterations: bound on L-BFGS iterations.
    """

    metric = "val/linear"

    def __init__(
        self, every_n_epochs: int = 1, c: float | None = None, max_iterations: int = 1000
    ) -> None:
        super().__init__(every_n_epochs)
        if c is not None and not c > 0:
            raise ValueError(f"c must be above 0, or null to choose it, received {c}")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be 1 or more, received {max_iterations}")
        self.c = c
        self.max_iterations = max_iterations

    def accuracy(self, found: Labelled) -> float:
        """Share of the queries that the fitted classifier answers rightly."""
        fit = logistic_regression(
            found.bank,
            found.bank_labels,
            found.queries,
            c=self.c,
            max_iterations=self.max_iterations,
        )
        return float((fit.predictions == found.query_labels).double().mean())
