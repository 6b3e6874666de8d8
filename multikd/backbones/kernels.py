"""Linear layers and attention of timm models on a CPU: the same sums by quicker operators.

- **Attention** in bfloat16: torch's fused one saves memory, but its small blocks run at a tenth of
  the rate of oneDNN's products: with 197 tokens forward and backward take twice as long as products
  and a softmax (``tools/bench/attention.py``). In float32 the fused one is the faster and stays.
- **Linear layers** that are trained: ``multikd.onednn`` in the forward pass, and in float32 toward
  their input, too.

Frozen teachers' linear layers are packed once instead (``multikd.teachers.packing``). Nothing of a
model's modules, names or state changes, and nothing on an accelerator, under ``torch.compile``,
``torch.func``, tracing or export.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multikd.functional import autocast_dtype
from multikd.onednn import LEAST_WEIGHTS, available, laid_out, on_cpu_now, pays, product

# The table of weights (heads × tokens²) is kept for the backward pass, so only short sequences.
_MOST_TOKENS = {True: 512, False: 1024}  # by whether gradients are recorded


class QuickOperators(TorchFunctionMode):
    """Within it ``F.linear`` and ``F.scaled_dot_product_attention`` take the faster way."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operator's own result, or the same by another way."""
        kwargs = kwargs or {}
        if func is F.linear and _trained(*args, **kwargs):
            return linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention and plain_is_faster(*args, **kwargs):
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def use_quick_operators(model: nn.Module) -> None:
    """Let a model's attention modules and MLPs run within ``QuickOperators``, by hooks of theirs.

    Theirs and not the model's, so that activations that are computed again in the backward pass
    take the same way (not with reentrant checkpointing, which runs forward without gradients).
    """
    available(torch.float32)  # here, so that torch's counter of FLOP knows the products in time
    for module in model.modules():
        if module is model:
            continue
        if getattr(module, "fused_attn", False) is True or _has_linear(module):
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after, always_call=True)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with gradients: ``(…, in)`` → ``(…, out)`` in the dtype of autocast."""
    dtype = autocast_dtype(input.device) or input.dtype
    found: Tensor = _Linear.apply(input.to(dtype), weight, bias)
    return found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention by products: ``(B, H, N, D)`` → ``(B, H, N, D_v)``.

    Args:
        query: ``(B, H, N, D)``.
        key: ``(B, H, M, D)``.
        value: ``(B, H, M, D_v)``.
        attn_mask: added to the table, of its dtype and a shape that fits ``(B, H, N, M)``.
        scale: of the products; None for ``D ** -0.5``.
    """
    dtype = autocast_dtype(query.device) or query.dtype
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is None:
        found: Tensor = _Attention.apply(q, k, v, factor)
        return found
    table = (q * factor) @ k.transpose(-2, -1) + attn_mask
    return table.softmax(-1).to(dtype) @ v


def plain_is_faster(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether ``attention`` is the faster way here and now, and can do it."""
    return (
        on_cpu_now(query, key, value)
        and (autocast_dtype(query.device) or query.dtype) == torch.bfloat16
        and query.ndim == 4
        and query.shape[:2] == key.shape[:2]
        and key.shape[-2] <= _MOST_TOKENS[torch.is_grad_enabled()]
        and (attn_mask is None or attn_mask.is_floating_point())
        and not (dropout_p or is_causal or enable_gqa)
    )


def _trained(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``linear`` serves this call: recorded by autograd, large, of a dtype oneDNN has.

    Without gradients torch's own operator runs, so that a student's features are, bit for bit,
    those of the exported model.
    """
    if not torch.is_grad_enabled() or not on_cpu_now(input, weight):
        return False
    lower = autocast_dtype(input.device)
    if (lower is None and input.dtype != weight.dtype) or torch.float64 in (
        input.dtype,
        weight.dtype,
    ):
        return False
    return (input.requires_grad or weight.requires_grad) and pays(
        input, weight, lower or input.dtype
    )


class _Linear(torch.autograd.Function):
    """In the dtype of ``x``. A weight of another dtype is cast anew in the backward pass: a copy
    that is kept for it would be as large as the model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        rows = x.reshape(-1, x.shape[-1])
        laid = laid_out(weight.to(x.dtype), len(rows))
        found = product(rows, laid, None if bias is None else bias.to(x.dtype))
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        to_x = to_weight = to_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if weight is not None:
            cast_weight = weight.to(rows.dtype)
            # bfloat16: both ways are as fast. Differentiated twice: autograd's own operators.
            if rows.dtype == torch.float32 and not torch.is_grad_enabled():
                to_rows = product(rows, cast_weight.t())
            else:
                to_rows = rows @ cast_weight
            to_x = to_rows.view(*gradient.shape[:-1], -1)
        if x is not None:
            to_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0).to(bias_dtype)
        return to_x, to_weight, to_bias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        a, b, c = (_heads(tensor) for tensor in (q, k, v))
        table = _scaled(a, b.transpose(1, 2), scale).softmax(-1)
        ctx.save_for_backward(q, k, v, table)
        ctx.scale = scale
        return torch.bmm(table, c).view(*q.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table = ctx.saved_tensors
        a, b, c, g = (_heads(tensor) for tensor in (q, k, v, gradient))
        if torch.is_grad_enabled():  # differentiated twice: the table depends on q and k
            table = _scaled(a, b.transpose(1, 2), ctx.scale).softmax(-1)
        to_v = torch.bmm(table.transpose(1, 2), g)
        to_table = torch.bmm(g, c.transpose(1, 2))
        to_scores = torch._softmax_backward_data(to_table, table, -1, table.dtype)
        to_q = _scaled(to_scores, b, ctx.scale)
        to_k = _scaled(to_scores.transpose(1, 2), a, ctx.scale)
        return to_q.view(q.shape), to_k.view(k.shape), to_v.view(v.shape), None


def _heads(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a b`` of batches of matrices, rounded once."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)


_entered = threading.local()


def _before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not inputs or not on_cpu_now(inputs[0]):
        return
    mode = QuickOperators()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _stack().append((module, mode))


def _after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    stack = _stack()
    if stack and stack[-1][0] is module:
        stack.pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]


def quick_depth() -> int:
    """How many modules are inside ``QuickOperators`` on this thread."""
    return 0 if torch.compiler.is_compiling() else len(_stack())


def leave_quick(depth: int) -> None:
    """Leave those that an interrupt left behind: torch runs a module's hooks upon errors only."""
    if not torch.compiler.is_compiling():
        while len(_stack()) > depth:
            _stack().pop()[1].__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _stack() -> list[tuple[nn.Module, QuickOperators]]:
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    found: list[tuple[nn.Module, QuickOperators]] = _entered.stack
    return found


def _has_linear(module: nn.Module) -> bool:
    return any(
        type(child) is nn.Linear and child.weight.numel() >= LEAST_WEIGHTS
        for child in module.children()
    )
