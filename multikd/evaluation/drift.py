"""Whether new images still look to an encoder like those that it was judged on; no labels needed.

Three distances between the features of NEW and REFERENCE images, and how much less a student's
heads agree with its teachers on the new ones:

* Fréchet distance (Dowson & Landau 1982; of features: Heusel et al., NeurIPS 2017, "FID"),
* maximum mean discrepancy with an RBF kernel of median width and a permutation test (Gretton et
  al., "A Kernel Two-Sample Test", JMLR 2012),
* distance to the k-th nearest reference image (Sun et al., "Out-of-Distribution Detection with
  Deep Nearest Neighbors", ICML 2022).

Shapes: M reference images, B new ones, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multikd.evaluation.agreement import nearest_others
from multikd.evaluation.neighbours import nearest_neighbours


class Discrepancy(NamedTuple):
    """Unbiased MMD², the share of permutations that reach it, and the kernel's width."""

    squared: float
    p_value: float
    width: float


class NeighbourShift(NamedTuple):
    """How far new images are from the reference, compared with the reference's own.

    ``far`` is the share of new images beyond the 95th percentile of the reference's distances (0.05
    without drift), ``auroc`` how often a new image is farther than a reference image (0.5 without).
    """

    new_median: float
    reference_median: float
    far: float
    auroc: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½)`` of two sets of features, in float64.

    Σ is unbiased. Grows with the width and, for few images, as the images get fewer: compare only
    values of the same encoder and the same number of images.

    Args:
        a: ``(M, D)``, M of 2 or more.
        b: ``(B, D)``.

    Raises:
        ValueError: shapes that do not fit, too few images, or values that are not finite.
    """
    x, y = check_pair(a, b)
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x), _moments(y)
    # The eigenvalues of Σ_a Σ_b are those of the symmetric Σ_a^½ Σ_b Σ_a^½: no complex root.
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0)
    traces = cov_x.trace() + cov_y.trace() - 2 * product.sqrt().sum()
    return max(0.0, float((mean_x - mean_y).square().sum() + traces))


def mmd(a: Tensor, b: Tensor, permutations: int = 500, seed: int = 0) -> Discrepancy:
    """Unbiased MMD² with ``exp(−‖x − y‖² / 2w²)``, w the median distance of the pooled images.

    Memory is about ``8 · (M + B)²`` bytes, a few times over.

    Args:
        a: ``(M, D)``.
        b: ``(B, D)``.
        permutations: relabellings of the pooled images for the p-value, (1 + as large) / (1 + all).
        seed: of those.

    Raises:
        ValueError: see :func:`frechet_distance`; also all images alike.
    """
    x, y = check_pair(a, b)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, received {permutations}")
    pooled = torch.cat([x, y])
    distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    upper = torch.triu_indices(len(pooled), len(pooled), 1)
    width = float(distances[upper[0], upper[1]].median())
    if width <= 0:
        raise ValueError(
            "more than half of the image pairs have the same features, so that no distance of "
            "distributions can be measured: look for copies of one image"
        )
    kernel = (-distances.square() / (2 * width * width)).exp()
    m, n = len(x), len(y)
    first = torch.zeros(permutations + 1, m + n, dtype=torch.float64)
    first[0, :m] = 1
    generator = np.random.default_rng(seed)
    for i in range(1, permutations + 1):
        first[i, torch.from_numpy(generator.permutation(m + n)[:m])] = 1
    sums = first @ kernel
    within_first = (sums * first).sum(dim=1)
    across = sums.sum(dim=1) - within_first
    within_second = kernel.sum() - within_first - 2 * across
    # The diagonal is 1 for every image, whichever side it is on.
    values = (
        (within_first - m) / (m * (m - 1))
        + (within_second - n) / (n * (n - 1))
        - 2 * across / (m * n)
    )
    # Rounding must not make a relabelling that changes nothing smaller than what was seen.
    as_large = int((values[1:] >= values[0] - 1e-12).sum())
    return Discrepancy(float(values[0]), (1 + as_large) / (1 + permutations), width)


def neighbour_shift(new: Tensor, reference: Tensor, k: int = 10) -> NeighbourShift:
    """Distance of unit features to the k-th nearest reference image, new against reference.

    Reference images leave themselves out.

    Args:
        new: ``(B, D)``.
        reference: ``(M, D)``, more than k.
        k: which neighbour.

    Raises:
        ValueError: see :func:`frechet_distance`; also k out of range.
    """
    check_pair(new, reference)
    if not 1 <= k < len(reference):
        raise ValueError(
            f"k must be from 1 to {len(reference) - 1}, the other reference images, received {k}"
        )
    own = _distance(nearest_others(reference, k).similarities[:, -1])
    far = _distance(nearest_neighbours(reference, new, k).similarities[:, -1])
    ordered = own.sort().values
    below = torch.searchsorted(ordered, far, right=False).to(torch.float64)
    not_above = torch.searchsorted(ordered, far, right=True).to(torch.float64)
    return NeighbourShift(
        new_median=float(far.median()),
        reference_median=float(own.median()),
        far=float((far > own.quantile(0.95)).to(torch.float64).mean()),
        # Ties count half (Mann & Whitney).
        auroc=float(((below + not_above) / 2).mean() / len(own)),
    )


def agreement_loss(
    reference: Tensor, new: Tensor, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """How much lower a head's cosine with its teacher is on new images, with a 95 % interval.

    Args:
        reference: cosine of each reference image, ``(M,)``.
        new: cosine of each new image, ``(B,)``.
        resamples: bootstrap draws, of both sets independently.
        seed: of the draws.

    Raises:
        ValueError: no images, or values that are not finite.
    """
    sides = []
    for rows in (reference, new):
        values = rows.detach().cpu().to(torch.float64).numpy()
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ValueError(
                "agreement needs the cosine of each image, finite (M,) with M > 0, received "
                f"{tuple(rows.shape)}"
            )
        sides.append(values)
    generator = np.random.default_rng(seed)
    old, fresh = (
        np.array([v[generator.integers(0, len(v), len(v))].mean() for _ in range(resamples)])
        for v in sides
    )
    low, high = np.quantile(old - fresh, [0.025, 0.975])
    means = [float(v.mean()) for v in sides]
    return {
        "reference": means[0],
        "new": means[1],
        "loss": means[0] - means[1],
        "loss_low": float(low),
        "loss_high": float(high),
    }


def check_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU.

    Raises:
        ValueError: shapes that do not fit, too few images, or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "drift compares features (M, D) and (B, D) of one encoder, 2 images or more of each, "
            f"received {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for rows in (a, b):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("features must be finite, received NaN or infinity")
    x, y = (rows.detach().cpu().to(torch.float64) for rows in (a, b))
    return x, y


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(dim=0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def _distance(cosine: Tensor) -> Tensor:
    return (2 - 2 * cosine.cpu().to(torch.float64)).clamp(min=0).sqrt()
