"""Settings of the process that make training faster: the allocator and float32 products.

Commands apply them, not the library: a program that uses multikd keeps its own.
"""

from __future__ import annotations

import ctypes
import logging
import platform

import torch

log = logging.getLogger(__name__)

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


def tune_process(allocator: str, float32_products: str | None) -> None:
    """Apply the settings of a training command, and log what was changed.

    Args:
        allocator: ``keep`` for ``keep_freed_memory``, ``default`` for the C library's own way.
        float32_products: ``torch.set_float32_matmul_precision``; None leaves it. On CPUs anything
            below ``highest`` means oneDNN in place of MKL: on some processors twice as fast at the
            same precision, on others bfloat16, so the error is measured and logged.
    """
    if allocator == "keep" and keep_freed_memory():
        # Not at INFO, which is shown: a run that ends in one sentence shows that sentence alone.
        log.debug("glibc keeps freed memory for reuse (--allocator=default turns this off)")
    if float32_products is not None:
        torch.set_float32_matmul_precision(float32_products)
        log.info(
            "float32 matrix products at precision %r: relative error %.1e",
            float32_products,
            product_error(),
        )


def product_error(size: int = 512) -> float:
    """Error of a float32 product on the CPU with the current settings, over the product's size."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())
