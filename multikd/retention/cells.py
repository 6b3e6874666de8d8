"""Results of tasks, kept beside the features: the same question is not computed a second time.

A result is found again by everything that decides it: weights, images, labels, metadata, the task's
settings and the code of ``multikd.evaluation``. What is not known to that extent (a task of the
user's, dense targets, comparisons with other encoders, texts) is computed each time.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
import torch

import multikd.evaluation
from multikd.evaluation.task import Task, TaskResult
from multikd.files import write_atomically
from multikd.retention.digest import combined
from multikd.retention.results import jsonable
from multikd.retention.subject import EncoderSubject

_ROOM = "multikd.evaluation."
Statistic = Callable[[npt.NDArray[np.float64]], float]


class KeptResult:
    """The place of one task's result for one subject; none where it may not be kept.

    Args:
        task: of ``multikd.evaluation``.
        subject: the encoder before the data set, unreadable images left out.
        device: where the task runs.
    """

    def __init__(self, task: Task, subject: EncoderSubject, device: str) -> None:
        key = _key(task, subject, device)
        self.path: Path | None = None
        if key is not None:
            self.path = subject.options.cache / "cells" / key[:2] / f"{key[2:34]}.json"

    def read(self) -> TaskResult | None:
        """What was computed before; None where it was not, or is damaged."""
        if self.path is None:
            return None
        try:
            entry = json.loads(self.path.read_text(encoding="utf-8"))
            rows = None
            if entry["rows"]:
                data = self.path.with_suffix(".npy").read_bytes()
                if hashlib.sha256(data).hexdigest() != entry["rows"]:
                    return None
                rows = np.load(io.BytesIO(data), allow_pickle=False)
            statistic = _statistic(entry["statistic"])
            return TaskResult(
                float(entry["value"]),
                rows,
                statistic,
                entry["metrics"],
                entry["details"],
                float(entry["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
            return None

    def write(self, result: TaskResult) -> None:
        """Keep a result, rows first."""
        name = _name(result.statistic)
        if self.path is None or name is None or not np.isfinite(result.value):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ""
        if result.per_sample is not None:
            buffer = io.BytesIO()
            np.save(buffer, result.per_sample, allow_pickle=False)
            rows = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_atomically(self.path.with_suffix(".npy"), buffer.getvalue())
        entry = {
            "value": float(result.value),
            "rows": rows,
            "statistic": name,
            "metrics": jsonable(result.metrics),
            "details": jsonable(result.details),
            "seconds": result.seconds,
        }
        write_atomically(self.path, json.dumps(entry).encode())


def _key(task: Task, subject: EncoderSubject, device: str) -> str | None:
    kind = type(task)
    splits = subject.splits.values()
    if (
        not kind.__module__.startswith(_ROOM)
        or task.compares
        or subject.column.text is not None
        or any(split.dense for split in splits)
    ):
        return None
    return combined(
        code=_code(),
        device=device,
        task=kind.__qualname__,
        settings=sorted((k, repr(v)) for k, v in vars(task).items() if k != "teachers"),
        encoder=subject.fingerprint,
        size=subject.size,
        patches=subject.options.patch_dtype,
        data=[
            (
                split.name,
                split.fingerprint(),
                None if split.labels is None else _digest(split.labels.numpy()),
                split.classes and tuple(split.classes),
                sorted((k, tuple(v)) for k, v in split.metadata.items()),
            )
            for split in splits
        ],
    )


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


@cache
def _code() -> str:
    """Of the protocols' files and the libraries that do their sums."""
    digest = hashlib.sha256(f"{torch.__version__}|{sklearn.__version__}|{np.__version__}".encode())
    for folder in multikd.evaluation.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(statistic: Statistic | None) -> str | None:
    """Import path of a function of the room, ``""`` for none; None where it has no such path."""
    if statistic is None:
        return ""
    module = str(getattr(statistic, "__module__", ""))
    path = f"{module}.{getattr(statistic, '__qualname__', '')}"
    try:
        return path if _statistic(path) is statistic else None
    except (ValueError, AttributeError, ImportError):
        return None


def _statistic(path: str) -> Statistic | None:
    if not path:
        return None
    module, _, name = path.rpartition(".")
    if not path.startswith(_ROOM) or not name.isidentifier():
        raise ValueError(f"{path} is no statistic of a task")
    found: Statistic = getattr(importlib.import_module(module), name)
    return found
