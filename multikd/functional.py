"""Pure maths on tensors: no state, no ranks. Shape legend in ``multikd.types``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COVARIANCE_ROWS = 16_384
COSINE_EPS = 1e-8  # least product of two norms in a cosine, as in torch
_BLOCK = 1 << 18  # numbers that a CPU works on at a time: a megabyte of float32 stays in its cache

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def full_precision(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already (gradient checks)."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def in_own_dtype(layer: nn.Linear, features: Tensor) -> Tensor:
    """``layer(features)`` in the dtype of its weights (bfloat16 under ``bf16-true``), as float32.

    For layers of a loss, which see features of another dtype and run without autocast.
    """
    return full_precision(layer(features.to(layer.weight.dtype)))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off, so that losses stay in float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast; None where it is off, or the device has none."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """``1 − cos(prediction, target)`` over the last dimension: ``(…, D)`` → ``(…)`` in [0, 2].

    A vector of zeros has cosine 0 with everything.
    """
    dot = (prediction * target).sum(-1)
    norms = torch.linalg.vector_norm(prediction, dim=-1) * torch.linalg.vector_norm(target, dim=-1)
    similarity: Tensor = dot / norms.clamp(min=COSINE_EPS)
    return 1.0 - similarity


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 over the last dimension; one of zeros stays."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    directions: Tensor = vectors / norms.clamp(min=COSINE_EPS)
    return directions


def squared_angle(prediction: Tensor, target: Tensor) -> Tensor:
    """Θ², the angle in radians squared, over the last dimension: ``(…, D)`` → ``(…)`` in [0, π²].

    By the chord: ``Θ = 2·asin(c/2)``, ``c`` the distance of the unit vectors. Unlike the arc cosine
    it keeps its digits at small angles, and Θ² as a function of ``c²`` is smooth at 0, so that
    equal vectors have a gradient (of 0). Exactly opposite ones have 0, too: every way is downhill.
    """
    chord2 = (unit(prediction) - unit(target)).square().sum(-1)
    small = chord2 < 1e-2
    # Both branches are computed, so each gets arguments that it can be differentiated at.
    x = torch.where(small, chord2, 0.0)
    # Σ_k 2 x^k / (k²·C(2k, k)), to 1e-16 where x < 0.01.
    series = x * (
        1.0 + x * (1 / 12 + x * (1 / 90 + x * (1 / 560 + x * (1 / 3150 + x * (1 / 16632)))))
    )
    most = 4.0 - (1e-6 if chord2.dtype == torch.float32 else 1e-14)
    safe = torch.where(small, 1.0, chord2.clamp(max=most))
    return torch.where(small, series, (2.0 * torch.asin(safe.sqrt() / 2.0)).square())


def smooth_l1(prediction: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Mean over the last dimension of the Huber-like loss: ``(…, D)`` → ``(…)``, ≥ 0.

    ``d²/(2β)`` for ``|d| < β``, else ``|d| − β/2`` (Girshick 2015; β = 0 is the L1 distance).
    """
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)


def token_distance(
    prediction: Tensor, target: Tensor, cosine: float, smooth: float, beta: float
) -> Tensor:
    """``cosine · cosine_distance + smooth · smooth_l1``, in one piece: ``(…, D)`` → ``(…)``.

    The same numbers and gradients as the two functions, in fewer passes over memory: on a CPU some
    images at a time, and backward only those whose distance gets a gradient. A vector
    whose distance gets no gradient passes none on, even if it holds a NaN: what is masked
    out of a loss with ``torch.where`` is gone, where autograd would multiply 0 by NaN.

    Args:
        prediction: of two dimensions or more; half precisions are computed in float32.
        target: same shape.
        cosine: weight of the cosine distance.
        smooth: weight of smooth-L1.
        beta: of smooth-L1, 0 or more.

    Returns:
        float32, or float64 for float64.
    """
    distance: Tensor = _TokenDistance.apply(prediction, target, cosine, smooth, beta)
    return distance


def _blocks(tensor: Tensor) -> list[slice]:
    """Of the first dimension: as many as fit into a CPU's cache; elsewhere all in one."""
    count = len(tensor)
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or not tensor.numel():
        return [slice(0, count)]
    step = max(1, _BLOCK * count // tensor.numel())
    return [slice(start, start + step) for start in range(0, count, step)]


class _TokenDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, s: Tensor, y: Tensor, cosine: float, smooth: float, beta: float
    ) -> Tensor:
        found = []
        for block in _blocks(s):
            a, b = full_precision(s[block]), full_precision(y[block])
            norm_a = torch.linalg.vector_norm(a, dim=-1)
            norm_b = torch.linalg.vector_norm(b, dim=-1)
            similarity = (a * b).sum(-1) / (norm_a * norm_b).clamp(min=COSINE_EPS)
            distance = cosine * (1.0 - similarity) + smooth * smooth_l1(a, b, beta)
            found.append((norm_a, norm_b, similarity, distance))
        norm_s, norm_y, similarity, distance = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)
        )
        ctx.save_for_backward(s, y, norm_s, norm_y, similarity)
        ctx.weights = (cosine, smooth, beta)
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        s, y, *rest = ctx.saved_tensors
        blocks = _blocks(s)
        to_s, to_y = (
            torch.empty_like(side, memory_format=torch.contiguous_format) if wanted else None
            for side, wanted in zip((s, y), ctx.needs_input_grad[:2], strict=True)
        )
        for block in blocks:
            own = gradient[block]
            if len(blocks) > 1 and not own.any():  # only on CPUs, where asking costs no wait
                changes: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
            else:
                parts = [tensor[block] for tensor in rest]
                sides = full_precision(s[block]), full_precision(y[block])
                changes = _distance_backward(own, sides, parts, ctx.weights, to_y is not None)
            for side, change in zip((to_s, to_y), changes, strict=True):
                if side is not None:
                    side[block] = change
        return to_s, to_y, None, None, None


def _distance_backward(
    gradient: Tensor,
    sides: tuple[Tensor, Tensor],
    found: Sequence[Tensor],
    weights: tuple[float, float, float],
    both: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``token_distance`` toward both sides; without ``both`` the second is empty.

    Args:
        found: norms of both sides, and their cosine.
    """
    (s, y), (norm_s, norm_y, similarity) = sides, found
    cosine, smooth, beta = weights
    norms = (norm_s * norm_y).clamp(min=COSINE_EPS)
    across = -cosine * gradient / norms
    # d smoothL1/ds is the difference cut at ±β, over β; its sign for β = 0.
    huber = (s - y).sign_() if beta == 0 else (s - y).clamp_(-beta, beta)
    huber *= (gradient * (smooth / (s.shape[-1] * (beta or 1.0)))).unsqueeze(-1)
    unused = gradient == 0

    def toward(own: Tensor, other: Tensor, norm: Tensor, rest: Tensor) -> Tensor:
        # Where the product of the norms is clamped, it does not depend on them.
        free = (norms > COSINE_EPS) & (norm > 0)
        along = torch.where(free, cosine * gradient * similarity / norm.square(), 0.0)
        rest.addcmul_(other, across.unsqueeze(-1)).addcmul_(own, along.unsqueeze(-1))
        return rest.masked_fill_(unused.unsqueeze(-1), 0.0)

    to_y = toward(y, s, norm_y, -huber) if both else s.new_empty(0)
    return toward(s, y, norm_s, huber), to_y


def per_image(values: Tensor) -> Tensor:
    """Mean over everything but images: ``(B,)`` or ``(B, N)`` → ``(B,)``."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def where_images(mask: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` ``(B, …)`` where ``mask`` ``(B,)``, 0 elsewhere: values and gradients.

    Unlike a product with the mask, this stops a NaN in either direction.
    """
    return torch.where(mask.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0.0)


def batch_moments(x: Tensor, dim: int | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and centred sum of squares over ``dim``.

    Two passes, with the mean refined by the mean of what is left: exact to a few ulp of the
    *deviation*, however large the mean is, at the price of float32 arithmetic only.

    Args:
        x: any float dtype, ``(…)``; computed in float32 (float64 stays).
        dim: the dimension(s) of observations.

    Returns:
        count ``()``, mean and m2 = Σ(x − mean)² of the remaining shape, in float64 (float32 on
        MPS, which has no float64). Zeros where there are no observations.
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    count = 1
    for d in dims:
        count *= x.shape[d]
    x = full_precision(x)
    if count == 0:
        empty = x.sum(dims).to(wide)
        return empty.new_zeros(()), empty, empty.clone()
    rough = x.mean(dims, keepdim=True)
    centred = x - rough
    rest = centred.mean(dims, keepdim=True)
    mean = (rough.to(wide) + rest.to(wide)).squeeze(dims)
    m2 = centred.square().sum(dims).to(wide) - count * rest.squeeze(dims).to(wide).square()
    return mean.new_full((), float(count)), mean, m2.clamp(min=0.0)


def batch_covariance(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and matrix of centred products of rows ``(n, D)``, any float dtype.

    In float64 throughout, a slice of rows at a time, so that a large patch grid needs no large
    copy.

    Returns:
        count ``()``, mean ``(D,)`` and ``Σ (x − mean)(x − mean)ᵀ (D, D)``, float64. Zeros where
        there are no rows.
    """
    n, width = rows.shape
    scatter = rows.new_zeros((width, width), dtype=torch.float64)
    count, mean, _ = batch_moments(rows, 0)
    for part in torch.split(rows, _COVARIANCE_ROWS) if n else ():
        centred = part.double() - mean
        scatter.addmm_(centred.T, centred)
    return count, mean, scatter


def hash_uniform(
    seed: int, epoch: int | Tensor, positions: Tensor, stream: int | Tensor = 0
) -> Tensor:
    """A uniform draw that is a function of its four keys and of nothing else.

    SplitMix64 (Steele, Lea & Flood 2014) absorbs the keys one after another, in wrapping int64
    arithmetic, so that a CPU and a GPU, one rank and many, draw the same numbers.

    Args:
        seed: of the run.
        epoch: int, or an int64 tensor that broadcasts.
        positions: int64 ``(B,)`` place in the global order.
        stream: tells several draws for one position apart; int, or a tensor that broadcasts.

    Returns:
        float32 in [0, 1), multiples of 2⁻²⁴, in the broadcast shape of the keys.
    """
    state = _absorb(_absorb(_mix_int(seed), epoch), positions.long())
    return _shift_right(_as_int64(_absorb(state, stream)), 40).to(torch.float32) * 2.0**-24


def hash_unit(seed: int, epoch: int, position: int, stream: int = 0) -> float:
    """One draw of ``hash_uniform`` as a Python float, for choices made on the host."""
    state = _mix_int(seed)
    for key in (epoch, position, stream):
        state = _mix_int(state ^ (key & _MASK64))
    return (state >> 40) * 2.0**-24


def _absorb(state: int | Tensor, key: int | Tensor) -> int | Tensor:
    if isinstance(state, int) and isinstance(key, int):
        return _mix_int(state ^ (key & _MASK64))
    return _mix_tensor(_as_int64(state) ^ _as_int64(key))


def _as_int64(value: int | Tensor) -> Tensor:
    # A Python number typed as a tensor: torch's operators take either side.
    return value if isinstance(value, Tensor) else _signed(value)  # type: ignore[return-value]


def _signed(value: int) -> int:
    """The two's complement reading of 64 bits, as torch's int64 wants them."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value = (value + _GAMMA) & _MASK64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(value: Tensor) -> Tensor:
    value = value + _signed(_GAMMA)
    value = (value ^ _shift_right(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MIX_2)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
