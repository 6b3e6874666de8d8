"""The baseline: the same mathematics in the plainest way.

A module for each rung, teacher and token type, summed one by one; the losses teacher by teacher
from torch's own functions, each term read by the host; dropping in a loop over images.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multikd.ladder import Ladder
from multikd.types import TokenFeatures

Tokens = dict[str, Tensor]


class NaiveLadder(nn.Module):
    """Linear · GELU · Linear for each teacher, token type and rung; the rungs are added in turn.

    Args:
        ladder: whose (initial) weights are copied.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name in ladder.teachers:
            own = cast(nn.ModuleDict, ladder.projectors[name])
            self.heads[name] = nn.ModuleDict(
                {
                    token: nn.ModuleList([_copy(getattr(p, token)) for p in own.values()])
                    for token in ("summary", "patches")
                }
            )

    def forward(self, summaries: Sequence[Tensor], patches: Sequence[Tensor]) -> dict[str, Tokens]:
        """Predictions, teacher → token type → tensor."""
        predictions: dict[str, Tokens] = {}
        for name, heads in self.heads.items():
            summary, patch = torch.zeros(()), torch.zeros(())
            for rung, (x, y) in enumerate(zip(summaries, patches, strict=True)):
                summary = summary + heads["summary"][rung](x)  # type: ignore[index]
                patch = patch + heads["patches"][rung](y)  # type: ignore[index]
            predictions[name] = {"summary": summary, "patches": patch}
        return predictions


def _copy(network: nn.Sequential) -> nn.Sequential:
    first, second = cast(nn.Linear, network[0]), cast(nn.Linear, network[2])
    made = nn.Sequential(
        nn.Linear(first.in_features, first.out_features),
        nn.GELU(),
        nn.Linear(second.in_features, second.out_features),
    )
    made.load_state_dict(network.state_dict())
    return made


def naive_losses(
    predictions: Mapping[str, Tokens], targets: Mapping[str, TokenFeatures], read: bool = True
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """UNIC's loss of each image and teacher, and every term as a number that the host has read."""
    losses: dict[str, Tensor] = {}
    terms: dict[str, float] = {}
    for name, prediction in predictions.items():
        parts = []
        for token, s in prediction.items():
            y = getattr(targets[name], token)
            cosine = 1 - F.cosine_similarity(s, y, dim=-1)
            smooth = F.smooth_l1_loss(s, y, reduction="none").mean(dim=-1)
            loss = 0.5 * cosine + 0.5 * smooth
            if loss.ndim == 2:
                loss = loss.mean(dim=1)
            parts.append(loss)
            if read:
                terms[f"cosine/{token}/{name}"] = cosine.mean().item()
                terms[f"smooth_l1/{token}/{name}"] = smooth.mean().item()
                terms[f"{token}/{name}"] = loss.mean().item()
        losses[name] = torch.stack(parts, dim=1).mean(dim=1)
        if read:
            terms[name] = losses[name].mean().item()
    return losses, terms


def naive_dropping(
    losses: Mapping[str, Tensor], p: float = 0.5, keep: Tensor | None = None
) -> Tensor:
    """The total under hardest-kept dropping, image by image and teacher by teacher.

    Args:
        losses: teacher → ``(B,)``.
        p: probability of dropping.
        keep: ``(T, B)`` to be used in place of new draws, for comparisons.
    """
    table = torch.stack([losses[name] for name in sorted(losses)])
    columns = []
    for image in range(table.shape[1]):
        column = table[:, image]
        kept = torch.ones_like(column, requires_grad=False)
        hardest = torch.argmax(column)
        for teacher in range(len(column)):
            if teacher != hardest and random.random() < p:
                kept[teacher] = 0
        columns.append(kept)
    coefficients = torch.stack(columns).t() if keep is None else keep.clone()
    coefficients = coefficients / coefficients.sum()
    return (coefficients.detach() * table).sum()


class NaiveStandardizer:
    """UNIC's running standardiser, one token type at a time, in torch's plain operations."""

    def __init__(self, momentum: float = 0.5) -> None:
        self.momentum = momentum
        self.state: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, features: TokenFeatures) -> TokenFeatures:
        """Standardise with the statistics so far, then move them."""
        done: dict[str, Tensor] = {}
        for token in ("summary", "patches"):
            x = getattr(features, token).float()
            rows = x.reshape(-1, x.shape[-1])
            mean, std = self.state.get((name, token), (torch.zeros(1), torch.ones(1)))
            done[token] = (x - mean) / (std + 1e-6)
            m = self.momentum
            self.state[name, token] = (
                (1 - m) * mean + m * rows.mean(0),
                (1 - m) * std + m * (rows.std(0) + 1e-6),
            )
        return TokenFeatures(done["summary"], done["patches"], features.grid)
