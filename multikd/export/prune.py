"""Structured pruning of a student through torch-pruning, to be distilled a little further.

Pruning removes whole channels of the layers inside, so that the model is really smaller and faster
everywhere. timm cannot rebuild such a shape from its arguments: the pruned student lives on as a
``PrunedStudent`` (for `fit`) and leaves as ONNX or ``.pt2``, not as a timm folder.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multikd.backbones import dry_run, plan_rungs, spec_from_model
from multikd.errors import MissingExtraError
from multikd.export.graphs import quiet
from multikd.export.staging import first_line, staged_folder
from multikd.students import StudentEncoder

log = logging.getLogger(__name__)

_PLAN, _WEIGHTS = "pruning.json", "model.safetensors"
# Widths that are multiples of it run at full speed.
_ROUND_TO = 8
History = list[tuple[str, bool, list[int]]]


@dataclass(frozen=True)
class PruneReport:
    """What was cut: parameters and multiply-adds of one image, before and after."""

    path: Path
    ratio: float
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    groups: int

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"path": str(self.path)}

    def text(self) -> str:
        """One line for a terminal."""
        before, after = self.parameters
        saved = 1 - self.multiply_adds[1] / self.multiply_adds[0]
        return (
            f"pruned: {self.path}, {after / 1e6:.2f} of {before / 1e6:.2f} M parameters, "
            f"{100 * saved:.0f} % fewer multiply-adds; distil it further before use"
        )


def require_torch_pruning() -> None:
    """Raise unless torch-pruning is there.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("torch_pruning") is None:
        raise MissingExtraError("torch-pruning", "prune", "structured pruning")


class _WithHead(nn.Module):
    """A model under a head that shows which channels are the features' own."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.head(self.model(images))
        return answer


def prune_student(
    student: StudentEncoder, out: Path, *, ratio: float = 0.3, overwrite: bool = False
) -> PruneReport:
    """Cut the weakest channels inside a student; the features keep their width.

    Channel groups (all layers that share a channel) are ranked by the L2 norm of their weights.
    Left alone: groups that reach the features (of a ViT that is the residual stream, so its MLPs
    are cut) and attention, whose heads must stay equal.

    Args:
        student: not changed.
        out: folder to make: the plan and the pruned weights.
        ratio: share of the channels of each group to cut.
        overwrite: replace an earlier one.

    Raises:
        ValueError: ratio out of range, nothing to cut, a family torch-pruning can't follow, or
            ``out`` exists.
        MissingExtraError: the extra ``prune`` is not installed.
        OSError: it can't be written.
    """
    require_torch_pruning()
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie strictly between 0 and 1, received {ratio}")
    if student.num_classes:
        raise ValueError(
            "pruning needs a student without a classifier: export it without, prune, train anew"
        )
    name, size = student.spec.name, student.spec.image_size
    model = student.export_model().cpu().float()
    images = torch.zeros(1, 3, *size)
    before = _cost(model, images)
    with torch.inference_mode():
        shape = model(images).shape
    try:
        history = _prune(model, images, shape[-1], ratio)
        with torch.inference_mode():
            pruned_shape = model(images).shape
    except Exception as error:  # torch-pruning asserts, indexes and divides
        raise ValueError(
            f"torch-pruning cannot follow {name} ({first_line(error)}): quantise it instead"
        ) from error
    if not history:
        raise ValueError(f"{name} has no channels to cut at a ratio of {ratio}: raise it")
    if pruned_shape != shape:
        raise ValueError(f"torch-pruning changed the features of {name}: quantise it instead")
    report = PruneReport(
        Path(out),
        ratio,
        (before[0], _cost(model, images)[0]),
        (before[1], _cost(model, images)[1]),
        len(history),
    )
    with staged_folder(Path(out), overwrite, _PLAN) as folder:
        plan = {"architecture": name, "image_size": list(size), "history": history}
        (folder / _PLAN).write_text(json.dumps(plan | {"report": report.as_dict()}) + "\n")
        state = {key: t.detach().contiguous().clone() for key, t in model.state_dict().items()}
        try:
            save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        except Exception as error:  # safetensors has its own exception for a full disk
            raise OSError(f"{out} could not be written ({first_line(error)})") from error
        restored = PrunedStudent.like(student, folder).eval()
        with torch.inference_mode():
            images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
            if not torch.equal(restored.model(images), model(images)):
                raise ValueError(f"the pruned {name} is not rebuilt from its plan: report this")
    return report


def _cost(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image (as torch-pruning counts them)."""
    import torch_pruning as tp

    with quiet():
        operations, _ = tp.utils.count_ops_and_params(model, images)
    return sum(p.numel() for p in model.parameters()), int(operations)


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """Every projection inside an attention: modules that know a number of heads."""
    found: list[nn.Module] = []
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int):
            found += [m for m in module.children() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return found


def _prune(model: nn.Module, images: Tensor, width: int, ratio: float) -> History:
    """Prune in place; returns what was cut, in order."""
    import torch_pruning as tp

    headed = _WithHead(model, width)
    ignored: list[nn.Module] = [headed.head, *_attention_layers(model)]
    fixed = set(ignored)
    with quiet():
        graph = tp.DependencyGraph().build_dependency(headed, images)
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            members = {dependency.target.module for dependency, _ in group}
            if members & fixed:
                ignored.append(group[0].dep.target.module)
        pruner = tp.pruner.BasePruner(
            headed,
            images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            round_to=_ROUND_TO,
        )
        pruner.step()
    return [
        (str(name), bool(out), [int(i) for i in indices])
        for name, out, indices in pruner.DG.pruning_history()
    ]


def _replay(model: nn.Module, images: Tensor, width: int, history: History) -> None:
    """Cut the same channels of a model of the original shape."""
    import torch_pruning as tp

    headed = _WithHead(model, width)
    with quiet():
        graph = tp.DependencyGraph().build_dependency(headed, images)
        graph.load_pruning_history([tuple(entry) for entry in history])


class PrunedStudent(StudentEncoder):
    """A student of the shape and with the weights that :func:`prune_student` left.

    For `fit`: ``student: {class_path: multikd.export.prune.PrunedStudent, init_args: {name: …,
    image_size: …, pruning: FOLDER}}``. The folder must stay: a checkpoint holds weights only.

    Args:
        name: of the original architecture.
        pruning: folder that ``prune_student`` wrote.
        **settings: those of :class:`~multikd.students.StudentEncoder` (jsonargparse reads them
            there); as in the original, but ``pretrained`` and ``checkpoint``, which the folder
            replaces.

    Raises:
        ValueError: no such folder, or one of another architecture.
        MissingExtraError: the extra ``prune`` is not installed.
    """

    def __init__(self, name: str, pruning: str, **settings: Any) -> None:
        require_torch_pruning()
        super().__init__(name, **settings)
        folder = Path(pruning)
        try:
            plan = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
            weights = load_file(folder / _WEIGHTS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{pruning} is no pruned student ({first_line(error)}): give the folder that "
                "pruning wrote"
            ) from error
        if plan["architecture"] != name:
            raise ValueError(f"{pruning} holds a pruned {plan['architecture']}, expected {name}")
        size = self.spec.image_size
        width = self.feature_widths.summary
        if width is None or self.num_classes:
            raise ValueError("a pruned student has a summary and no classifier")
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        images = torch.zeros(1, 3, *size, device=device)
        _replay(self.model, images, width, plan["history"])
        self.model.train(training)
        self.model.load_state_dict(weights)
        self._measure(name, settings)

    def _measure(self, name: str, settings: dict[str, Any]) -> None:
        """Widths of the rungs as they are now."""
        size = self.spec.image_size
        self.plan = plan_rungs(self.model, settings.get("rungs", "all"), size, name)
        seen, final = dry_run(self.model, size, self._run, name)
        self.spec = spec_from_model(
            self.model,
            final,
            size,
            name=name,
            mean=self.spec.mean,
            std=self.spec.std,
            source="pruned",
        )
        self.widths = tuple(rung.widths for rung in seen)
        self.feature_widths = final.widths
        self._grids = {}

    @classmethod
    def like(cls, student: StudentEncoder, folder: Path) -> PrunedStudent:
        """The pruned form of a student, with that student's size and normalisation."""
        config = getattr(student.model, "_model_args", None) or {}
        patch = config.get("patch_size")
        return cls(
            student.spec.name,
            str(folder),
            image_size=student.spec.image_size[0],
            patch_size=patch if isinstance(patch, int) else None,
            mean=student.spec.mean,
            std=student.spec.std,
            global_pool=config.get("global_pool"),
        )
