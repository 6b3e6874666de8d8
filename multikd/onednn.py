"""Matrix products of oneDNN on a CPU: weight laid out beforehand, bias and GELU inside.

torch computes ``x Wᵀ + b`` on a CPU by copying the bias into every row of the result and adding the
product to it (in float32 with MKL, which is the slower one on some processors). The operator here
is the one that torch's own compiler emits for frozen CPU models; torch gives it no public name, so
everything here is asked for before it is used.
"""

from __future__ import annotations

import math
import platform
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

LEAST_WEIGHTS = 1 << 14  # smaller products are over before any of this matters
_LEAST_ROWS = 1 << 10  # with fewer, laying out a weight anew takes longer than it saves


def available(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have the products in this dtype."""
    if dtype not in _KINDS:
        _KINDS[dtype] = _has_operator(dtype)
    return _KINDS[dtype]


def pays(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``product`` with a weight laid out for this one call is the faster way.

    Args:
        rows: ``(…, in)``.
        weight: ``(out, in)``.
        dtype: that both are cast to.
    """
    return (
        on_cpu_now(rows, weight)
        and rows.numel() >= _LEAST_ROWS * rows.shape[-1]
        and weight.numel() >= LEAST_WEIGHTS
        and available(dtype)
    )


def laid_out(weight: Tensor, rows: int) -> Tensor:
    """A weight ``(out, in)``, which may be a transposed view, in oneDNN's layout for so many rows.

    The result is no tensor to read, copy or save; it serves ``product`` alone.
    """
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return laid


def product(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None
) -> Tensor:
    """``rows · weightᵀ + bias``, and its GELU: ``(M, in)`` → ``(M, out)``, without autograd.

    Args:
        rows: float32 or bfloat16, as ``available``.
        weight: ``(out, in)``, laid out or plain.
        bias: ``(out,)``.
        gelu: ``none`` (exact) or ``tanh``; None for no GELU.
    """
    attribute, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    # The operator takes a bias for contiguous, and would read other numbers.
    own = None if bias is None else bias.contiguous()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, own, attribute, [], algorithm)
    return found


def on_cpu_now(*tensors: object) -> bool:
    """Whether these are tensors on a CPU whose operators run as they are called.

    No shards, fakes or those of ``torch.func``, and nothing is compiled or traced.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        and not torch._C._are_functorch_transforms_active()
        and all(
            type(t) in (Tensor, nn.Parameter) and cast(Tensor, t).device.type == "cpu"
            for t in tensors
        )
    )


_KINDS: dict[torch.dtype, bool] = {}


def _has_operator(dtype: torch.dtype) -> bool:
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not built or platform.machine() not in ("x86_64", "AMD64"):
        return False
    mkldnn = torch.ops.mkldnn
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not all(hasattr(mkldnn, name) for name in names):
        return False
    if mkldnn._linear_pointwise not in flop_registry:
        register_flop_formula(mkldnn._linear_pointwise)(_flop)  # torch's counter knows it not
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _flop(rows: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOP of a product: ``rows (…, in)``, ``weight (out, in)``."""
    return 2 * math.prod(rows[:-1]) * weight[0] * weight[1]
