"""A student with its teachers' classifiers: projector and shared classifier, as they are deployed.

Adaptive teaching (ATSC, arXiv 2406.08528) leaves a student whose feature map a small convolutional
projector brings into its teacher's space, where the teacher's own classifier reads it; of several
teachers the probabilities are averaged. timm alone holds the encoder of this folder; this file adds
the rest. It imports torch, timm and safetensors, and ``student_heads.py`` beside it. Weights are
read from safetensors; nothing is unpickled.

    import student_classifier
    model = student_classifier.load()                # the folder of this file
    images = model.student.preprocess(pil_image)     # (1, 3, H, W) in [0, 1]
    logits = model(images)                           # (1, K)

Shapes: B images, K classes, D width.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

CONFIG, WEIGHTS = "classifier.json", "classifier.safetensors"
_LARGEST = 1 << 24  # bytes of the description
_WIDEST = 1 << 16  # channels, classes, sides of a grid


def load(folder: str | Path | None = None) -> Classifier:
    """The classifier of an exported folder (default: the one that holds this file), in eval mode.

    Raises:
        ValueError: not such a folder, or files that do not fit one another.
    """
    place = Path(__file__).parent if folder is None else Path(folder)
    for name in (CONFIG, WEIGHTS):
        path = place / name
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{place} is no export with a shared classifier: it has no {name}")
    if (place / CONFIG).stat().st_size > _LARGEST:
        raise ValueError(f"{CONFIG} is larger than it can be")
    about = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(about, dict) or not isinstance(about.get("teachers"), dict):
        raise ValueError(f"{CONFIG} describes no teachers")
    student = _beside().load(place)
    with torch.device("meta"):  # without memory: a stranger's files may promise more than they hold
        wanted = {k: tuple(v.shape) for k, v in Branches(about).state_dict().items()}
    with safe_open(place / WEIGHTS, framework="pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if held != wanted:
        raise ValueError(f"{WEIGHTS} does not hold what {CONFIG} describes: export it again")
    branches = Branches(about)
    branches.load_state_dict(load_file(place / WEIGHTS))
    return Classifier(student, branches).eval()


def _beside() -> Any:
    """The module that reads the encoder: ``student_heads.py`` in an export."""
    for name in ("student_heads.py", "standalone.py"):
        path = Path(__file__).with_name(name)
        spec = importlib.util.spec_from_file_location("student_heads", path)
        if path.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ValueError("student_heads.py is missing beside student_classifier.py: export it again")


class Classifier(nn.Module):
    """``images (B, 3, H, W)`` in [0, 1] → ``logits (B, K)``.

    Attributes:
        student: the encoder, with its preprocessing.
        branches: a projector and a classifier for each teacher.
    """

    def __init__(self, student: nn.Module, branches: Branches) -> None:
        super().__init__()
        self.student = student
        self.branches = branches

    def forward(self, images: Tensor) -> Tensor:
        """Logits whose softmax is the mean of the branches' probabilities."""
        features = self.student.encode(images)  # type: ignore[operator]
        if features.patches is None or features.grid is None:
            raise ValueError("the encoder gives no feature map")
        found = features.patches.transpose(1, 2).reshape(len(images), -1, *features.grid)
        return self.branches(found, (images.shape[2], images.shape[3]))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Projector and classifier of each teacher, as ``classifier.json`` lists them."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        self.size = (_count(about["image_size"][0]), _count(about["image_size"][1]))
        self.teachers = nn.ModuleDict({n: _Branch(one) for n, one in about["teachers"].items()})

    def forward(self, found: Tensor, size: tuple[int, int]) -> Tensor:
        """``found``: the map ``(B, D, h, w)`` of images of ``size``."""
        rows = [branch(found, size, self.size) for branch in self.teachers.values()]
        if len(rows) == 1:
            return rows[0]  # type: ignore[no-any-return]
        logs = torch.stack([functional.log_softmax(row, dim=-1) for row in rows])
        return torch.logsumexp(logs, dim=0) - math.log(len(rows))


class _Branch(nn.Module):
    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        width, hidden, target = (_count(about[key]) for key in ("width", "hidden", "target"))
        self.grid = None if about["grid"] is None else tuple(_count(n) for n in about["grid"])
        self.fixed = bool(about["fixed_grid"])
        # Pixels of a place of the grid; exports before it was noted have none.
        self.stride = None if about.get("stride") is None else _count(about["stride"])

        def norm(channels: int) -> nn.Module:
            group = about["norm"] == "group"
            return nn.GroupNorm(1, channels) if group else nn.BatchNorm2d(channels)

        layers: list[nn.Module] = [
            *(nn.Conv2d(width, hidden, 1, bias=False), norm(hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), norm(hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, target, 1, bias=False), norm(target)),
        ]
        self.projector = nn.Sequential(*layers, *([nn.ReLU()] if about["rectified"] else []))
        self.classifier = nn.Linear(target, _count(about["classes"]))

    def forward(self, found: Tensor, size: tuple[int, int], own: tuple[int, int]) -> Tensor:
        """``found``: the map of images of ``size``; the grid was noted for images of ``own``."""
        h, w = found.shape[2:]
        if self.grid is not None:
            most = [self._places(*of) for of in zip(self.grid, size, own, strict=True)]
            if h > most[0] or w > most[1]:
                found = functional.adaptive_avg_pool2d(found, (min(h, most[0]), min(w, most[1])))
        return self.classifier(self.projector(found).mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def _places(self, places: int, side: int, own: int) -> int:
        """Places of the teacher's grid along a side of ``side`` pixels."""
        if self.fixed or side == own:
            return places
        if self.stride is not None and -(-own // self.stride) == places:
            return -(-side // self.stride)  # convolutions round up
        return max(1, round(places * side / own))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _WIDEST:
        raise ValueError(f"{CONFIG} gives {str(value)[:40]} where a size belongs")
    return value
