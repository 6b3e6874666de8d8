"""What decides an encoder's features, as one number: no stale cache is ever read by it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from multikd.backbones.digest import FORMAT, fingerprint

__all__ = ["FORMAT", "combined", "file_digest", "fingerprint"]


def combined(**parts: Any) -> str:
    """SHA-256 over named values."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
