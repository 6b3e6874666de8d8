"""Layers that train as if their weights and inputs were integers already.

Linear layers are torchao's. It has none for convolutions, so here is one that uses its quantiser
for the weights. Parameters keep their names and identity: checkpoints and optimisers don't notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multikd.errors import MissingExtraError


@dataclass(frozen=True)
class Prepared:
    """How many layers train as integers, and how many of their kind could not be changed."""

    linear: int
    convolutions: int
    left: int


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require_torchao() -> None:
    """Raise unless torchao is there.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("torchao") is None:
        raise MissingExtraError("torchao", "quantize", "quantisation-aware training")


def fake_quantize_tensor(values: Tensor) -> Tensor:
    """Round to uint8 over the range of the whole tensor (0 included); gradients pass through.

    What a statically quantised activation goes through, with the range of this batch. Values
    of any shape and floating dtype; the same comes back.
    """
    wide = values.float()
    with torch.no_grad():
        low, high = wide.amin().clamp(max=0.0), wide.amax().clamp(min=0.0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(wide, scale, zero, 0, 255)
    return rounded.to(values.dtype)


class FakeQuantizedConv2d(nn.Conv2d):
    """A convolution with int8 (or int4) weights per output channel and, if asked, uint8 inputs.

    A batch norm that follows scales whole channels, so folding it later changes no integer.
    """

    weight_quantizer: Any
    quantize_inputs: bool

    @classmethod
    def of(cls, conv: nn.Conv2d, weight_quantizer: Any, quantize_inputs: bool) -> nn.Module:
        """``conv`` itself with this forward: same parameters, buffers, hooks and mode."""
        changed = conv.__new__(cls)
        changed.__dict__ = conv.__dict__.copy()
        # Not a submodule: nothing of it belongs into a checkpoint.
        object.__setattr__(changed, "weight_quantizer", weight_quantizer)
        changed.quantize_inputs = quantize_inputs
        return changed

    def plain(self) -> nn.Conv2d:
        """The ordinary convolution of the same parameters."""
        conv = nn.Conv2d.__new__(nn.Conv2d)
        conv.__dict__ = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("weight_quantizer", "quantize_inputs")
        }
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, C', H', W')``."""
        if self.quantize_inputs:
            input = fake_quantize_tensor(input)
        rows: Tensor = self.weight_quantizer(self.weight.flatten(1))
        output: Tensor = self._conv_forward(input, rows.view_as(self.weight), self.bias)
        return output


def prepare(model: nn.Module, bits: Literal[8, 4], activations: bool, group_size: int) -> Prepared:
    """Make the layers of a model train as integers, in place.

    int8: one scale per output channel. int4: linear layers have one per ``group_size`` inputs where
    that divides them, like the weight-only export, and convolutions one per channel.

    Raises:
        ValueError: the model has no layer of either kind.
        MissingExtraError: the extra ``quantize`` is not installed.
    """
    require_torchao()
    with _quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
        from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

        dtype = torch.int8 if bits == 8 else torch.int4  # type: ignore[attr-defined]
        per_channel = IntxFakeQuantizeConfig(dtype, PerAxis(0))
        inputs = (
            IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
            if activations
            else None
        )
        linear = {name for name, m in model.named_modules() if type(m) is nn.Linear}
        grouped = {
            name
            for name in linear
            if bits == 4 and model.get_parameter(f"{name}.weight").shape[1] % group_size == 0
        }
        for names, weights in (
            (linear - grouped, per_channel),
            (grouped, IntxFakeQuantizeConfig(dtype, PerGroup(group_size))),
        ):
            quantize_(
                model,
                QATConfig(activation_config=inputs, weight_config=weights, step="prepare"),
                filter_fn=lambda _, name, names=names: name in names,
            )
        convolutions = [name for name, m in model.named_modules() if type(m) is nn.Conv2d]
        for name in convolutions:
            conv = model.get_submodule(name)
            quantizer = FakeQuantizerBase.from_config(per_channel)
            _replace(model, name, FakeQuantizedConv2d.of(conv, quantizer, activations))  # type: ignore[arg-type]
    if not linear and not convolutions:
        raise ValueError("the model has no linear layer and no plain convolution to quantise")
    changed = len(linear) + len(convolutions)
    weighted = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    return Prepared(len(linear), len(convolutions), weighted - changed)


def restore(model: nn.Module) -> None:
    """Ordinary layers again, in place, with the weights as they are."""
    with _quiet():
        from torchao.quantization.qat import FakeQuantizedLinear

        for name, module in list(model.named_modules()):
            if isinstance(module, FakeQuantizedConv2d):
                _replace(model, name, module.plain())
            elif isinstance(module, FakeQuantizedLinear):
                _replace(model, name, module.to_linear().train(module.training))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
