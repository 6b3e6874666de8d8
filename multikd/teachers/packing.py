"""Linear layers of a frozen encoder on a CPU: bias and GELU inside oneDNN's matrix product.

torch computes ``x Wᵀ + b`` on a CPU by copying the bias into every row of the result and adding
the product to it, and a GELU reads and writes that once more: of a ViT-S teacher in bfloat16 these
passes over memory were a fifth of the time. oneDNN does both while a tile of the result is still in
a register, with a weight laid out for it beforehand (``multikd.onednn``), once, since a teacher's
never changes.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from multikd.onednn import LEAST_WEIGHTS, available, laid_out, product

log = logging.getLogger(__name__)


class PackedLinear(nn.Linear):
    """``nn.Linear`` of a weight that is not trained, with the same parameters and names.

    Made out of an ``nn.Linear`` in place (``pack_linears``). Where oneDNN has no part in it
    (another device or dtype, autograd, tracing) it is the plain layer, and its GELU if it has one.

    Attributes:
        gelu: None, or ``none`` (exact) or ``tanh``: the activation that follows.
    """

    gelu: str | None
    _packed: tuple[Any, Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        """``(…, in)`` → ``(…, out)`` in the dtype of the input."""
        if not self._serves(input):
            plain = F.linear(input, self.weight, self.bias)
            return plain if self.gelu is None else F.gelu(plain, approximate=self.gelu)
        rows = input.reshape(-1, self.in_features)
        found = product(rows, self._weight(len(rows)), self.bias, self.gelu)
        return found.view(*input.shape[:-1], self.out_features)

    def _serves(self, input: Tensor) -> bool:
        return (
            input.device.type == "cpu"
            and self.weight.device.type == "cpu"
            and input.dtype == self.weight.dtype
            and input.numel() > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
            and available(input.dtype)
        )

    def _weight(self, rows: int) -> Tensor:
        """The weight in oneDNN's layout; laid out anew when it was moved, cast or written to."""
        now = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._packed is None or self._packed[0] != now:
            self._packed = (now, laid_out(self.weight, rows))
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's tensors can't be copied


def pack_linears(encoder: nn.Module) -> int:
    """Turn an encoder's linear layers into ``PackedLinear``, in place; how many there are.

    Parameters, their names and the state dict stay. A GELU goes into the layer before it where
    that order is known: in timm's ``Mlp``. Layers with hooks, subclasses and small ones are left.
    """
    for module in encoder.modules():
        if type(module) is Mlp and _packable(module.fc1) and _only_gelu(module):
            activation = cast(nn.GELU, module.act)
            _pack(cast(nn.Linear, module.fc1), activation.approximate)
            module.act = nn.Identity()
    for module in encoder.modules():
        if _packable(module):
            _pack(cast(nn.Linear, module), None)
    count = sum(isinstance(module, PackedLinear) for module in encoder.modules())
    available(torch.float32)  # here, so that torch's counter of FLOP knows the product in time
    log.debug("%d linear layers of %s are packed on CPUs", count, type(encoder).__name__)
    return count


def _pack(linear: nn.Linear, gelu: str | None) -> None:
    linear.__class__ = PackedLinear
    cast(PackedLinear, linear).gelu = gelu
    cast(PackedLinear, linear)._packed = None


def _packable(module: object) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.numel() >= LEAST_WEIGHTS
        and not _hooked(module)
        and not module.weight.requires_grad
    )


def _only_gelu(mlp: Mlp) -> bool:
    """Whether nothing but a GELU stands between the first layer and the second, in evaluation."""
    return type(mlp.act) is nn.GELU and not _hooked(mlp.act) and type(mlp.drop1) is nn.Dropout


def _hooked(module: nn.Module) -> bool:
    parametrized = hasattr(module, "parametrizations")
    return parametrized or bool(module._forward_hooks or module._forward_pre_hooks)
