"""multikd: one generalist student out of several frozen foundation-model teachers.

Importing this package is cheap; the rooms (``multikd.teachers``, ``multikd.modules``, …) import
torch, timm and Lightning when they are first used.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
