"""What an export in one format came to: size, nearness to the torch model, quality."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FormatReport:
    """One exported file.

    Attributes:
        path: the file (its external data, where there is some, lies beside it).
        format: name, as ``multikd export --list`` shows it.
        bytes: of all files of it together.
        parity: ``max_relative_error``, ``tolerance``, ``images`` (real or synthetic) and ``cases``.
            Empty for quantised files, which have a quality instead.
        quality: of a quantised file, against its float original; None elsewhere.
        settings: how it was made: opset, dynamic dimensions, preprocessing, bits.
    """

    path: Path
    format: str
    bytes: int
    parity: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "bytes": self.bytes,
            "parity": self.parity,
            "quality": self.quality,
            "settings": self.settings,
        }

    def text(self) -> str:
        """One line for a terminal."""
        parts = [f"{self.format}: {self.path} ({self.bytes / 1e6:.1f} MB)"]
        if self.parity:
            parts.append(
                f"largest relative error {self.parity['max_relative_error']:.1e} over "
                f"{len(self.parity['cases'])} shapes of {self.parity['images']} images "
                f"(allowed {self.parity['tolerance']:g})"
            )
        if self.quality is not None:
            parts.append(f"cosine to float {self.quality['cosine_mean']:.4f}")
            if self.quality["knn_agreement"] is not None:
                parts.append(
                    f"k-NN answers as float on {100 * self.quality['knn_agreement']:.1f} % of "
                    f"{self.quality['queries']} images"
                )
        return ", ".join(parts)
