"""What a stranger's model may ask for: nothing is allocated that its weights do not fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 1 << 16  # of any one number: widths, image sizes, classes
_MOST_ARGUMENTS = 256
_COUNTS = ("depth", "layer", "block")


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
