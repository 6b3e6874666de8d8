"""Shared by all tests. Being here, it also puts ``tests/`` on the path, for ``helpers``."""

from __future__ import annotations

import pytest
import torch

# Small operations on few, shared cores: more threads only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
