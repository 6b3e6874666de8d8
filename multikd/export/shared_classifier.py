"""What a student of adaptive teaching is deployed with: written beside its timm folder, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.checkpoints import TrainedStudent
from multikd.export import standalone, standalone_classifier
from multikd.export.heads import MODULE as HEADS_MODULE
from multikd.projectors import BottleneckProjector, to_map
from multikd.types import Grid

KEY = "shared_classifier"  # of a checkpoint, as AdaptiveModule writes it
MODULE = "student_classifier.py"
TOLERANCE = 1e-4


def has_classifier(trained: TrainedStudent) -> bool:
    """Whether the checkpoint is one of adaptive teaching."""
    return isinstance(trained.checkpoint.get(KEY), dict)


def write_classifier(folder: Path, trained: TrainedStudent) -> dict[str, Any]:
    """Write ``classifier.safetensors``, ``classifier.json`` and ``student_classifier.py``.

    The folder must hold the student's timm files already. What was written is loaded by its own
    module and its logits compared with those of the checkpoint's projectors and classifiers.

    Returns:
        ``{"teachers": names, "classes": K, "error": largest, relative to the largest logit}``.

    Raises:
        ValueError: a checkpoint whose parts do not fit one another, or logits that differ.
    """
    layouts: Mapping[str, Any] = trained.checkpoint[KEY]
    state: dict[str, Tensor] = trained.checkpoint["state_dict"]
    student = trained.student
    weights: dict[str, Tensor] = {}
    branches: list[tuple[nn.Module, nn.Linear, Grid | None]] = []
    for name, layout in layouts.items():
        projector, classifier = _parts(name, layout, state)
        own = {"projector": projector.state_dict(), "classifier": classifier.state_dict()}
        for part, tensors in own.items():
            weights |= {f"teachers.{name}.{part}.{k}": v for k, v in tensors.items()}
        grid = layout["grid"]
        branches.append((projector, classifier, None if grid is None else (grid[0], grid[1])))
    about = {"format": 1, "image_size": list(student.spec.image_size), "teachers": dict(layouts)}
    plain = {k: v.detach().contiguous().clone() for k, v in weights.items()}
    save_file(plain, folder / standalone_classifier.WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(about, indent=2) + "\n"
    (folder / standalone_classifier.CONFIG).write_text(text, encoding="utf-8")
    for source, name in ((standalone, HEADS_MODULE), (standalone_classifier, MODULE)):
        content = Path(str(source.__file__)).read_text(encoding="utf-8")
        (folder / name).write_text(content, encoding="utf-8")
    error = _error(folder, trained, branches)
    if not error <= TOLERANCE:
        raise ValueError(
            f"the exported classifier differs by {error:.1e} from the trained one (limit "
            f"{TOLERANCE:.0e}): report this with the run's config"
        )
    classes = next(iter(layouts.values()))["classes"]
    return {"teachers": list(layouts), "classes": classes, "error": error}


def _parts(
    name: str, layout: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[BottleneckProjector, nn.Linear]:
    """Projector and classifier of one teacher, in eval mode and float32."""
    try:
        factor = layout["target"] / layout["hidden"]
        sizes = (layout["width"], layout["target"], factor)
        projector = BottleneckProjector(*sizes, layout["norm"], layout["rectified"])
        classifier = nn.Linear(layout["target"], layout["classes"])
        projector.load_state_dict(_under(state, f"projectors.{name}."))
        classifier.load_state_dict(_under(state, f"trained_teachers.{name}.classifier."))
    except (KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the projector of teacher {name!r} does not fit the checkpoint "
            f"({' '.join(str(error).split())[:160]}): export with the version that trained it"
        ) from error
    return projector.eval().float(), classifier.eval().float()


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@torch.no_grad()
def _error(
    folder: Path,
    trained: TrainedStudent,
    branches: list[tuple[nn.Module, nn.Linear, Grid | None]],
) -> float:
    size = trained.student.spec.image_size
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    features = trained.student.eval()(images).features
    rows = [
        classifier(projector(to_map(features, grid)).mean(dim=(2, 3))).softmax(dim=-1)
        for projector, classifier, grid in branches
    ]
    expected = torch.stack(rows).mean(dim=0).log()
    received = standalone_classifier.load(folder)(images).log_softmax(dim=-1)
    return float((received - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
