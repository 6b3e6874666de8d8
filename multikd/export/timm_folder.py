"""The student as a folder that plain timm loads: ``timm.create_model('local-dir:FOLDER')``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.export.card import UNKNOWN_LICENCE, CardFacts, manifest, readme
from multikd.students import StudentEncoder
from multikd.types import EncoderSpec

logger = logging.getLogger(__name__)

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
# All that stays true of the student of what timm says of the architecture's published weights.
_KEPT_KEYS = ("crop_pct", "crop_mode", "min_input_size")
# Arguments for training or placement, or set by us: they don't shape the model.
_OTHER_ARGUMENTS = frozenset(
    {"num_classes", "in_chans", "cache_dir", "device", "dtype", "pretrained_model_args"}
)


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
    out = Path(out)
    facts = CardFacts() if card is None else card
    _check_target(out, overwrite)
    if classifier and not student.num_classes:
        raise ValueError(
            f"the student {student.spec.name} has no classifier to export: leave it out"
        )
    model = student.export_model(classifier).cpu().float().eval()
    state = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    _check_finite(state)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write(temporary, model, state, student.spec, facts)
        _verify(temporary, model, student.spec)
        _move(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("exported the student to %s", out)
    return out


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{out} exists already: give another folder, or overwrite it on purpose")
    if out.is_symlink() or not _is_export(out):
        raise ValueError(
            f"{out} is not an earlier export of multikd, so it is not overwritten: "
            "give another folder"
        )


def _is_export(folder: Path) -> bool:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("origin") == "multikd"


def _check_finite(state: dict[str, Tensor]) -> None:
    broken = [name for name, t in state.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise ValueError(
            f"weights to export must be finite, received NaN or infinity in {broken[0]} and "
            f"{len(broken) - 1} others: export an earlier checkpoint"
        )


def _write(
    folder: Path, model: nn.Module, state: dict[str, Tensor], spec: EncoderSpec, facts: CardFacts
) -> None:
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    sha256 = hashlib.sha256((folder / _WEIGHTS).read_bytes()).hexdigest()
    config = timm_config(model, spec, facts)
    architecture = config["architecture"]
    parameters = sum(p.numel() for p in model.parameters())
    classes = config["num_classes"]
    about = manifest(
        spec,
        facts,
        architecture=architecture,
        parameters=parameters,
        num_classes=classes,
        sha256=sha256,
    )
    for name, value in ((_CONFIG, config), ("manifest.json", about)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    card = readme(
        spec, facts, architecture=architecture, parameters=parameters, num_classes=classes
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def timm_config(model: nn.Module, spec: EncoderSpec, facts: CardFacts) -> dict[str, Any]:
    """``config.json`` as timm reads it: architecture, arguments, full ``pretrained_cfg``."""
    source: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    cfg = {key: source[key] for key in _KEPT_KEYS if source.get(key) is not None}
    arguments = _model_arguments(model)
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
        "license": facts.licence,
        "description": "Distilled by multikd from "
        + (", ".join(teacher.name for teacher in facts.teachers) or "its teachers"),
    }
    if facts.licence == UNKNOWN_LICENCE:
        del cfg["license"]
    classes = int(getattr(model, "num_classes", 0))
    return {
        "architecture": source["architecture"],
        "num_classes": classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "origin": "multikd",
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


def _verify(folder: Path, model: nn.Module, spec: EncoderSpec) -> None:
    """Load the folder as anybody would, and compare with what was to be written."""
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
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


def _move(temporary: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier one gives way, and returns on failure."""
    if not out.exists():
        temporary.rename(out)
        return
    retired = out.parent / f".{out.name}.{os.getpid()}.old"
    shutil.rmtree(retired, ignore_errors=True)
    out.rename(retired)
    try:
        temporary.rename(out)
    except BaseException:
        retired.rename(out)
        raise
    shutil.rmtree(retired)
