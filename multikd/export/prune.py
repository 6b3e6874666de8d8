"""Structured pruning of a student through torch-pruning, to be distilled a little further.

Pruning removes whole channels of the layers inside, so that the model is really smaller and faster
everywhere. timm cannot rebuild such a shape from its arguments: the folder that the student leaves
in has a reader of its own (``backbones.shrink``), and `fit` goes on with it as a ``PrunedStudent``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multikd.backbones import dry_run, plan_rungs, spec_from_model
from multikd.backbones.shrink import read, shrink
from multikd.errors import MissingExtraError
from multikd.export.graphs import quiet
from multikd.export.staging import first_line
from multikd.students import StudentEncoder

# Widths that are multiples of it run at full speed.
_ROUND_TO = 8


@dataclass(frozen=True)
class PruneReport:
    """What was cut: parameters and multiply-adds of one image, before and after."""

    ratio: float
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    groups: int

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """One line for a terminal."""
        before, after = self.parameters
        saved = 1 - self.multiply_adds[1] / self.multiply_adds[0]
        return (
            f"pruned to {after / 1e6:.2f} of {before / 1e6:.2f} M parameters, "
            f"{100 * saved:.0f} % fewer multiply-adds"
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


def prune_student(student: StudentEncoder, ratio: float = 0.3) -> tuple[PrunedStudent, PruneReport]:
    """Cut the weakest channels inside a student; the features keep their width.

    Channel groups (all layers that share a channel) are ranked by the L2 norm of their weights.
    Left alone: groups that reach the features (of a ViT that is the residual stream, so its MLPs
    are cut) and attention, whose heads must stay equal. A trained classifier is left out.

    Args:
        student: not changed.
        ratio: share of the channels of each group to cut.

    Raises:
        ValueError: ratio out of range, nothing to cut, or a family torch-pruning can't follow.
        MissingExtraError: the extra ``prune`` is not installed.
    """
    require_torch_pruning()
    if not 0 < ratio < 1:
        raise ValueError(f"the ratio to prune must lie between 0 and 1, received {ratio}")
    name, size = student.spec.name, student.spec.image_size
    model = student.export_model().cpu().float()
    images = torch.zeros(1, 3, *size)
    before = _cost(model, images)
    with torch.inference_mode():
        shape = model(images).shape
    try:
        groups = _prune(model, images, shape[-1], ratio)
        with torch.inference_mode():
            pruned_shape = model(images).shape
    except Exception as error:  # torch-pruning asserts, indexes and divides
        raise ValueError(
            f"torch-pruning cannot follow {name} ({first_line(error)}): quantise it instead"
        ) from error
    if not groups:
        raise ValueError(f"{name} has no channels to cut at a ratio of {ratio}: raise it")
    if pruned_shape != shape:
        raise ValueError(f"torch-pruning changed the features of {name}: quantise it instead")
    after = _cost(model, images)
    pruned = PrunedStudent.of(student, model)
    with torch.inference_mode():
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        if not torch.equal(pruned.export_model()(images), model.eval()(images)):
            raise ValueError(f"the pruned {name} can't be rebuilt from its weights: report this")
    report = PruneReport(ratio, (before[0], after[0]), (before[1], after[1]), groups)
    return pruned, report


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


def _prune(model: nn.Module, images: Tensor, width: int, ratio: float) -> int:
    """Prune in place; returns how many times channels were cut."""
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
    return len(pruner.DG.pruning_history())


class PrunedStudent(StudentEncoder):
    """A student whose layers have the shapes, and the weights, that pruning left.

    For `fit`: ``student: {class_path: multikd.export.prune.PrunedStudent, init_args: {name: …,
    image_size: …, pruning: FOLDER}}``. The folder must stay: a checkpoint holds weights only.

    Args:
        name: of the original architecture.
        pruning: folder that ``multikd export --prune`` wrote, or an export of a run from there.
        **settings: those of :class:`~multikd.students.StudentEncoder` (jsonargparse reads them
            there); as in the original, but ``pretrained`` and ``checkpoint``, which the folder
            replaces.

    Raises:
        ValueError: no such folder, or one of another architecture or other settings.
    """

    def __init__(self, name: str, pruning: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        config, weights = read(Path(pruning))
        if config["architecture"] != name:
            raise ValueError(
                f"{pruning} holds a pruned {config['architecture']}, expected {name}: give that "
                "name, or another folder"
            )
        self._take(weights, name, settings)

    @classmethod
    def of(cls, student: StudentEncoder, model: nn.Module) -> PrunedStudent:
        """The form that a student takes when its model becomes a pruned one."""
        pruned = cls.__new__(cls)
        nn.Module.__init__(pruned)
        pruned.__dict__.update(copy.deepcopy(student).__dict__)
        if pruned.num_classes:
            pruned.model.reset_classifier(0)  # type: ignore[operator]
            pruned.num_classes = 0
        rungs = list(student.plan.indices)
        pruned._take(model.state_dict(), student.spec.name, {"rungs": rungs})
        return pruned.eval()

    def _take(self, weights: Mapping[str, Tensor], name: str, settings: dict[str, Any]) -> None:
        """Shrink the model to these weights, load them, and measure it anew."""
        shrink(self.model, weights)
        classifier = set(self.model.state_dict()) - set(self.encoder_state_dict())
        try:
            missing, unexpected = self.model.load_state_dict(dict(weights), strict=False)
        except RuntimeError as error:
            raise ValueError(
                f"the pruned weights do not fit {name} ({first_line(error)}): give the settings "
                "that it was trained with"
            ) from error
        if unexpected or set(missing) - classifier:
            raise ValueError(
                f"the pruned weights are of another {name}: {len(set(missing) - classifier)} are "
                f"missing and {len(unexpected)} unknown; give the settings that it was trained with"
            )
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
