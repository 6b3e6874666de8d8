"""Fixed statistics of teachers in a safetensors file: what ``multikd teachers stats`` measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from multikd.errors import unknown_name
from multikd.files import write_atomically
from multikd.types import TOKEN_TYPES, TokenType, Widths

_FORMAT = "multikd.teacher-statistics/1"


class Statistics(NamedTuple):
    """Of one token type: observations, mean ``(D,)``, covariance ``(D, D)`` (unbiased), float64."""

    n: int
    mean: Tensor
    covariance: Tensor


def write_statistics(
    path: str | Path,
    teachers: Mapping[str, Mapping[TokenType, Statistics]],
    about: Mapping[str, Any],
) -> None:
    """Write statistics by teacher and token type, and ``about`` (plain values) as metadata."""
    tensors: dict[str, Tensor] = {}
    for name, tokens in teachers.items():
        for token, of in tokens.items():
            tensors[f"{name}.{token}.count"] = torch.tensor(of.n, dtype=torch.int64)
            tensors[f"{name}.{token}.mean"] = of.mean.double().cpu().contiguous()
            tensors[f"{name}.{token}.covariance"] = of.covariance.double().cpu().contiguous()
    metadata = {"format": _FORMAT, "about": json.dumps(dict(about), default=str)}
    write_atomically(Path(path), save(tensors, metadata))


def read_statistics(path: str | Path, teacher: str, widths: Widths) -> dict[TokenType, Statistics]:
    """Statistics of one teacher, for every token type that it has.

    Raises:
        ValueError: no such file, another kind of file, or one that lacks this teacher or is of
            other widths.
    """
    remedy = "measure it with `multikd teachers stats`"
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path} holds no statistics of teachers: {remedy}")
            keys = set(file.keys())
            names = sorted({key.rpartition(".")[0].rpartition(".")[0] for key in keys})
            if teacher not in names:
                raise unknown_name(
                    f"teacher in {path}", teacher, names, f"(statistics are by name: {remedy})"
                )
            found: dict[TokenType, Statistics] = {}
            for token in TOKEN_TYPES:
                width = getattr(widths, token)
                if width is None:
                    continue
                prefix = f"{teacher}.{token}"
                if f"{prefix}.mean" not in keys:
                    raise ValueError(f"{path} has no {token} of teacher {teacher!r}: {remedy}")
                mean = file.get_tensor(f"{prefix}.mean")
                if len(mean) != width:
                    raise ValueError(
                        f"{path}: the {token} of teacher {teacher!r} are {len(mean)} wide and the "
                        f"teacher gives {width}: {remedy} for this teacher"
                    )
                of = Statistics(
                    int(file.get_tensor(f"{prefix}.count")),
                    mean,
                    file.get_tensor(f"{prefix}.covariance"),
                )
                finite = bool(torch.isfinite(of.mean).all() & torch.isfinite(of.covariance).all())
                if of.n < 2 or of.covariance.shape != (width, width) or not finite:
                    raise ValueError(
                        f"{path}: the {token} of teacher {teacher!r} are of {of.n} observations, "
                        f"or not finite, or no covariance of {width} dimensions: {remedy}"
                    )
                found[token] = of
            return found
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as statistics ({error}): {remedy}") from error
