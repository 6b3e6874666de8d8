"""multikd: one generalist student out of several frozen foundation-model teachers.

Importing this package is cheap; the rooms (``multikd.teachers``, ``multikd.modules``, …) import
torch, timm and Lightning when they are first used, and so does ``multikd.load``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multikd.export.load import load as load

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from multikd.export.load import load

        return load
    raise AttributeError(f"module 'multikd' has no attribute {name!r}")
