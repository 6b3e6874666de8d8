"""Teacher heads of an exported student: chosen ladders, answering in the teachers' own spaces.

A head is a sum over rungs of projectors whose last layer is linear, and it predicts *standardised*
teacher features. The normaliser's inverse is affine (``y = s·A + b``), so it goes into those last
layers: ``W ← Aᵀ W`` in every rung, ``bias ← bias·A`` in every rung, and ``b`` once.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.backbones import skeleton
from multikd.checkpoints import TrainedStudent
from multikd.errors import unknown_name
from multikd.export import standalone
from multikd.grids import target_grid
from multikd.ladder import Ladder
from multikd.losses.feature import DistillationLoss, FeatureLoss
from multikd.normalizers import EMAStandardizers, FeatureNormalizer, NormalizerFactory
from multikd.projectors import (
    MLPProjectors,
    Projector,
    ProjectorFactory,
    TokenwiseProjector,
    TransformerProjector,
)
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.types import TOKEN_TYPES, Grid, StudentOutput, TokenFeatures, TokenType, Widths

log = logging.getLogger(__name__)

MODULE = "student_heads.py"
TOLERANCE = 1e-4
# A map that is affine but for rounding differs from its matrix by no more than this (float64 over
# float32 statistics).
_AFFINE = 1e-5


@dataclass(frozen=True)
class TrainedHead:
    """One teacher's ladder as it was trained.

    Attributes:
        name: the teacher's name in the run.
        ladder: of this teacher alone; it predicts standardised features.
        normalizer: with the statistics of the run.
        grid: where its patches are predicted for images of the student's own size; None where
            training did not resample the rungs.
        facts: encoder, licence, source and fingerprint of the teacher.
    """

    name: str
    ladder: Ladder
    normalizer: FeatureNormalizer
    grid: Grid | None
    facts: Mapping[str, str]

    @property
    def projectors(self) -> dict[int, Projector]:
        """Rung → projector."""
        own = cast(nn.ModuleDict, self.ladder.projectors[self.name])
        return {int(rung): cast(Projector, projector) for rung, projector in own.items()}


def trained_heads(trained: TrainedStudent, names: Sequence[str]) -> list[TrainedHead]:
    """The ladders of these teachers, with their normalisers, out of a checkpoint.

    Raises:
        ValueError: no such teacher, or a run that trained no ladder.
    """
    settings: dict[str, Any] = trained.config["model"].get("init_args", {})
    known = tuple(settings.get("teachers") or ())
    for name in names:
        if name not in known:
            raise unknown_name("head", name, known, "(heads are called as the run's teachers)")
    state: dict[str, Tensor] = trained.checkpoint.get("state_dict", {})
    heads = []
    for name in names:
        normalizer = _normalizer(settings, state, name)
        factory = _instantiate(ProjectorFactory, settings.get("projectors")) or MLPProjectors()
        widths = {name: _projected(settings, name, normalizer.widths)}
        ladder = Ladder(trained.student.widths, widths, factory)
        _load(ladder, name, _part(state, f"ladder.projectors.{name}."))
        facts = trained.teachers.get(name, {})
        grid = _grid(trained.student, settings, name, normalizer.widths)
        heads.append(TrainedHead(name, ladder, normalizer.eval(), grid, facts))
    return heads


def predict(head: TrainedHead, output: StudentOutput) -> TokenFeatures:
    """The unfolded way: the trained ladder, then the normaliser's ``inverse``."""
    prediction = head.ladder(output.rungs, {head.name: head.grid})[head.name]
    return head.normalizer.inverse(prediction)


# ---------------------------------------------------------------------- folding


def affine_map(normalizer: FeatureNormalizer, token: TokenType) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` in float64 with ``inverse(s) = s · scale + shift``.

    ``scale`` is ``(D,)`` where ``affine`` tells the whole inverse, else the matrix ``(D, D)`` (of a
    normaliser that rotates), found by probing ``inverse`` itself.

    Raises:
        ValueError: the inverse is not affine, so that no linear layer can take it up.
    """
    width = cast(int, getattr(normalizer.widths, token))

    def inverse(rows: Tensor) -> Tensor:
        result = normalizer.inverse(TokenFeatures(**_tokens(token, rows)))
        return cast(Tensor, result.summary if token == "summary" else result.patches)[..., :].view(
            len(rows), -1
        )

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        rows = 3.0 * torch.randn(8, width, dtype=torch.float64, generator=generator)
        expected = inverse(rows)
        scale, shift = (t.detach().double().cpu() for t in normalizer.affine(token))
        if scale.ndim == 1 and _close(rows * scale + shift, expected):
            return scale, shift
        shift = inverse(torch.zeros(1, width, dtype=torch.float64))[0]
        matrix = inverse(torch.eye(width, dtype=torch.float64)) - shift
        if _close(rows @ matrix + shift, expected):
            return matrix, shift
    raise ValueError(
        f"the inverse of {type(normalizer).__name__} is not affine, so it can't be folded into a "
        "linear layer: export without --heads, or train with another normaliser"
    )


def _tokens(token: TokenType, rows: Tensor) -> dict[str, Any]:
    if token == "summary":
        return {"summary": rows}
    return {"patches": rows.unsqueeze(1), "grid": (1, 1)}


def _close(received: Tensor, expected: Tensor) -> bool:
    return bool((received - expected).abs().max() <= _AFFINE * expected.abs().max())


def fold(head: TrainedHead) -> dict[int, Projector]:
    """Copies of the head's projectors whose sum answers in the teacher's own feature space.

    Raises:
        ValueError: a normaliser that is not affine, or a projector that ends in no linear layer.
    """
    folded = {rung: copy.deepcopy(projector) for rung, projector in head.projectors.items()}
    for projector in folded.values():
        if isinstance(projector, TransformerProjector) and projector.shared:
            # One layer for both token types, but each has statistics of its own.
            projector.patches, projector.shared = copy.deepcopy(projector.summary), False
    last = max(folded)
    for token in TOKEN_TYPES:
        layers = {r: last_linear(p, token) for r, p in folded.items()}
        if all(layer is None for layer in layers.values()):
            continue
        scale, shift = affine_map(head.normalizer, token)
        for rung, layer in layers.items():
            if layer is not None:
                _fold_into(layer, scale, shift if rung == last else torch.zeros_like(shift))
    return folded


@torch.no_grad()
def _fold_into(layer: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double()
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.double()
    if scale.ndim == 1:
        weight, bias = scale[:, None] * weight, scale * bias + shift
    else:
        weight, bias = scale.T @ weight, bias @ scale + shift
    layer.weight = nn.Parameter(weight.float())
    layer.bias = nn.Parameter(bias.float())


def last_linear(projector: Projector, token: TokenType) -> nn.Linear | None:
    """The linear layer that a projector's ``token`` comes out of; None where it gives none.

    Raises:
        ValueError: it comes out of something else.
    """
    layers = getattr(projector, token, None)
    if layers is None:
        return None
    if isinstance(layers, nn.Sequential) and len(layers):
        layers = layers[-1]
    if not isinstance(projector, (TokenwiseProjector, TransformerProjector)) or not isinstance(
        layers, nn.Linear
    ):
        raise ValueError(
            f"a {type(projector).__name__} does not end in a linear layer for the {token}, so its "
            "normaliser can't be folded in: export without --heads"
        )
    return layers


# ---------------------------------------------------------------------- writing


def write_heads(
    folder: Path, student: StudentEncoder, heads: Sequence[TrainedHead]
) -> dict[str, Any]:
    """Write ``heads.safetensors``, ``heads.json`` and ``student_heads.py``; check them.

    The folder must hold the student's timm files already. What was written is loaded by its own
    module and compared with the unfolded ladder.

    Returns:
        head → largest error, relative to the largest value of the unfolded prediction.

    Raises:
        ValueError: a head that can't be folded or described, or one that is off by more than 1e-4.
    """
    state: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for head in heads:
        folded = fold(head)
        rungs: dict[str, Any] = {}
        for rung, projector in folded.items():
            rungs[str(rung)], tensors = describe(projector)
            prefix = f"{head.name}.projectors.{rung}."
            state |= {prefix + key: value for key, value in tensors.items()}
        size = student.spec.image_size
        stride = None if head.grid is None else [size[0] / head.grid[0], size[1] / head.grid[1]]
        described[head.name] = {
            "teacher": dict(head.facts),
            "widths": head.normalizer.widths._asdict(),
            "stride": stride,
            "rungs": rungs,
        }
    plan = student.plan
    about = {
        "format": 1,
        "rungs": {
            "indices": list(plan.indices),
            "tokens": plan.tokens,
            "class_summary": plan.class_summary,
            "last_is_final": plan.last_is_final and plan.indices[-1] == plan.count - 1,
        },
        "heads": described,
    }
    save_file(state, folder / standalone.WEIGHTS, metadata={"format": "pt"})
    (folder / standalone.CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    source = Path(standalone.__file__).read_text(encoding="utf-8")
    (folder / MODULE).write_text(source, encoding="utf-8")
    errors = _errors(folder, student, heads)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ValueError(
                f"head {name!r} differs by {error:.1e} from the trained ladder (limit "
                f"{TOLERANCE:.0e}): export without it, and report this with the run's config"
            )
    return errors


def describe(projector: Projector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A projector as plain data for the standalone module, and its weights under its names.

    Raises:
        ValueError: a layer that the standalone module does not know.
    """
    about: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    if isinstance(projector, TransformerProjector):
        about["blocks"] = [_describe_block(block) for block in projector.blocks]
        state |= {f"blocks.{k}": v for k, v in projector.blocks.state_dict().items()}
    for token in TOKEN_TYPES:
        part = cast("nn.Module | None", getattr(projector, token))
        if part is None:
            about[token] = None
            continue
        layers = list(part) if isinstance(part, nn.Sequential) else [part]
        about[token] = [_describe_layer(layer) for layer in layers]
        for index, layer in enumerate(layers):
            state |= {f"{token}.{index}.{k}": v for k, v in layer.state_dict().items()}
    return about, {key: value.detach().float().contiguous().clone() for key, value in state.items()}


def _describe_layer(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        return {"kind": "linear", **sizes, "bias": layer.bias is not None}
    if isinstance(layer, nn.LayerNorm):
        shape = list(layer.normalized_shape)
        return {"kind": "layer_norm", "normalized_shape": shape, "eps": layer.eps}
    if isinstance(layer, nn.GELU):
        return {"kind": "gelu", "approximate": layer.approximate}
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu")):
        if isinstance(layer, kind):
            return {"kind": name}
    raise ValueError(
        f"a head with a layer {type(layer).__name__} can't be written for other software: "
        "export without --heads"
    )


def _describe_block(block: nn.Module) -> dict[str, Any]:
    attention, mlp, norm = block.attn, block.mlp, block.norm1
    hidden = cast(nn.Linear, mlp.fc1).out_features  # type: ignore[union-attr]
    width = cast(nn.LayerNorm, norm).normalized_shape[0]
    scale = getattr(block.ls1, "gamma", None)
    return {
        "dim": width,
        "num_heads": int(attention.num_heads),  # type: ignore[union-attr, arg-type]
        "mlp_ratio": hidden / width,
        "qkv_bias": cast(nn.Linear, attention.qkv).bias is not None,  # type: ignore[union-attr]
        "init_values": None if scale is None else 1e-4,
        "eps": cast(nn.LayerNorm, norm).eps,
    }


@torch.no_grad()
def _errors(
    folder: Path, student: StudentEncoder, heads: Sequence[TrainedHead]
) -> dict[str, float]:
    loaded = standalone.load(folder)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *student.spec.image_size, generator=generator)
    place = next(student.parameters())
    mode = student.training
    output = student.eval()(images.to(place.device))
    student.train(mode)
    errors: dict[str, float] = {}
    for head in heads:
        expected = predict(head, output)
        received = loaded.head(head.name)(images)
        errors[head.name] = 0.0
        for token in TOKEN_TYPES:
            a, b = getattr(received, token), getattr(expected, token)
            if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
                raise ValueError(f"head {head.name!r} gives other {token} than its ladder")
            if a is not None:
                error = float((a - b.cpu()).abs().max() / b.abs().max().clamp(min=1e-12))
                errors[head.name] = max(errors[head.name], error)
    return errors


# ---------------------------------------------------------------------- out of the checkpoint


def _normalizer(settings: dict[str, Any], state: dict[str, Tensor], name: str) -> FeatureNormalizer:
    own = _part(state, f"normalizers.{name}.")
    if not own or not _part(state, f"ladder.projectors.{name}."):
        raise ValueError(
            f"this checkpoint holds no ladder for teacher {name!r}: heads need a run of "
            "multikd.modules.DistillationModule"
        )
    sizes = (own.get(f"{token}_mean") for token in TOKEN_TYPES)
    widths = Widths(*(None if mean is None else int(mean.shape[0]) for mean in sizes))
    factory = _instantiate(NormalizerFactory, settings.get("normalizers")) or EMAStandardizers()
    normalizer = factory.build(widths)
    normalizer.load_state_dict(own)
    return normalizer


def _projected(settings: dict[str, Any], name: str, widths: Widths) -> Widths:
    from multikd.modules.distillation import projected_widths  # brings Lightning with it

    chosen = (settings.get("teacher_losses") or {}).get(name) or settings.get("loss")
    loss = _instantiate(DistillationLoss, chosen) or FeatureLoss()
    return projected_widths(name, widths, loss)


def _grid(
    student: StudentEncoder, settings: dict[str, Any], name: str, widths: Widths
) -> Grid | None:
    if widths.patches is None:
        return None
    size = student.spec.image_size
    own = [rung.grid for rung in _rungs(student) if rung.grid is not None]
    try:
        # Shapes alone: no weights are fetched, and none take memory.
        with skeleton(), torch.device("meta"):
            teacher = _instantiate(Teacher, settings["teachers"][name])
            grid = None if teacher is None else teacher.grid_for(size, student.spec.patch_size)
    except Exception as error:  # a user's own teacher may raise anything
        log.warning(
            "teacher %s can't be built here (%s): its head uses the student's grid", name, error
        )
        grid = None
    if grid is None:
        return own[-1] if own else None
    return target_grid(own, grid, settings.get("target_grid") or "smaller") if own else None


def _rungs(student: StudentEncoder) -> list[TokenFeatures]:
    return [TokenFeatures(grid=grid) for grid in student.grids(student.spec.image_size)]


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load(ladder: Ladder, name: str, part: Mapping[str, Tensor]) -> None:
    try:
        cast(nn.ModuleDict, ladder.projectors[name]).load_state_dict(dict(part))
    except RuntimeError as error:
        raise ValueError(
            f"the ladder of teacher {name!r} does not fit its config "
            f"({' '.join(str(error).split())[:160]}): export with the version that trained it"
        ) from error
    ladder.eval().float()


def _instantiate(base: type[Any], settings: dict[str, Any] | None) -> Any:
    """An object of the typed config, or None where the config leaves it to the default."""
    if not settings:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "object")
    return parser.instantiate(parser.parse_object({"object": settings})).object
