"""One evaluation: open, check, extract once, score every task on every encoder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multikd.evaluation.task import NotApplicable, Task, TaskResult
from multikd.retention.cells import KeptResult
from multikd.retention.datasets import EvalDataset, open_data
from multikd.retention.encoders import Column, OpenOptions, open_encoders
from multikd.retention.extract import ExtractOptions, extract, plan
from multikd.retention.subject import EncoderSubject, size_for
from multikd.retention.taskfile import TaskFile, read_task_file
from multikd.types import Grid, TokenType

log = logging.getLogger(__name__)


@dataclass
class Cell:
    """One task on one encoder.

    Attributes:
        task: name.
        encoder: name.
        result: None where the task does not apply, or failed.
        error: why it failed.
        seconds: of scoring.
        kept: whether it was computed by an earlier run.
    """

    task: str
    encoder: str
    result: TaskResult | None
    error: str | None = None
    seconds: float = 0.0
    kept: bool = False


@dataclass
class Evaluation:
    """Everything that was measured.

    Attributes:
        columns: the encoders, in the order they were named.
        tasks: the task file.
        data: its data sets, opened.
        subjects: (encoder, data set) → subject.
        cells: tasks × encoders.
        costs: encoder → what it costs, where that was measured.
        faults: data set/split → keys of images that could not be read.
        extracted: images × encoders run (0: everything was cached).
        seconds: of opening, extracting, scoring.
    """

    columns: list[Column]
    tasks: TaskFile
    data: dict[str, EvalDataset]
    subjects: dict[tuple[str, str], EncoderSubject]
    cells: list[Cell] = field(default_factory=list)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    extracted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(
    encoders: Sequence[str],
    tasks: str,
    changes: Sequence[str],
    opening: OpenOptions,
    options: ExtractOptions,
    progress: bool = True,
) -> Evaluation:
    """Open encoders and data and check every task against them; nothing is extracted.

    Raises:
        ValueError: the first mistake, in one sentence.
    """
    begun = time.perf_counter()
    file = read_task_file(tasks, changes)
    columns = open_encoders(encoders, opening)
    used = {task.data for task in file.tasks.values()}
    data = {name: open_data(name, spec) for name, spec in file.data.items() if name in used}
    subjects = {
        (column.name, name): EncoderSubject(column, opened, options, progress)
        for column in columns
        for name, opened in data.items()
    }
    found = Evaluation(columns, file, data, subjects)
    _check_sizes(columns, data)
    for name, task in file.tasks.items():
        specs = {column.name: subjects[column.name, task.data].spec for column in columns}
        try:
            task.check(data[task.data].splits, specs)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from error
        if task.compares:
            task.teachers = _teachers(found, task.data)
            if not task.teachers:
                raise ValueError(
                    f"task {name!r}: {type(task).__name__} compares with teachers, and there are "
                    "none: pass --with-teachers with a checkpoint, or leave the task out"
                )
        if not any(task.applies(subjects[column.name, task.data]) for column in columns):
            raise ValueError(
                f"task {name!r}: {type(task).__name__} applies to none of the encoders "
                f"({', '.join(specs)}): leave the task out, or add an encoder that it is for"
            )
    found.seconds["opening"] = time.perf_counter() - begun
    return found


def extract_all(found: Evaluation, options: ExtractOptions, progress: bool = True) -> bool:
    """Every feature that the tasks say they need; returns whether this process goes on (rank 0)."""
    begun = time.perf_counter()
    works = plan(_requests(found), options)
    found.extracted = sum(work.images for work in works)
    first = extract(works, options, progress)
    found.seconds["extracting"] = time.perf_counter() - begun
    return first


def score_all(found: Evaluation, device: str, progress: bool = True) -> None:
    """Every task on every encoder that it applies to; a failure costs its cell alone."""
    begun = time.perf_counter()
    _note_faults(found)
    tasks = found.tasks.tasks
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} cells"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        shown = bar.add_task("scoring", total=len(tasks) * len(found.columns))
        for name, task in tasks.items():
            for column in found.columns:
                bar.update(shown, description=f"{name} · {column.name}")
                found.cells.append(_score(found, name, task, column, device))
                bar.advance(shown)
        bar.update(shown, description="scored")
    found.seconds["scoring"] = time.perf_counter() - begun


def _score(found: Evaluation, name: str, task: Task, column: Column, device: str) -> Cell:
    subject = found.subjects[column.name, task.data]
    begun = time.perf_counter()
    cell = Cell(name, column.name, None)
    column.network.to(device)
    try:
        if task.applies(subject):
            kept = KeptResult(task, subject, device)
            cell.result = kept.read()
            cell.kept = cell.result is not None
            if cell.result is None:
                cell.result = task.score(subject)
                kept.write(cell.result)
    except NotApplicable as reason:
        log.info("%s · %s: %s", name, column.name, reason)
    except (ValueError, ImportError, OSError) as error:
        cell.error = " ".join(str(error).split())
        log.warning("%s · %s failed: %s", name, column.name, cell.error)
    finally:
        column.network.cpu()
    cell.seconds = time.perf_counter() - begun
    if cell.kept and cell.result is not None:
        cell.seconds = cell.result.seconds
    return cell


def _teachers(found: Evaluation, data: str) -> Mapping[str, EncoderSubject]:
    return {
        column.name: found.subjects[column.name, data]
        for column in found.columns
        if column.role == "teacher"
    }


def _requests(
    found: Evaluation,
) -> list[tuple[Column, EvalDataset, str, TokenType, Grid]]:
    """What the tasks ask for, each thing once."""
    asked: dict[tuple[str, str, str, TokenType, Grid], tuple[Column, EvalDataset]] = {}
    for task in found.tasks.tasks.values():
        data = found.data[task.data]
        for column in found.columns:
            compared = task.compares and column.role == "teacher"
            if not compared and not task.applies(found.subjects[column.name, task.data]):
                continue
            for request in task.requests(found.subjects[column.name, task.data].spec):
                if request.split not in data.splits:
                    continue
                size = request.size or size_for(column, data)
                for token in request.tokens:
                    asked[column.name, data.name, request.split, token, size] = (column, data)
    return [
        (column, data, split, token, size)
        for (_, _, split, token, size), (column, data) in asked.items()
    ]


def _check_sizes(columns: Sequence[Column], data: Mapping[str, EvalDataset]) -> None:
    for opened in data.values():
        if opened.spec.size is None:
            continue
        size = (opened.spec.size, opened.spec.size)
        for column in columns:
            spec = column.spec
            if spec.fixed_size and spec.image_size != size:
                raise ValueError(
                    f"{column.name} takes images of {spec.image_size[0]} px only, and the data set "
                    f"{opened.name!r} asks for {size[0]}: leave size out of the task file, so that "
                    "every encoder sees its own size"
                )
            try:
                column.network.check_size(size)
            except (ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:160]
                raise ValueError(
                    f"{column.name} can't take images of {size[0]} px, which the data set "
                    f"{opened.name!r} asks for ({reason}): choose another size in the task file"
                ) from error


def _note_faults(found: Evaluation) -> None:
    """Read what could not be decoded out of the stores, so that every subject leaves it out."""
    for (_, _, split, token, size), (column, data) in _asked(found).items():
        subject = found.subjects[column.name, data.name]
        keys = subject.note_faults(split, token, size)
        if keys:
            found.faults[f"{data.name}/{split}"] = keys


def _asked(found: Evaluation) -> dict[Any, tuple[Column, EvalDataset]]:
    return {
        (column.name, data.name, split, token, size): (column, data)
        for column, data, split, token, size in _requests(found)
    }
