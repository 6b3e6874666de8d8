"""Copies of tensors from the host, which an accelerator's queue waits for."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostCopies(TorchDispatchMode):
    """Counts tensors that are made of Python's numbers (``torch.tensor``, ``new_tensor``)."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func.overloadpacket.__name__ == "lift_fresh"
        return func(*args, **(kwargs or {}))
