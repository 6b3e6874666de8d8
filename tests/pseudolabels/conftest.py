"""Fixtures of other rooms' tests."""

from ablation.conftest import place  # noqa: F401
