"""What ``multikd import`` runs: a released file → a folder that timm and ``multikd.load`` read."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multikd.backbones import load_weights
from multikd.export.card import CardFacts, TeacherFacts
from multikd.export.cost import measure_cost
from multikd.export.folder import check_target, new_folder, sha256
from multikd.export.timm_folder import TimmOptions, write_card, write_timm
from multikd.published import dinov2, eupe, radio, theia
from multikd.published.publishers import PUBLISHERS, Kind, licence_of
from multikd.published.released import (
    Released,
    check_kind,
    kind_of,
    other_layout,
    read_released,
)
from multikd.published.vit import Asked, ImportedVit
from multikd.students import StudentEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportSettings:
    """What the command line asks for; see ``multikd import --help``.

    Attributes:
        kind: whose file it is; ``auto`` looks at its layout.
        asked: what is said of the file in its place.
        final_norm: keep the norm behind the last block.
        licence: of the weights, in place of the publisher's.
        cost: measure latency and multiply-adds.
        overwrite: replace an earlier export or import.
    """

    kind: str = "auto"
    asked: Asked = field(default_factory=Asked)
    final_norm: bool = True
    licence: str | None = None
    cost: bool = True
    overwrite: bool = False


def run_import(
    file: Path, out: Path, settings: ImportSettings | None = None
) -> tuple[str, dict[str, Any]]:
    """Import a released file; returns (text, figures).

    Everything is written into a temporary folder that becomes ``out`` when timm has loaded it back
    to the same features.

    Raises:
        ValueError: anything that can't be imported, in one sentence; nothing is written.
        OSError: the place can't be written to, or its disk is full.
    """
    asked = settings or ImportSettings()
    file, out = Path(file), Path(out)
    chosen = check_kind(asked.kind)
    check_target(out, asked.overwrite)
    released = read_released(file)
    kind = kind_of(released) if chosen is None else chosen
    found = convert(released, kind, asked.asked)
    student = build(found, file)
    facts = _facts(file, kind, found, asked)
    with new_folder(out, asked.overwrite) as folder:
        written = write_timm(folder, student, facts, TimmOptions(final_norm=asked.final_norm))
        if asked.cost:
            written.cost = measure_cost(student)
        write_card(folder, student.spec, facts, written)
    logger.info("imported %s to %s", file, out)
    figures: dict[str, Any] = {
        "import": str(out),
        "kind": kind,
        "repository": PUBLISHERS[kind].repository,
        "licence": facts.binding_licence,
        "architecture": written.architecture,
        "parameters": written.parameters,
        "image_size": found.image_size,
        "patch_size": found.patch_size,
        "model_args": dict(found.model_args),
        "notes": list(found.notes),
        "cost": None if written.cost is None else vars(written.cost),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
    return _text(out, kind, found, figures), figures


def convert(released: Released, kind: Kind, asked: Asked) -> ImportedVit:
    """A file's encoder under timm's names.

    Raises:
        ValueError: the file is not of this kind.
    """
    try:
        if kind == "radio":
            return radio.convert(released, asked)
        if kind == "theia":
            return theia.convert(released, asked)
        if kind == "eupe":
            return eupe.convert(released, asked)
        return dinov2.convert(released, kind, asked)
    except (LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise other_layout(released, kind) from error  # a tensor is missing, or of another rank


def build(found: ImportedVit, file: Path) -> StudentEncoder:
    """The encoder with its weights, as one that we trained would be.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    student = StudentEncoder(
        found.name,
        image_size=found.image_size,
        patch_size=found.patch_size,
        rungs="last",
        mean=found.mean,
        std=found.std,
        global_pool=found.global_pool,
        model_args=dict(found.model_args),
    )
    load_weights(student.model, found.tensors, str(file))
    config: dict[str, Any] = dict(student.model.pretrained_cfg)  # type: ignore[arg-type]
    student.model.pretrained_cfg = config | {"crop_pct": found.crop_pct}  # type: ignore[assignment]
    return student


def _facts(file: Path, kind: Kind, found: ImportedVit, asked: ImportSettings) -> CardFacts:
    about = PUBLISHERS[kind]
    licence = licence_of(kind, file.name)
    return CardFacts(
        start=TeacherFacts(
            name=f"{about.repository}: {file.name}",
            licence=licence,
            source=f"local file; layout read in {about.sources} at commit {about.commit}",
            link=about.link,
            revision=sha256(file),
        ),
        licence=asked.licence,
        imported=about.repository,
        notes=(
            f"Converted by `multikd import` from the released file of arXiv {about.paper}. "
            f"The licence is that of {about.licence_file} in {about.repository} at commit "
            f"{about.commit}; a newer release may say otherwise. " + " ".join(found.notes)
        ),
        checkpoint={"name": file.name, "sha256": sha256(file)},
    )


def _text(out: Path, kind: Kind, found: ImportedVit, figures: dict[str, Any]) -> str:
    name = shlex.quote(f"--model.student.name=local-dir:{out}")
    lines = [
        f"wrote {out} ({kind}, {figures['architecture']}, {figures['parameters'] / 1e6:.1f} M "
        f"parameters, {found.image_size} px)",
        f"  licence   {figures['licence']} (of {figures['repository']})",
        *(f"  note      {note}" for note in found.notes),
        f"  timm      timm.create_model('local-dir:{out}', pretrained=True, num_classes=0)",
        f"  teacher   encoder: exported:{out}",
        f"  student   {name} --model.student.pretrained=true",
    ]
    return "\n".join(lines)
