"""Objectives between a prediction and a teacher's (normalised) features, a loss per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multikd.functional import full_precision, per_image, token_distance, without_autocast
from multikd.types import TOKEN_TYPES, Batch, TokenFeatures, TokenType, Widths


class DistillationLoss(nn.Module):
    """One objective: feature, response or relation.

    Attributes:
        tokens: the token types that it reads; others get no projector.
        raw: those of them that it compares in the teacher's own space: they are not normalised,
            and the student's heads predict them as the teacher gives them.
        uses_shift: ``forward`` also takes ``shift (B, 2)``: how far, in view sides and as (down,
            right), the student's view lies from the teacher's; None where both saw one view.
        means_over_patches: the patches' loss of an image is a mean over its patches, so that some
            of them can stand for all.
    """

    tokens: tuple[TokenType, ...] = TOKEN_TYPES
    raw: tuple[TokenType, ...] = ()
    uses_shift: bool = False
    means_over_patches: bool = False

    def bind(self, widths: Widths) -> None:
        """Learn the teacher's widths, before training; each teacher has a loss of its own then."""

    def forward(
        self, prediction: TokenFeatures, target: TokenFeatures, batch: Batch | None = None
    ) -> Tensor:
        """Loss of each image.

        Args:
            prediction: of the student, in the teacher's widths and on the target's grid.
            target: of the teacher; the caller has normalised and resampled it.
            batch: where labels or positions are needed.

        Returns:
            ``(B,)`` float32 (float64 for float64 features), also under autocast.
        """
        raise NotImplementedError


class NoFeatureLoss(DistillationLoss):
    """None: the teacher gets no projectors, and only terms compare the student with it.

    As ``model.loss`` it leaves the ladder out altogether; dropping and balancing weigh what is not
    there then. As one of ``model.teacher_losses`` it leaves out this teacher's.
    """

    tokens = ()


class TokenLoss(DistillationLoss):
    """Base: a weighted mean of the distances of summary and patches.

    Where a teacher lacks a token type the other one takes all the weight, so that teachers stay
    comparable.

    Args:
        summary: weight of the summary.
        patches: weight of the patches.

    Raises:
        ValueError: for negative weights, or where both are 0.
    """

    means_over_patches = True

    def __init__(self, summary: float, patches: float) -> None:
        super().__init__()
        check_weights("summary and patches", summary, patches)
        self.weights: dict[TokenType, float] = {"summary": summary, "patches": patches}
        self.tokens = tuple(token for token in TOKEN_TYPES if self.weights[token] > 0)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of vectors of any dtype, ``(…, D)`` → ``(…)``, computed in float32 or float64.

        Autocast is off. The two may differ in dtype.
        """
        raise NotImplementedError

    def forward(
        self, prediction: TokenFeatures, target: TokenFeatures, batch: Batch | None = None
    ) -> Tensor:
        """See ``DistillationLoss``.

        Raises:
            ValueError: if shapes differ, or no weighted token type is in both.
        """
        pairs = self._pairs(prediction, target)
        total = sum(weight for weight, _, _ in pairs)
        with without_autocast(pairs[0][1].device):
            losses = [(weight / total) * per_image(self.distance(s, y)) for weight, s, y in pairs]
            return torch.stack(losses).sum(0)

    def _pairs(
        self, prediction: TokenFeatures, target: TokenFeatures
    ) -> list[tuple[float, Tensor, Tensor]]:
        pairs = []
        for token in self.tokens:
            pair = pair_of(prediction, target, token)
            if pair is not None:
                pairs.append((self.weights[token], *pair))
        if not pairs:
            raise ValueError(
                f"prediction {prediction.widths} and target {target.widths} share no token type "
                f"with a weight: the weights are {self.weights}"
            )
        return pairs


class FeatureLoss(TokenLoss):
    """Cosine distance and smooth-L1 on summary and patches, as UNIC and DUNE weigh them.

    ``w_s·d(summary) + w_p·mean over patches of d(patch)`` with
    ``d = cosine·(1 − cos(s, y)) + smooth_l1·smoothL1_β(s, y)`` (mean over the width).

    An image with a NaN or infinity in prediction or target gets a loss that is not finite, so that
    it is seen; if that loss is dropped (``weigh``), it leaves no gradient. Differentiable once.

    Args:
        cosine: weight of the cosine distance.
        smooth_l1: weight of smooth-L1.
        beta: where smooth-L1 turns from a square into a line.
        summary: weight of the summary.
        patches: weight of the patches.
        whole_map: an image's patches are one long vector, so that their cosine is the map's
            (Theia), in place of a mean over patches. Smooth-L1 is the same either way.

    Raises:
        ValueError: for negative weights, or where all of a kind are 0.
    """

    def __init__(
        self,
        cosine: float = 0.5,
        smooth_l1: float = 0.5,
        beta: float = 1.0,
        summary: float = 0.5,
        patches: float = 0.5,
        whole_map: bool = False,
    ) -> None:
        check_weights("cosine and smooth_l1", cosine, smooth_l1)
        super().__init__(summary, patches)
        if not 0.0 <= beta < float("inf"):
            raise ValueError(f"beta must be 0 or more and finite, received {beta}")
        self.cosine = cosine
        self.smooth_l1 = smooth_l1
        self.beta = beta
        self.whole_map = whole_map
        self.means_over_patches = not whole_map

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See ``TokenLoss``; of a whole map ``(B, N, D)`` it is ``(B,)``."""
        if self.whole_map:
            prediction, target = prediction.flatten(1), target.flatten(1)
        return token_distance(prediction, target, self.cosine, self.smooth_l1, self.beta)


class MSELoss(TokenLoss):
    """Mean squared error over the width, on summary and patches (PHI-S, arXiv 2410.01680).

    Args:
        summary: weight of the summary.
        patches: weight of the patches.

    Raises:
        ValueError: for negative weights, or where both are 0.
    """

    def __init__(self, summary: float = 0.5, patches: float = 0.5) -> None:
        super().__init__(summary, patches)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See ``TokenLoss``."""
        return (full_precision(prediction) - full_precision(target)).square().mean(-1)


def pair_of(
    prediction: TokenFeatures, target: TokenFeatures, token: TokenType
) -> tuple[Tensor, Tensor] | None:
    """Both sides' tensors of a token type; None where one lacks it.

    Raises:
        ValueError: their shapes differ.
    """
    s: Tensor | None = getattr(prediction, token)
    y: Tensor | None = getattr(target, token)
    if s is None or y is None:
        return None
    if s.shape != y.shape:
        raise ValueError(
            f"prediction and target differ in their {token}: {tuple(s.shape)} and "
            f"{tuple(y.shape)}; resample the target to the prediction's grid, and build "
            "the ladder from this teacher's widths"
        )
    return s, y


def check_weights(names: str, *weights: float) -> None:
    """Refuse negative weights, and all 0."""
    if not all(0.0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
        raise ValueError(f"{names} must be weights of 0 or more, not both 0, received {weights}")
