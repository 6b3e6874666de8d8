"""Torch files of strangers, read without running what they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


class Inert:
    """Stands for an object that nobody needs: it takes any arguments and keeps none."""

    def __init__(self, *_: object, **__: object) -> None:
        """Ignore everything."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state, too."""

    def __repr__(self) -> str:
        return "a value that is not read"


# What training programs keep beside the weights: their arguments, and in these learning-rate
# schedules (naver/unic and naver/dune: `main_*.py`). NumPy's own unpickling trusts the
# flags of a stored dtype, so that a made-up file could have it follow pointers: nothing of NumPy is
# called, its arrays are dropped.
_INERT = tuple(
    (Inert, f"{module}.{name}")
    for module, names in {
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),
        "numpy": ("ndarray", "dtype", "float64", "float32", "int64"),
        "numpy.dtypes": ("Float64DType", "Float32DType", "Int64DType"),
        "_codecs": ("encode",),
    }.items()
    for name in names
)
_SAFE: tuple[Callable[..., Any] | tuple[Callable[..., Any], str], ...] = (
    argparse.Namespace,  # it only holds values
    Inert,
    *_INERT,
)


def read_torch_file(path: Path) -> Any:
    """What a torch file holds: tensors, numbers, text, ``argparse.Namespace`` of these.

    Arrays of NumPy come as ``Inert``. Anything else that the file names is refused
    before it is looked up, so that no code of the file runs.

    Raises:
        ValueError: no torch file, a truncated one, or one that names other objects.
    """
    try:
        with torch.serialization.safe_globals(list(_SAFE)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read without executing pickled code (or is no torch file): "
            "save its state dict alone, best as .safetensors"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path} is no readable weight file ({first_line(error)}): expected .safetensors "
            "or a torch state dict"
        ) from error


def first_line(error: Exception) -> str:
    """Kind of error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else 'no message'}"
