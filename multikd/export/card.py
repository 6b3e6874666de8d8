"""What is known of exported weights: facts for the reader's card and for the machine's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from multikd.export.licences import UNKNOWN, most_restrictive
from multikd.export.provenance import commit, versions
from multikd.types import EncoderSpec

UNKNOWN_LICENCE = UNKNOWN


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher, or the weights a student started from: its licence may bind the student's users.

    Attributes:
        name: what it is (``timm:vit_base_patch16_224.dino``).
        licence: as its source states it.
        source: where its weights came from.
        called: its name in the run.
        link: an address to read more at.
        revision: fingerprint of weights and preprocessing: which weights exactly.
    """

    name: str
    licence: str = UNKNOWN
    source: str = ""
    called: str = ""
    link: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Cost:
    """What running it costs, measured at the trained image size on the machine that exported it."""

    macs: int | None
    milliseconds: float | None  # p50 of one image on one thread
    machine: str


@dataclass(frozen=True)
class CardFacts:
    """What the exporter cannot find out by itself; everything may be left out.

    Attributes:
        teachers: those that the student learned from.
        scores: what was measured → value in 0–1.
        licence: of the exported weights; None takes the most restrictive of teachers, starting
            weights and data.
        data: the training data in a few words.
        data_licence: of the training data; empty where nobody stated it.
        data_sets: the training sets with their hashes (``provenance.data_facts``).
        command: what was typed to train it.
        notes: anything else a reader should know.
        start: the weights that the student started from, if any.
        weights: ``ema`` or ``raw``.
        recipe: setting → value, those that a reader looks for first.
        config: the run's full config as YAML text.
        trained_by: version of multikd that wrote the checkpoint.
        seeds: by their place in the config.
        checkpoint: file name and sha256 of the checkpoint.
        retention: rows of the retention matrix: column → value.
        costs: rows of what student and teachers cost: column → value.
        gaps: rows of worst group and gap: column → value.
        groups: rows of scores by group: column → value.
        measured_by: what measured these.
        class_names: of the classifier.
    """

    teachers: tuple[TeacherFacts, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None
    data: str = ""
    data_licence: str = ""
    data_sets: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    notes: str = ""
    start: TeacherFacts | None = None
    weights: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    trained_by: str = ""
    seeds: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    retention: Sequence[Mapping[str, Any]] = ()
    costs: Sequence[Mapping[str, Any]] = ()
    gaps: Sequence[Mapping[str, Any]] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    measured_by: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def binding_licence(self) -> str:
        """The licence given, else the most restrictive of what went into the weights."""
        if self.licence is not None:
            return self.licence
        found = [teacher.licence for teacher in self.teachers]
        found += [] if self.start is None else [self.start.licence]
        found += [self.data_licence] if self.data_licence else []
        return most_restrictive(found)

    def owners_of(self, licence: str) -> list[str]:
        """Who brought a licence in: teachers, starting weights or data."""
        parts = [(teacher.name, teacher.licence) for teacher in self.teachers]
        parts += [] if self.start is None else [(self.start.name, self.start.licence)]
        parts += [("the training data", self.data_licence)] if self.data_licence else []
        return [name for name, own in parts if most_restrictive([own]) == licence]


@dataclass
class Written:
    """What an export came to, beside the facts: filled in while the folder is written.

    Attributes:
        architecture: timm's name.
        parameters: how many.
        num_classes: of the classifier, 0 without.
        output: ``pooled`` or ``tokens``.
        cost: where it was measured.
        heads: name → what ``heads.json`` says of it.
        classifier: of a student that is deployed with its teachers' classifiers: teachers,
            classes and the error of what was written; empty for others.
        head_errors: name → relative difference from the unfolded ladder.
        formats: what each other format's report says.
        pruned: whether single layers are narrower than timm would build them.
    """

    architecture: str
    parameters: int
    num_classes: int
    output: str = "pooled"
    cost: Cost | None = None
    heads: Mapping[str, Any] = field(default_factory=dict)
    head_errors: Mapping[str, float] = field(default_factory=dict)
    formats: Sequence[Mapping[str, Any]] = ()
    pruned: bool = False
    classifier: Mapping[str, Any] = field(default_factory=dict)


def manifest(
    spec: EncoderSpec, facts: CardFacts, written: Written, hashes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Provenance and figures as plain JSON values. ``hashes``: file → sha256 and bytes."""
    return {
        "format": 2,
        "origin": "multikd",
        "architecture": written.architecture,
        "parameters": written.parameters,
        "image_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "widths": {"summary": spec.widths.summary, "patches": spec.widths.patches},
        "num_classes": written.num_classes,
        "output": written.output,
        "pruned": written.pruned,
        "files": {name: dict(entry) for name, entry in hashes.items()},
        "licence": facts.binding_licence,
        "teachers": [asdict(teacher) for teacher in facts.teachers],
        "start": None if facts.start is None else asdict(facts.start),
        "data": facts.data,
        "data_licence": facts.data_licence,
        "data_sets": [dict(entry) for entry in facts.data_sets],
        "weights": facts.weights,
        "seeds": dict(facts.seeds),
        "recipe": dict(facts.recipe),
        "checkpoint": dict(facts.checkpoint),
        "scores": dict(facts.scores),
        "retention": [dict(row) for row in facts.retention],
        "costs": [dict(row) for row in facts.costs],
        "gaps": [dict(row) for row in facts.gaps],
        "groups": [dict(row) for row in facts.groups],
        "measured_by": facts.measured_by,
        "cost": None if written.cost is None else asdict(written.cost),
        "heads": {
            name: {"teacher": about["teacher"], "max_relative_error": written.head_errors[name]}
            for name, about in written.heads.items()
        },
        "formats": [dict(report) for report in written.formats],
        "command": facts.command,
        "notes": facts.notes,
        "trained_by": facts.trained_by,
        "commit": commit(),
        "versions": versions(),
        "config": facts.config,
    }
