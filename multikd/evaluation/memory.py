"""The most memory that a piece of work held at once, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measure the peak within a ``with`` block.

    On CUDA it is the allocator's peak (weights included). On a Linux CPU it is how far the
    resident set of the process rose above where it stood: freed blocks are handed back first
    (``malloc_trim``) and the kernel's high-water mark is reset (5 → ``clear_refs``), so that what
    earlier work held does not hide it. Other threads' memory counts too. Elsewhere it is unknown.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        self._peak: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu" and _reset_high_water():
            self._before = _kilobytes("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        elif self._before is not None:
            high = _kilobytes("VmHWM")
            self._peak = None if high is None else 1024 * max(0, high - self._before)

    def megabytes(self, resident: int) -> float | None:
        """The peak in 10⁶ bytes; None where it could not be measured.

        Args:
            resident: bytes that a CPU's process held already and that belong to the work (its
                weights); a GPU's allocator counts them itself.
        """
        if self._peak is None:
            return None
        return (self._peak + (0 if self.device.type == "cuda" else resident)) / 1e6


def _reset_high_water() -> bool:
    try:
        # Only glibc has it; without it what was freed may be used again and not counted.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _kilobytes(field: str) -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None
