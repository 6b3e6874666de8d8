"""Settings of the process, made when everything was found in order and training begins."""

from __future__ import annotations

import lightning.pytorch as pl

from multikd.performance import tune_process


class TunedProcess(pl.Callback):
    """Allocator and float32 products of this process, as ``multikd fit`` sets them.

    Args:
        allocator: ``keep`` or ``default``.
        float32_products: ``highest``, ``high`` or ``medium``; None leaves torch's setting.
    """

    def __init__(self, allocator: str = "keep", float32_products: str | None = None) -> None:
        self.allocator = allocator
        self.float32_products = float32_products

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See the class."""
        tune_process(self.allocator, self.float32_products)
