"""Task files: typed YAML that says on which data sets which protocols score encoders."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import multikd.evaluation
from multikd.config_errors import condense, subclass_names
from multikd.config_files import read_yaml
from multikd.errors import unknown_name
from multikd.evaluation.task import Task
from multikd.imports import ImportRefusedError, only_allowed
from multikd.retention.datasets import DataSpec
from multikd.shipped import find_tasks

_FORM = "expected the sections data (data sets by name) and tasks (protocols by name)"


@dataclass
class TaskFile:
    """A task file, parsed and built.

    Attributes:
        path: where it was read from.
        data: name → data set.
        tasks: name → protocol with its settings.
        settings: name → what the file says of each task.
    """

    path: Path
    data: dict[str, DataSpec]
    tasks: dict[str, Task]
    settings: dict[str, dict[str, Any]]


def read_task_file(name: str, changes: Sequence[str] = ()) -> TaskFile:
    """A task file by path or shipped name.

    Args:
        name: ``demo`` or a path.
        changes: ``DATASET.SPLIT=SOURCE`` (or any other setting of a data set), in place of what the
            file says.

    Raises:
        ValueError: not found, not readable, or a setting that does not fit, in one sentence.
    """
    path = find_tasks(name)
    _import_protocols()
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) - {"data", "tasks"}:
        extra = sorted(set(content) - {"data", "tasks"}) if isinstance(content, dict) else []
        raise ValueError(f"{path} is no task file: {_FORM}, received {extra or type(content)}")
    data, tasks = content.get("data") or {}, content.get("tasks") or {}
    for section, value in (("data", data), ("tasks", tasks)):
        if not isinstance(value, dict) or not value:
            raise ValueError(f"the section {section!r} of {path} is missing or empty: {_FORM}")
    _apply(data, changes)
    entries = {str(key): _class_entry(path, str(key), task) for key, task in tasks.items()}
    parsed = _parse(path, {"data": data, "tasks": entries})
    _check_names(path, parsed.data, parsed.tasks)
    return TaskFile(
        path,
        dict(parsed.data),
        dict(parsed.tasks),
        {key: dict(entry["init_args"]) for key, entry in entries.items()},
    )


def _import_protocols() -> None:
    """So that a task file can name them without their import path."""
    for module in pkgutil.iter_modules(multikd.evaluation.__path__):
        importlib.import_module(f"multikd.evaluation.{module.name}")


def _apply(data: dict[str, Any], changes: Sequence[str]) -> None:
    for change in changes:
        key, equals, value = change.partition("=")
        name, dot, setting = key.rpartition(".")
        if not equals or not dot or not name or not setting:
            raise ValueError(f"--data takes DATASET.SPLIT=SOURCE, received {change!r}")
        if name not in data:
            raise unknown_name("data set", name, data, "(in the task file)")
        number = int(value) if value.isdigit() else value
        data[name] = {**(data[name] or {}), setting: None if value == "null" else number}


def _class_entry(path: Path, name: str, task: Any) -> dict[str, Any]:
    """``{protocol: KNN, data: x, k: 20}`` as ``{class_path: KNN, init_args: {…}}``."""
    if not isinstance(task, dict) or not ({"protocol", "class_path"} & set(task)):
        known = ", ".join(sorted(subclass_names(Task)))
        raise ValueError(
            f"the task {name!r} of {path} names no protocol: write protocol: NAME and data: SET "
            f"(protocols: {known}, or the import path of your own)"
        )
    if "class_path" in task:
        return {"class_path": task["class_path"], "init_args": dict(task.get("init_args") or {})}
    rest = {key: value for key, value in task.items() if key != "protocol"}
    protocol = str(task["protocol"])
    known_names = subclass_names(Task)
    if "." not in protocol and protocol not in known_names:
        raise unknown_name(f"protocol (task {name!r})", protocol, known_names)
    return {"class_path": protocol, "init_args": rest}


def _parse(path: Path, content: Mapping[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=dict[str, DataSpec])
    parser.add_argument("--tasks", type=dict[str, Task])
    try:
        with only_allowed():
            return parser.instantiate(parser.parse_object(dict(content)))
    except ImportRefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # of jsonargparse, or of a task's constructor
        raise ValueError(f"{path}: {condense(str(error))}") from error


def _check_names(path: Path, data: Mapping[str, DataSpec], tasks: Mapping[str, Task]) -> None:
    for name, task in tasks.items():
        if task.data not in data:
            raise unknown_name("data set", task.data, data, f"(task {name!r} of {path} names it)")
