"""What the distances of ``drift.py`` say together, and whether to distil again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from multikd.evaluation.drift import (
    agreement_loss,
    check_pair,
    frechet_distance,
    mmd,
    neighbour_shift,
)

FINE, WATCH, DISTIL = "fine", "watch", "distil again"


@dataclass(frozen=True)
class DriftThresholds:
    """When drift is worth a word, and when worth a run.

    Attributes:
        significance: below this permutation p-value the two sets of images do differ.
        watch_far: share of new images farther from the reference than 95 % of the reference's own
            (0.05 is what no drift gives).
        distil_far: the same, from which another run is advised.
        watch_agreement: loss of a head's mean cosine with its teacher, lower end of the interval.
        distil_agreement: the same, from which another run is advised.
    """

    significance: float = 0.01
    watch_far: float = 0.10
    distil_far: float = 0.30
    watch_agreement: float = 0.02
    distil_agreement: float = 0.05

    def __post_init__(self) -> None:
        if not (
            0 < self.significance < 1
            and 0 <= self.watch_far <= self.distil_far <= 1
            and 0 <= self.watch_agreement <= self.distil_agreement
        ):
            raise ValueError(
                "thresholds of drift must satisfy 0 < significance < 1, watch_far ≤ distil_far ≤ 1 "
                f"and watch_agreement ≤ distil_agreement, received {self}"
            )


def drift_report(
    new: Tensor,
    reference: Tensor,
    *,
    agreement: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    thresholds: DriftThresholds | None = None,
    k: int = 10,
    maximum: int = 2000,
    permutations: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Every distance, the agreement with each teacher, and what to do; JSON values.

    Both sets are cut to as many images, at most ``maximum``, drawn at random; the reference's own
    noise is the Fréchet distance of two halves of what was drawn, set beside that of new and
    reference halves of the same size.

    Args:
        new: ``(B, D)`` features of the new images.
        reference: ``(M, D)`` of those that the encoder was judged on.
        agreement: teacher → cosine of the head's predictions with the teacher's features for each
            (reference, new) image.
        thresholds: when to watch and when to distil again.
        k: which neighbour.
        maximum: images of each set.
        permutations: of the MMD test.
        seed: of every draw.

    Raises:
        ValueError: fewer than 4 images (or k + 2) in a set, or features that do not fit.
    """
    limits = thresholds or DriftThresholds()
    check_pair(new, reference)
    least = max(4, k + 2)
    if min(len(new), len(reference), maximum) < least:
        raise ValueError(
            f"drift needs at least {least} images in both sets, received {len(new)} new and "
            f"{len(reference)} reference ones (maximum {maximum})"
        )
    generator = torch.Generator().manual_seed(seed)
    count = min(len(new), len(reference), maximum)
    x, y = (
        rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in (new, reference)
    )
    half = count // 2
    found = {
        "images": {"new": len(new), "reference": len(reference), "compared": count},
        "frechet": frechet_distance(x, y),
        "frechet_halves": {
            "new_reference": frechet_distance(x[:half], y[:half]),
            "reference_reference": frechet_distance(y[half : 2 * half], y[:half]),
        },
        "mmd": mmd(x, y, permutations, seed)._asdict(),
        "neighbours": {"k": k, **neighbour_shift(x, y, k)._asdict()},
        "agreement": {
            teacher: agreement_loss(old, fresh, seed=seed)
            for teacher, (old, fresh) in (agreement or {}).items()
        },
        "thresholds": asdict(limits),
    }
    verdict, reasons = recommend(found, limits)
    return {**found, "verdict": verdict, "reasons": reasons, "recommendation": _advice(verdict)}


def recommend(found: Mapping[str, Any], limits: DriftThresholds) -> tuple[str, list[str]]:
    """``fine``, ``watch`` or ``distil again``, and every threshold that was crossed."""
    p, far = float(found["mmd"]["p_value"]), float(found["neighbours"]["far"])
    differs = p < limits.significance
    reasons: list[tuple[str, str]] = []
    if differs:
        reasons.append((WATCH, f"the images differ (MMD, p = {p:.3g} < {limits.significance:g})"))
    # Without a difference that is no accident, a share is one.
    for verdict, bound in ((DISTIL, limits.distil_far), (WATCH, limits.watch_far)):
        if differs and far >= bound:
            reasons.append(
                (
                    verdict,
                    f"{100 * far:.0f} % of the new images are farther from the reference than 95 % "
                    f"of its own (threshold {100 * bound:g} %)",
                )
            )
            break
    for teacher, row in found["agreement"].items():
        for verdict, bound in (
            (DISTIL, limits.distil_agreement),
            (WATCH, limits.watch_agreement),
        ):
            if row["loss_low"] >= bound:
                reasons.append(
                    (
                        verdict,
                        f"agreement with {teacher} fell by {row['loss']:.3f} (95 % interval from "
                        f"{row['loss_low']:.3f}, threshold {bound:g})",
                    )
                )
                break
    levels = [level for level, _ in reasons]
    verdict = DISTIL if DISTIL in levels else WATCH if levels else FINE
    return verdict, [reason for _, reason in reasons]


def drift_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    images, near, test = report["images"], report["neighbours"], report["mmd"]
    halves = report["frechet_halves"]
    lines = [
        f"{report['verdict'].upper()}: {report['recommendation']}",
        *(f"  - {reason}" for reason in report["reasons"]),
        "",
        f"images     {images['new']} new, {images['reference']} reference, "
        f"{images['compared']} of each compared",
        f"MMD²       {test['squared']:.5f}, p = {test['p_value']:.3g}",
        f"Fréchet    {report['frechet']:.4g}; halves: new to reference "
        f"{halves['new_reference']:.4g}, reference to itself {halves['reference_reference']:.4g}",
        f"neighbours {100 * near['far']:.1f} % of the new images are far (5 % without drift); "
        f"median distance {near['new_median']:.4f}, of the reference {near['reference_median']:.4f}"
        f"; AUROC {near['auroc']:.3f}",
    ]
    for teacher, row in report["agreement"].items():
        lines.append(
            f"agreement  {teacher}: cosine {row['reference']:.4f} → {row['new']:.4f} "
            f"(loss {row['loss']:+.4f}, 95 % {row['loss_low']:+.4f} to {row['loss_high']:+.4f})"
        )
    return "\n".join(lines)


def _advice(verdict: str) -> str:
    return {
        FINE: "the new images look like the reference to this encoder; nothing to do",
        WATCH: "the new images differ somewhat; label a sample and watch its scores",
        DISTIL: "the new images are not what this encoder was judged on; add them to the training "
        "data and distil again",
    }[verdict]
