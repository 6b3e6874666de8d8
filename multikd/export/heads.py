"""Teacher heads of an exported student: folded, described as plain data, written and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.export import standalone
from multikd.export.folding import fold
from multikd.export.trained_heads import TrainedHead, predict
from multikd.projectors import ConvProjector, ConvStage, Projector, Residual, TransformerProjector
from multikd.students import StudentEncoder
from multikd.types import TOKEN_TYPES

MODULE = "student_heads.py"
TOLERANCE = 1e-4


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
    if isinstance(projector, ConvProjector):
        stages = [cast(ConvStage, stage).conv for stage in projector.stages]
        about["stages"] = [[conv.in_channels, conv.out_channels] for conv in stages]
        state |= {f"stages.{k}": v for k, v in projector.stages.state_dict().items()}
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
    if isinstance(layer, Residual):
        return {"kind": "residual", "layers": [_describe_layer(inner) for inner in layer]}
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
