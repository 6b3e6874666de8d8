"""Settings of the process that make training faster: the allocator and float32 products.

Commands apply them, not the library: a program that uses multikd keeps its own.
"""

from __future__ import annotations

import ctypes
import platform

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next allocation; whether it obeyed.

    Without it, blocks over 32 MB are mapped anew each time, and the kernel clears every page: on a
    CPU that took a third of a step. The process then stays as large as it once was. Nothing happens
    on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    )
