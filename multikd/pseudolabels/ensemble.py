"""Class probabilities of several teachers together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from multikd.functional import full_precision
from multikd.types import TokenFeatures

Run = Callable[[str, Tensor], TokenFeatures]


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ_t w_t·softmax(z_t) / Σ_t w_t``, the mean of probabilities (Hinton et al., 1503.02531).

    Args:
        logits: T times ``(B, K)``, calibrated.
        weights: of the teachers, above 0.

    Returns:
        ``(B, K)`` float32; rows sum to 1.

    Raises:
        ValueError: logits of different shapes, or none.
    """
    shapes = [tuple(z.shape) for z in logits]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"an ensemble needs logits (B, K) of one shape, received {shapes}")
    share = [w / sum(weights) for w in weights]
    parts = [s * full_precision(z).softmax(dim=1) for s, z in zip(share, logits, strict=True)]
    return torch.stack(parts).sum(0)


class Ensemble:
    """Teachers whose probabilities are averaged.

    Args:
        run: (teacher, float images ``(B, 3, H, W)`` in [0, 1]) → its features.
        weights: teacher → weight.

    Raises:
        ValueError: no teacher, or a weight that is not above 0.
    """

    def __init__(self, run: Run, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError("an ensemble needs one teacher at least, received none")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of teacher {name!r} must be above 0, is {weight}")
        self.run, self.weights = run, dict(weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities ``(B, K)``, and the share of the weights ``(B,)`` that favours the class.

        Raises:
            ValueError: a teacher without logits, or with those of other classes.
        """
        logits = {name: self.run(name, images).logits for name in self.weights}
        found: dict[str, Tensor] = {}
        for name, values in logits.items():
            if values is None:
                raise ValueError(no_logits(name))
            found[name] = values
        weights = list(self.weights.values())
        mean = mean_probabilities(list(found.values()), weights)
        chosen = mean.argmax(dim=1)
        votes = torch.stack([z.argmax(dim=1) == chosen for z in found.values()]).to(mean.dtype)
        share = torch.tensor(weights, dtype=mean.dtype, device=mean.device) / sum(weights)
        return mean, (votes * share[:, None]).sum(0)


def no_logits(name: str) -> str:
    """What is wrong with a teacher without a classifier."""
    return (
        f"teacher {name!r} has no classifier, and pseudo-labels are class probabilities: fit one "
        "with `multikd teachers fit-head`, or leave it out with --teachers"
    )
