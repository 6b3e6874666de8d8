"""Soft labels of a sample: the member ``soft.npy``, K probabilities as a plain NumPy array."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multikd.data.decode import SampleFault

SOFT = "soft.npy"
Soft = NDArray[np.float32]
_TOLERANCE = 1e-2  # of the sum: half-precision rows are off by so much
_MOST = 1 << 22  # bytes of one member


def encode_soft(probabilities: NDArray[np.floating]) -> bytes:
    """``(K,)`` probabilities as the bytes of a member."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(probabilities, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def decode_soft(members: Mapping[str, bytes]) -> Soft | None:
    """A sample's soft labels ``(K,)``, which sum to 1; None where it has none.

    Raises:
        SampleFault: ``bad label``, where the member is no row of probabilities.
    """
    data = members.get(SOFT)
    if data is None:
        return None
    try:
        if len(data) > _MOST:
            raise ValueError(f"{len(data)} bytes")
        found = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "f":
            raise ValueError("no row of floating-point numbers")
        row: Soft = found.astype(np.float32)
        if not (row >= 0).all() or abs(float(row.sum(dtype=np.float64)) - 1) > _TOLERANCE:
            raise ValueError("they do not sum to 1")
    except (ValueError, OSError, EOFError) as error:
        raise SampleFault("bad label", f"{SOFT}: expected probabilities, {error}") from error
    row /= row.sum(dtype=np.float32)
    return row


def stack_soft(rows: Sequence[Soft | None], labels: Sequence[int]) -> Tensor | None:
    """Soft labels ``(B, K)`` of a batch, or None where no sample of it has any.

    In a mixture of data sets some samples have soft labels and others a class alone, which becomes
    a one-hot row here. A sample with neither has a row of zeros.

    Raises:
        ValueError: soft labels of different widths, or a class that they have no place for.
    """
    widths = {len(row) for row in rows if row is not None}
    if not widths:
        return None
    width = widths.pop()
    if widths:
        raise ValueError(
            f"soft labels of {width} and of {widths.pop()} classes are in one mixture: label all "
            "data sets with the same classes"
        )
    stacked = np.zeros((len(rows), width), dtype=np.float32)
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if row is not None and label >= 0:
            stacked[place] = row
        elif row is None and label >= width:
            raise ValueError(
                f"a sample of class {label} is mixed with soft labels of {width} classes: label "
                "all data sets with the same classes"
            )
        elif label >= 0:
            stacked[place, label] = 1.0
    return torch.from_numpy(stacked)
