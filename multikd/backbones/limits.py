"""What a stranger's model may ask for: nothing is allocated that its weights do not fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_MOST = 1 << 16  # of any one number: widths, image sizes, classes
_MOST_ARGUMENTS = 256
_COUNTS = ("depth", "layer", "block")
_MOST_BUFFERS = 1 << 30  # bytes of tensors that are computed, not loaded


def check_model_args(arguments: Any, most_blocks: int) -> None:
    """Refuse constructor arguments of a timm model that would build for hours.

    Args:
        arguments: a mapping of plain values, or None.
        most_blocks: no depth may be more: every block has at least one tensor.

    Raises:
        ValueError: names the argument.
    """
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise ValueError(f"model_args must be a mapping, received a {type(arguments).__name__}")
    if len(arguments) > _MOST_ARGUMENTS:
        raise ValueError(f"model_args has {len(arguments)} entries, the limit is {_MOST_ARGUMENTS}")
    for name, value in arguments.items():
        numbers = _numbers(value, str(name))
        if any(not number <= _MOST for number in numbers):  # NaN is refused, too
            raise ValueError(f"model_args asks for {name}={str(value)[:40]}: more than {_MOST}")
        if any(count in str(name).lower() for count in _COUNTS) and sum(numbers) > most_blocks:
            raise ValueError(
                f"model_args asks for {name}={str(value)[:40]}, and there are weights for "
                f"{most_blocks} blocks at most"
            )


def _numbers(value: Any, name: str, deep: int = 0) -> list[float]:
    if isinstance(value, bool | str) or value is None:
        return []
    if isinstance(value, int | float):
        return [abs(value)]
    inner = value.values() if isinstance(value, Mapping) else value
    if deep > 4 or not isinstance(value, Mapping | list | tuple) or len(value) > _MOST_ARGUMENTS:
        raise ValueError(f"model_args has no usable {name}")
    return [number for item in inner for number in _numbers(item, name, deep + 1)]


def check_shapes(model: nn.Module, tensors: Mapping[str, Tensor] | Mapping[str, Any]) -> None:
    """Compare a model on the meta device with the weights that are to fill it.

    Args:
        model: built under ``torch.device("meta")``.
        tensors: name → tensor, or anything with a ``shape``.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape; buffers too large.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"the weights lack {name!r} {tuple(tensor.shape)}")
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            raise ValueError(
                f"{name!r} is {tuple(tensors[name].shape)} in the weights and "
                f"{tuple(tensor.shape)} in the model"
            )
    extra = next((name for name in tensors if name not in own), None)
    if extra is not None:
        raise ValueError(f"the weights have {extra!r}, which the model has not")
    computed = sum(b.numel() * b.element_size() for b in model.buffers())
    if computed > _MOST_BUFFERS:
        raise ValueError(f"the model would compute {computed} bytes of buffers")
