"""What goes with exported weights: a short card for readers and a manifest for machines."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from multikd.types import EncoderSpec

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class TeacherFacts:
    """One teacher: its licence may bind those who use the student."""

    name: str
    licence: str = UNKNOWN_LICENCE
    source: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What the exporter cannot find out by itself; everything may be left out.

    Attributes:
        teachers: those that the student learned from.
        scores: what was measured → value in 0–1.
        licence: of the exported weights.
        data: the training data in a few words.
        command: what was typed to train it.
        notes: anything else a reader should know.
    """

    teachers: tuple[TeacherFacts, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    licence: str = UNKNOWN_LICENCE
    data: str = ""
    command: str = ""
    notes: str = ""


def manifest(
    spec: EncoderSpec,
    facts: CardFacts,
    *,
    architecture: str,
    parameters: int,
    num_classes: int,
    sha256: str,
) -> dict[str, Any]:
    """The figures of the card as plain JSON values."""
    return {
        "format": 1,
        "origin": "multikd",
        "architecture": architecture,
        "parameters": parameters,
        "image_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "widths": {"summary": spec.widths.summary, "patches": spec.widths.patches},
        "num_classes": num_classes,
        "files": {"model.safetensors": {"sha256": sha256}},
        "teachers": [asdict(teacher) for teacher in facts.teachers],
        "scores": dict(facts.scores),
        "licence": facts.licence,
        "data": facts.data,
        "command": facts.command,
        "notes": facts.notes,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the weights what they are."""
    found = {"python": platform.python_version()}
    for package in ("multikd", "torch", "torchvision", "timm", "lightning", "open_clip_torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def readme(
    spec: EncoderSpec, facts: CardFacts, *, architecture: str, parameters: int, num_classes: int
) -> str:
    """The card in Markdown: how to load it, what it was taught by, what it reached."""
    height, width = spec.image_size
    classifier = f" and a classifier of {num_classes} classes" if num_classes else ""
    parts = [
        f"# {architecture}, distilled by multikd",
        f"A timm `{architecture}` of {parameters / 1e6:.1f} M parameters{classifier}. "
        f"It was trained on images of {height} × {width} pixels.",
        "## Use\n\nWith timm alone (the folder in place of `PATH`; weights are only loaded with "
        "`pretrained=True`):\n\n```python\n"
        "import timm\nfrom PIL import Image\n\n"
        'model = timm.create_model("local-dir:PATH", pretrained=True, num_classes=0).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        'image = Image.open("image.jpg").convert("RGB")\n'
        f"features = model(transform(image)[None])  # (1, {spec.widths.summary})\n```\n\n"
        f"Inputs are RGB in [0, 1], then `(x - mean) / std` with mean {_triple(spec.mean)} and "
        f"std {_triple(spec.std)}. `model.forward_features` gives the patch features.",
    ]
    if facts.teachers:
        rows = "\n".join(
            f"| {_cell(t.name)} | {_cell(t.licence)} | {_cell(t.source)} |" for t in facts.teachers
        )
        parts.append(
            "## Teachers\n\nTheir licences may bind users of this student.\n\n"
            f"| teacher | licence | source |\n|---|---|---|\n{rows}"
        )
    if facts.scores:
        rows = "\n".join(f"| {_cell(k)} | {100 * v:.1f} % |" for k, v in facts.scores.items())
        parts.append(f"## Scores\n\n| measured | value |\n|---|---|\n{rows}")
    parts.append(f"## Licence\n\n{facts.licence}")
    made = [text for text in (facts.data, facts.notes) if text]
    if facts.command:
        made.append(f"```\n{facts.command}\n```")
    if made:
        parts.append("## How it was made\n\n" + "\n\n".join(made))
    return "\n\n".join(parts) + "\n"


def _triple(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
