"""What can be known to fail in any stage before the first is trained, from shapes alone.

Every stage is built on the meta device. A stage that is still to be trained leaves a stand-in: an
export folder without weights, which is enough to build whatever reads it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multikd import preflight
from multikd.backbones import skeleton
from multikd.backbones.weights import load_weights
from multikd.data.module import ShardDataModule
from multikd.export.card import CardFacts
from multikd.export.timm_folder import timm_config
from multikd.fit import build_cli, without_known_noise
from multikd.runs.overrides import get
from multikd.stages.chain import Chain, Stage
from multikd.stages.plan import places_in, stage_config, starts_from
from multikd.students import StudentEncoder
from multikd.types import Widths

log = logging.getLogger(__name__)
# Shapes alone are asked for: neither GPUs nor other processes, and nothing is logged.
_HERE = ("accelerator=cpu", "devices=1", "strategy=auto", "num_nodes=1", "logger=false")


@dataclass(frozen=True)
class StageShape:
    """What a stage will train.

    Attributes:
        student: its architecture.
        parameters: of the encoder.
        widths: of the student's (summary, patches).
        teachers: their names, "" each where the module has none.
        needs: stages that it builds on.
        epochs: to train; None where steps are counted.
        steps: to train, where they are known.
    """

    student: str
    parameters: int
    widths: Widths
    teachers: tuple[str, ...]
    needs: tuple[str, ...]
    epochs: int | None
    steps: int | None

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self)}


def check_chain(chain: Chain, out: Path, data: bool = True) -> dict[str, StageShape]:
    """Build every stage from shapes alone; returns stage → what it will train.

    Args:
        chain: in order.
        out: folder of the chain.
        data: open every stage's shards, too.

    Raises:
        ValueError: the first mistake, with the stage's name, in one sentence.
    """
    shapes: dict[str, StageShape] = {}
    students: dict[str, StudentEncoder] = {}
    with tempfile.TemporaryDirectory(prefix="multikd-chain-") as root:
        places = places_in(chain, Path(root))
        for stage in chain.stages:
            config = stage_config(chain, stage, out, places)
            try:
                _check_files(config, root)
                student, shapes[stage.name] = _build(config, stage, data)
                first = starts_from(chain, stage)
                if first is not None and student is not None:
                    _check_start(first, students[first], student)
                if student is not None:
                    students[stage.name] = student
                    folder = Path(places[stage.name, "export"])
                    _stand_in(folder, student, stage)
            except KeyError as error:
                raise ValueError(
                    f"the stage {stage.name!r} of {chain.path} builds on {error}, which trains no "
                    "single student"
                ) from error
            except (ValueError, ImportError) as error:
                text = str(error).replace(root, str(out))
                raise ValueError(f"the stage {stage.name!r} of {chain.path}: {text}") from error
    return shapes


def _check_files(config: dict[str, Any], root: str) -> None:
    """Exports and weight files that no stage makes must be there already.

    Raises:
        ValueError: one is not.
    """
    for key, value in _strings(config.get("model"), "model"):
        if value.startswith("exported:") and not value.removeprefix("exported:").startswith(root):
            folder = Path(value.removeprefix("exported:"))
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"{key} names the export {str(folder)!r}, which is not there: give a folder "
                    "that `multikd export` wrote, or {stage:NAME} for that of another stage"
                )
        elif (
            key.endswith(".checkpoint") and not value.startswith(root) and not Path(value).exists()
        ):
            raise ValueError(
                f"{key} names {value!r}, which is not there: give a weight file, or "
                "{stage:NAME} for the export of another stage"
            )


def _strings(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        keys = {k: key if k == "init_args" else f"{key}.{k}" for k in value}
        return [found for k, item in value.items() for found in _strings(item, keys[k])]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _strings(item, f"{key}.{i}")]
    return [(key, value)] if isinstance(value, str) else []


def _build(
    config: dict[str, Any], stage: Stage, data: bool
) -> tuple[StudentEncoder | None, StageShape]:
    arguments = [f"--config={json.dumps(config, default=str)}", *(f"--trainer.{a}" for a in _HERE)]
    with without_known_noise(), skeleton(), torch.device("meta"):
        cli = build_cli(arguments, run=False, typed=False)
        module, loader = cli.model, cli.datamodule
        student = getattr(module, "student", None)
        student = student if isinstance(student, StudentEncoder) else None
        if isinstance(loader, ShardDataModule) and student is not None:
            preflight.check_images(module, loader)
    if data and isinstance(loader, ShardDataModule):
        loader.cache = None  # features are computed when its stage begins
        loader.setup("fit")
        loader.teardown("fit")
    epochs, steps = get(config, "trainer.max_epochs"), get(config, "trainer.max_steps")
    steps = None if steps == -1 else steps  # Lightning's way of writing no bound
    shape = StageShape(
        student="several" if student is None else student.spec.name,
        parameters=sum(p.numel() for p in (student or module).parameters()),
        widths=Widths(None, None) if student is None else student.feature_widths,
        teachers=tuple(getattr(module, "teacher_names", ())),
        needs=tuple(dict.fromkeys(name for name, _ in stage.references())),
        epochs=None if steps else epochs,
        steps=steps,
    )
    return student, shape


def _check_start(name: str, before: StudentEncoder, student: StudentEncoder) -> None:
    """A student that begins with another stage's weights must take them.

    Raises:
        ValueError: another architecture or width.
    """
    a, b = before.feature_widths, student.feature_widths
    if a != b:
        raise ValueError(
            f"its student begins with that of the stage {name!r}, whose features are "
            f"{_both(a)} wide and its own {_both(b)}: give it the same architecture, or leave "
            "student.checkpoint out and take that stage as a teacher"
        )
    with torch.device("meta"):
        load_weights(student.export_model(), before.encoder_state_dict(), f"the stage {name!r}")


def _both(widths: Any) -> str:
    summary, patches = widths
    return str(summary) if summary == patches else f"{summary} and {patches}"


def _stand_in(folder: Path, student: StudentEncoder, stage: Stage) -> None:
    """An export folder without weights."""
    keep = stage.export.classifier
    classifier = bool(student.num_classes) if keep is None else keep
    if classifier and not student.num_classes:
        raise ValueError(
            "export.classifier is set, and its student has none: set student.num_classes"
        )
    with torch.device("meta"):
        model = student.export_model(classifier)
        content = timm_config(model, student.spec, CardFacts())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
