"""Attention of timm models on a CPU in bfloat16: plain products where they are the faster ones.

torch's fused attention saves memory; on a CPU in bfloat16 its small blocks run at a tenth of the
rate of oneDNN's products: with 197 tokens forward and backward took 38 ms where two products and a
softmax take 15 (float32: 28 and 32). timm's attention modules hold both ways, and choose
by their attribute ``fused_attn``. Measured by ``tools/bench/attention.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multikd.functional import autocast_dtype

# The table of weights (heads × tokens²) is kept for the backward pass, so only short sequences.
_MOST_TOKENS = {True: 512, False: 1024}  # by whether gradients are recorded


def choose_attention(model: nn.Module) -> None:
    """Let timm's attention modules decide at each call whether to run fused.

    They do so by device, dtype and length of what they are given, in hooks: nothing of the model's
    state, and nothing on an accelerator or under ``torch.compile``, changes.
    """
    for module in model.modules():
        if getattr(module, "fused_attn", False) is True:
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after, always_call=True)


def plain_is_faster(tokens: Tensor) -> bool:
    """Of attention over ``(…, N, D)``, here and now."""
    return (
        tokens.device.type == "cpu"
        and (autocast_dtype(tokens.device) or tokens.dtype) == torch.bfloat16
        and tokens.shape[-2] <= _MOST_TOKENS[torch.is_grad_enabled()]
    )


def _before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not inputs or not isinstance(inputs[0], Tensor):
        return
    if inputs[0].ndim >= 3 and plain_is_faster(inputs[0]):
        module.fused_attn = False  # type: ignore[assignment]


def _after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        module.fused_attn = True  # type: ignore[assignment]
