"""What ``multikd export`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multikd.checkpoints import TrainedStudent, WeightChoice, load_student
from multikd.export.card import CardFacts, TeacherFacts
from multikd.export.timm_folder import export_timm_folder


def run_export(
    checkpoint: Path, out: Path, *, weights: WeightChoice = "auto", overwrite: bool = False
) -> tuple[str, dict[str, Any]]:
    """Export the student of a checkpoint as a timm folder; returns (text, figures)."""
    trained = load_student(checkpoint, weights)
    folder = export_timm_folder(trained.student, out, card=card_facts(trained), overwrite=overwrite)
    figures = {"export": str(folder), "weights": trained.weights, "epoch": trained.epoch}
    text = (
        f"wrote {folder} ({trained.weights} weights after {trained.epoch} epochs)\n"
        f"  timm.create_model('local-dir:{folder}', pretrained=True, num_classes=0)"
    )
    return text, figures


def card_facts(trained: TrainedStudent) -> CardFacts:
    """What the card says of a student out of a checkpoint: its teachers and their licences."""
    teachers = tuple(
        TeacherFacts(name=facts["encoder"], licence=facts["licence"], source=facts["source"])
        for facts in trained.teachers.values()
    )
    licences = {teacher.licence for teacher in teachers}
    return CardFacts(
        teachers=teachers,
        # One licence where all teachers agree; otherwise the reader must look at each.
        licence=licences.pop() if len(licences) == 1 else "other (see the teachers' licences)",
        data=str(trained.config.get("data", {}).get("init_args", {}).get("train", "")),
        notes=f"{trained.weights} weights after {trained.epoch} epochs, {trained.step} steps",
    )
