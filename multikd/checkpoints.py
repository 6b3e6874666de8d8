"""Checkpoints of ``multikd fit``, read back without running anything that is in them."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from multikd import __version__
from multikd.backbones import build_model, check_model_args, skeleton
from multikd.config_files import parse_yaml
from multikd.errors import unknown_name
from multikd.imports import ImportRefusedError, only_allowed
from multikd.students import StudentEncoder

CHECKPOINT_KEY = "multikd"
WeightChoice = Literal["auto", "ema", "raw"]
# What Lightning and we put into a checkpoint, where it is there.
_KINDS: dict[str, type] = {
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "teachers": dict,
    "epoch": int,
    "global_step": int,
}


@dataclass
class TrainedStudent:
    """A student out of a checkpoint, with what an export should say of it.

    Attributes:
        student: in eval mode, with the trained weights.
        config: the run's full typed config, as plain dictionaries.
        teachers: name → encoder, licence, source and fingerprint of each.
        weights: ``ema`` or ``raw``: which were taken.
        epoch: epochs trained.
        step: optimiser steps taken.
        version: of multikd that wrote the checkpoint.
        checkpoint: everything that was in the file.
    """

    student: StudentEncoder
    config: dict[str, Any]
    teachers: dict[str, dict[str, str]]
    weights: str
    epoch: int
    step: int
    version: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict, repr=False)


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """A checkpoint's dictionary, read with ``weights_only=True``.

    Raises:
        ValueError: no such file, not a checkpoint, truncated, or holding arbitrary objects.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, not one file: for a run under ModelParallelStrategy set "
            "trainer.strategy.init_args.save_distributed_checkpoint=false, and otherwise give the "
            ".ckpt file inside"
        )
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: give the .ckpt file of a run")
    try:
        _check_container(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of plain tensors and settings, so it is not "
            "read: give the .ckpt file of a run"
        ) from error
    except Exception as error:  # hostile bytes make zipfile and torch raise nearly anything
        raise ValueError(
            f"{path} is truncated or is no checkpoint ({type(error).__name__}): "
            "give another one of the run"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    for key, kind in _KINDS.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise ValueError(
                f"{path} is damaged, or no checkpoint of a run: its {key!r} is a "
                f"{type(checkpoint[key]).__name__}, not a {kind.__name__}"
            )
    return checkpoint


def _check_container(path: Path) -> None:
    """Refuse what is no plain zip of tensors: torch would unpack a compressed one into memory.

    Raises:
        UnpicklingError: no zip (torch's format since 1.6).
        ValueError, zipfile.BadZipFile: one whose parts are larger than the file.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise UnpicklingError("no zip file")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts are compressed, or larger than the file")


def read_config(checkpoint: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """The typed config that a checkpoint of ours carries, as plain dictionaries.

    Raises:
        ValueError: the checkpoint is not one of ours.
    """
    entry = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), str):
        raise ValueError(
            f"{path} is no checkpoint of multikd (it has no '{CHECKPOINT_KEY}' entry with the "
            "run's config): give one that `multikd fit` wrote"
        )
    config = parse_yaml(entry["config"], f"the config inside {path}")
    sections = ("trainer", "model", "data")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"the config inside {path} can't be read: give another checkpoint")
    for name in sections:
        section = config.get(name, {})
        if not isinstance(section, dict) or not isinstance(section.get("init_args", {}), dict):
            raise ValueError(
                f"the config inside {path} can't be read (its {name} is no mapping): give another "
                "checkpoint"
            )
    return config


def load_student(
    path: Path | str, weights: WeightChoice = "auto", member: str | None = None
) -> TrainedStudent:
    """Build the student that a checkpoint trained; nothing but the file is needed.

    Args:
        path: a checkpoint that ``multikd fit`` wrote.
        weights: the ``ema`` average, the ``raw`` last weights, or ``auto``: the average where the
            run kept one.
        member: of a run that trained several students, the name or index of one; None takes the
            best of its last validation.

    Raises:
        ValueError: not a checkpoint of ours, or the average or student asked for is not in it.
    """
    checkpoint = read_checkpoint(path)
    config = read_config(checkpoint, path)
    settings = config["model"].get("init_args", {})
    state: dict[str, Tensor] = checkpoint.get("state_dict", {})
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} is damaged: its state_dict holds other things than tensors")
    has_average = any(key.startswith("average.student.") for key in state)
    if weights == "ema" and not has_average:
        raise ValueError(
            f"{path} holds no average of the student: the run had no model.ema_decay; "
            "use --weights raw"
        )
    taken = "ema" if has_average and weights != "raw" else "raw"
    prefix = "average.student." if taken == "ema" else "student."
    described = settings.get("student")
    if member is not None or (described is None and isinstance(settings.get("students"), dict)):
        chosen, described = _member(path, settings.get("students"), member, state)
        prefix = f"students.{chosen}."
    version = str(checkpoint[CHECKPOINT_KEY].get("version", "unknown"))
    own = {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}
    try:
        # Without memory first: a stranger's config may ask for more than there is.
        if not isinstance(described, dict):
            raise ValueError("its config describes no student")
        _check_size(described, own)
        student = build_student(described)
        student.load_state_dict(own)
    except ImportRefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        # jsonargparse, timm and torch each have errors of their own for what does not fit.
        reason = " ".join(str(error).split())[:160]
        if version == __version__:
            raise ValueError(
                f"the student in {path} can't be built again ({reason}): export in the "
                "environment that trained it"
            ) from error
        raise ValueError(
            f"{path} was written by multikd {version} and does not fit this version, "
            f"{__version__} ({reason}): pip install 'multikd=={version}', or train again"
        ) from error
    student.eval()
    return TrainedStudent(
        student=student,
        config=config,
        teachers=checkpoint.get("teachers", {}),
        weights=taken,
        epoch=epochs_trained(checkpoint),
        step=int(checkpoint.get("global_step", 0)),
        version=version,
        checkpoint=checkpoint,
    )


def _member(
    path: Path | str, students: Any, member: str | None, state: dict[str, Tensor]
) -> tuple[str, Any]:
    """Name and settings of one of several students.

    Raises:
        ValueError: the run trained one student only, or has none of this name.
    """
    if not isinstance(students, dict) or not students:
        raise ValueError(f"{path} holds one student only: leave --student out")
    names = [str(name) for name in students]
    if member is None:
        best = int(state["best"]) if "best" in state and state["best"].numel() == 1 else 0
        member = names[best] if 0 <= best < len(names) else names[0]
    elif member not in names:
        if not member.isdecimal() or int(member) >= len(names):
            raise unknown_name("student", member, names, f"(or an index, 0 to {len(names) - 1})")
        member = names[int(member)]
    return member, students[member]


def epochs_trained(checkpoint: dict[str, Any]) -> int:
    """How many epochs are complete in a checkpoint, at whatever moment it was written.

    Lightning's own ``epoch`` is that of the epoch under way while its hooks run, and one more after
    them.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    try:
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        validating = epochs["started"] > epochs["processed"] and batches["is_last_batch"]
        return int(epochs["processed"]) + int(validating)
    except (KeyError, TypeError, ValueError):  # weights only, or another version's
        return int(checkpoint.get("epoch", 0)) + 1


def _check_size(settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Refuse a student that its weights would not nearly fill, before memory is taken for it.

    Raises:
        ValueError: it has more blocks than there are tensors, or far more numbers.
    """
    given = settings.get("init_args", {})
    arguments = given.get("model_args")
    check_model_args(arguments, len(weights))
    check_model_args({"image_size": given.get("image_size")}, len(weights))
    if not isinstance(given.get("name"), str):
        return  # a class of a user's own
    sizes = {key: given.get(key) for key in ("image_size", "patch_size")}
    with torch.device("meta"), skeleton():
        model = build_model(given["name"], model_args=arguments, **sizes)
    needs = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    has = sum(t.numel() for t in weights.values())
    if needs > 4 * has + (1 << 24):  # a classifier may be gone, buffers are computed
        raise ValueError(f"it describes {needs} numbers and has weights for {has}")


def build_student(settings: dict[str, Any]) -> StudentEncoder:
    """A student from its typed config, without loading pretrained weights (they are replaced)."""
    init_args = {**settings.get("init_args", {}), "pretrained": False, "checkpoint": None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(StudentEncoder, "student")
    with only_allowed():
        parsed = parser.parse_object(
            {"student": {"class_path": settings["class_path"], "init_args": init_args}}
        )
        student: StudentEncoder = parser.instantiate(parsed).student
    return student
