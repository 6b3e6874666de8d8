"""A model folder in timm's layout: what ``multikd export`` writes, or anyone else."""

from __future__ import annotations

import json
from pathlib import Path

from multikd.backbones import build_model, is_skeleton
from multikd.backbones.shrink import load as load_pruned
from multikd.teachers.encoder import BackboneEncoder


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
        if _is_pruned(folder):
            model = load_pruned(folder)
        else:
            model = build_model(
                f"local-dir:{folder}", pretrained=not is_skeleton(), image_size=image_size
            )
        super().__init__(
            model,
            name=f"exported:{directory}",
            image_size=image_size,
            mean=mean,
            std=std,
            licence=licence,
            source=str(folder),
        )


def _is_pruned(folder: Path) -> bool:
    """Whether single layers are narrower than timm would build them."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("pruned"))
