"""A model folder in timm's layout: what ``multikd export`` writes, or anyone else."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors import safe_open

from multikd.backbones import build_model, check_model_args, is_skeleton
from multikd.backbones.shrink import load as load_pruned
from multikd.teachers.encoder import BackboneEncoder
from multikd.untrusted import inside, read_json

WEIGHTS = "model.safetensors"


class ExportedEncoder(BackboneEncoder):
    """A folder with ``config.json`` and weights, read by timm's ``local-dir:``.

    Args:
        directory: the folder.
        image_size: side in pixels; None takes what its config says.
        mean: overrides the config's.
        std: overrides the config's.
        licence: overrides the config's.

    Raises:
        ValueError: not such a folder, or weights that do not fit.
    """

    def __init__(
        self,
        directory: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
    ) -> None:
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{directory!r} is no model folder (it has no config.json): give a folder that "
                "`multikd export` or timm wrote"
            )
        pruned = _check_folder(folder)
        try:
            model = (
                load_pruned(folder)
                if pruned
                else build_model(
                    f"local-dir:{folder}", pretrained=not is_skeleton(), image_size=image_size
                )
            )
        except ValueError:
            raise
        except Exception as error:  # timm has errors of its own for what it can't read
            raise ValueError(
                f"{folder} can't be built ({' '.join(str(error).split())[:160]}): its config.json "
                "is damaged; copy it again"
            ) from error
        super().__init__(
            model,
            name=f"exported:{directory}",
            image_size=image_size,
            mean=mean,
            std=std,
            licence=licence,
            source=str(folder),
        )


def _check_folder(folder: Path) -> bool:
    """Refuse a folder that would have us build for hours, or read what lies elsewhere.

    Returns:
        Whether it holds a pruned student: single layers are narrower than timm would build them.

    Raises:
        ValueError: its config is damaged, or asks for more than its weights hold.
    """
    config = read_json(folder / "config.json", 1 << 24)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{folder}/config.json describes no model: it names no architecture")
    pruned = bool(config.get("pruned"))
    weights = inside(folder, WEIGHTS)
    if not weights.is_file():
        if is_skeleton():
            return pruned
        raise ValueError(
            f"{folder} has no {WEIGHTS}: save its weights as safetensors, which hold no code"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = len(file.keys())
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(
            f"{weights} is damaged ({' '.join(str(error).split())[:120]}): copy it again"
        ) from error
    try:
        check_model_args(config.get("model_args"), tensors)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error
    try:
        with torch.device("meta"):
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        needs = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    except Exception as error:  # as above
        raise ValueError(
            f"{folder} can't be built ({' '.join(str(error).split())[:160]}): its config.json is "
            "damaged; copy it again"
        ) from error
    # Buffers may be computed, within reason; of a pruned one the whole is built first.
    if needs > (64 if pruned else 2) * weights.stat().st_size + (1 << 24):
        raise ValueError(
            f"{folder}/config.json describes a model of {needs} numbers, and its weights have "
            f"{weights.stat().st_size} bytes: copy it again"
        )
    return pruned
