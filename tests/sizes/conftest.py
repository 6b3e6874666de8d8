"""Fixtures of other rooms' tests."""

from ablation.conftest import place  # noqa: F401
from stages.conftest import here  # noqa: F401
