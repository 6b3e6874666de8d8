"""Shared by all tests. Being here, it also puts ``tests/`` on the path, for ``helpers``."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
