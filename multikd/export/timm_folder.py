"""The student as a folder that plain timm loads: ``timm.create_model('local-dir:FOLDER')``."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.backbones import shrink
from multikd.export.card import CardFacts, Written, manifest
from multikd.export.folder import CONFIG, MANIFEST, new_folder, sha256
from multikd.export.licences import UNKNOWN
from multikd.export.prune import PrunedStudent
from multikd.export.readme import readme
from multikd.students import StudentEncoder
from multikd.types import EncoderSpec

logger = logging.getLogger(__name__)

WEIGHTS, CARD = "model.safetensors", "README.md"
PRUNED_MODULE = "student_pruned.py"
# All that stays true of the student of what timm says of the architecture's published weights.
_KEPT_KEYS = ("crop_pct", "crop_mode", "min_input_size")
# Arguments for training or placement, or set by us: they don't shape the model.
_OTHER_ARGUMENTS = frozenset(
    {"num_classes", "in_chans", "cache_dir", "device", "dtype", "pretrained_model_args"}
)


@dataclass(frozen=True)
class TimmOptions:
    """What the timm model of the folder answers.

    Attributes:
        classifier: keep the trained classifier.
        output: ``pooled`` (the student's summary), or ``tokens`` (no pooling: all tokens of a ViT,
            the map of a CNN).
        final_norm: keep a ViT's norm behind the last block. Ladder-only training leaves it at its
            start, so that without it the features are those of the last rung.
    """

    classifier: bool = False
    output: Literal["pooled", "tokens"] = "pooled"
    final_norm: bool = True


def export_timm_folder(
    student: StudentEncoder,
    out: Path,
    *,
    card: CardFacts | None = None,
    classifier: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the student's encoder as a folder that timm loads, alone or with its classifier.

    The weights are float32 ``model.safetensors``; ``config.json`` carries everything that timm
    needs to rebuild model and preprocessing; ``README.md`` and ``manifest.json`` say where it comes
    from. The folder is loaded back with timm and compared bit for bit before it gets its name, so
    that ``out`` is either whole and right, or as it was.

    Args:
        student: any device, any mode; it is not changed.
        out: folder to make; parents are made as needed.
        card: what to say about it.
        classifier: keep the trained classifier; a ValueError where the student has none.
        overwrite: replace an earlier export of that name.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` exists (and is no export, or ``overwrite`` is False), weights that are
            not finite, or a model that timm does not rebuild to the same features.
        OSError: the folder can't be written.
    """
    facts = CardFacts() if card is None else card
    out = Path(out)
    with new_folder(out, overwrite) as folder:
        written = write_timm(folder, student, facts, TimmOptions(classifier=classifier))
        write_card(folder, student.spec, facts, written)
    logger.info("exported the student to %s", out)
    return out


def write_timm(
    folder: Path, student: StudentEncoder, facts: CardFacts, options: TimmOptions
) -> Written:
    """Write weights and ``config.json`` into an existing folder, and check them with timm.

    Raises:
        ValueError: options that the student does not have, weights that are not finite, or a model
            that timm does not rebuild to the same features.
    """
    model, arguments = prepared_model(student, options)
    state = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    _check_finite(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = timm_config(model, student.spec, facts, arguments)
    pruned = isinstance(student, PrunedStudent)
    if pruned:
        config["pruned"] = True
        source = Path(shrink.__file__).read_text(encoding="utf-8")
        (folder / PRUNED_MODULE).write_text(source, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _verify(folder, model, student.spec, pruned)
    return Written(
        architecture=config["architecture"],
        parameters=sum(p.numel() for p in model.parameters()),
        num_classes=config["num_classes"],
        output=options.output,
        pruned=pruned,
    )


def write_card(folder: Path, spec: EncoderSpec, facts: CardFacts, written: Written) -> None:
    """Write ``README.md``, and ``manifest.json`` over all that is in the folder by then."""
    (folder / CARD).write_text(readme(spec, facts, written), encoding="utf-8")
    hashes = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    about = manifest(spec, facts, written, hashes)
    text = json.dumps(about, indent=2, default=str) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def prepared_model(
    student: StudentEncoder, options: TimmOptions
) -> tuple[nn.Module, dict[str, Any]]:
    """The model to write, and the arguments that rebuild what the options changed of it.

    Raises:
        ValueError: an option that this student does not have.
    """
    name = student.spec.name
    if options.classifier and not student.num_classes:
        raise ValueError(f"the student {name} has no classifier to export: leave it out")
    model = student.export_model(options.classifier).cpu().float().eval()
    arguments: dict[str, Any] = {}
    if options.output == "tokens":
        if options.classifier:
            raise ValueError("a classifier needs pooled output: leave out one of the two")
        try:
            model.reset_classifier(0, global_pool="")  # type: ignore[operator]
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"{name} can't be exported without pooling ({error}): leave out the tokens, and "
                "use its forward_features"
            ) from error
        arguments["global_pool"] = ""
        if isinstance(getattr(model, "fc_norm", None), nn.Module) and _takes(model, "fc_norm"):
            arguments["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    if not options.final_norm:
        if not _takes(model, "final_norm"):
            raise ValueError(f"{name} has no final norm that can be left out: keep it")
        model.norm = nn.Identity()
        if hasattr(model, "fc_norm"):
            model.fc_norm = nn.Identity()
        arguments["final_norm"] = False
    return model, arguments


def read_model(folder: Path, pruned: bool = False) -> nn.Module:
    """The model of a folder as its user gets it, in eval mode: timm's, or a pruned one's reader."""
    if pruned:
        return shrink.load(folder)
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).__init__).parameters


def _check_finite(state: dict[str, Tensor]) -> None:
    broken = [name for name, t in state.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise ValueError(
            f"weights to export must be finite, received NaN or infinity in {broken[0]} and "
            f"{len(broken) - 1} others: export an earlier checkpoint"
        )


def timm_config(
    model: nn.Module,
    spec: EncoderSpec,
    facts: CardFacts,
    changed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``config.json`` as timm reads it: architecture, arguments, full ``pretrained_cfg``.

    ``changed`` are arguments beside those that the model was built with.
    """
    source: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    cfg = {key: source[key] for key in _KEPT_KEYS if source.get(key) is not None}
    arguments = _model_arguments(model) | dict(changed or {})
    flexible = bool(arguments.get("dynamic_img_size")) or arguments.get("strict_img_size") is False
    cfg |= {
        "input_size": [3, *spec.image_size],
        "fixed_input_size": bool(source.get("fixed_input_size", False)) and not flexible,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "pool_size": _pool_size(model, spec),
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
        "license": facts.binding_licence,
        "description": f"Published by {facts.imported}, converted by multikd"
        if facts.imported
        else "Distilled by multikd from "
        + (", ".join(teacher.name for teacher in facts.teachers) or "its teachers"),
    }
    if facts.binding_licence == UNKNOWN:
        del cfg["license"]
    classes = int(getattr(model, "num_classes", 0))
    named = (
        {"label_names": list(facts.class_names)} if len(facts.class_names) == classes > 0 else {}
    )
    return {
        "architecture": source["architecture"],
        "num_classes": classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "origin": "multikd",
        **named,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": cfg | {"num_classes": classes},
    }


def _model_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments that rebuild the architecture.

    Newer releases of timm record them; of older ones the patch embedding tells those we set.
    """
    recorded = getattr(model, "_model_args", None)
    if recorded is None:
        embedding = getattr(model, "patch_embed", None)
        recorded = {
            "img_size": getattr(embedding, "img_size", None),
            "patch_size": getattr(embedding, "patch_size", None),
            "dynamic_img_size": getattr(model, "dynamic_img_size", None),
        }
    arguments = {
        name: value
        for name, value in recorded.items()
        if value is not None and name not in _OTHER_ARGUMENTS and not name.endswith("_rate")
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments))
    except TypeError as error:
        raise ValueError(
            f"the student was built with an argument that a file cannot hold ({error}): "
            f"received {arguments}"
        ) from error
    return plain


def _pool_size(model: nn.Module, spec: EncoderSpec) -> list[int] | None:
    """The grid that a map model pools; None for models without a ``pool_size``."""
    if getattr(model, "pretrained_cfg", {}).get("pool_size") is None:
        return None
    with torch.inference_mode():
        shape = model.forward_features(torch.zeros(1, 3, *spec.image_size)).shape  # type: ignore[operator]
    # (B, D, h, w) of a CNN, (B, h, w, D) of Swin and its like.
    width = int(getattr(model, "num_features", 0))
    return list(shape[1:3] if shape[-1] == width and shape[1] != width else shape[2:4])


def _verify(folder: Path, model: nn.Module, spec: EncoderSpec, pruned: bool) -> None:
    """Load the folder as anybody would, and compare with what was to be written."""
    try:
        loaded = read_model(folder, pruned)
    except Exception as error:  # whatever timm raises, the export is no good
        raise ValueError(
            f"timm {timm.__version__} does not load what was exported of {spec.name}: {error}"
        ) from error
    expected, received = model.state_dict(), loaded.state_dict()
    different = sorted(expected.keys() ^ received.keys()) or [
        name for name, t in expected.items() if not torch.equal(t, received[name])
    ]
    images = torch.randn(2, 3, *spec.image_size, generator=torch.Generator().manual_seed(0))
    if not different:
        with torch.inference_mode():
            if torch.equal(model(images), loaded(images)):
                return
    raise ValueError(
        f"timm {timm.__version__} rebuilds {spec.name} from its exported config to other "
        + (f"weights ({different[0]} and {len(different) - 1} more)" if different else "features")
        + ": report this with the student's settings"
    )
