"""What ``multikd export`` runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multikd.checkpoints import CHECKPOINT_KEY, TrainedStudent, WeightChoice, load_student
from multikd.export.card import CardFacts, TeacherFacts, Written
from multikd.export.cost import measure_cost
from multikd.export.folder import check_target, new_folder, sha256
from multikd.export.heads import write_heads
from multikd.export.provenance import data_facts, recipe, seeds
from multikd.export.prune import PrunedStudent, prune_student
from multikd.export.results import CardResults, card_results, read_results
from multikd.export.shared_classifier import has_classifier, write_classifier
from multikd.export.sources import link_of, start_facts
from multikd.export.standalone import CONFIG as HEADS
from multikd.export.timm_folder import TimmOptions, write_card, write_timm
from multikd.export.trained_heads import trained_heads
from multikd.redaction import redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSettings:
    """What the command line asks for; see ``multikd export --help``.

    Attributes:
        formats: beside the timm folder, which is always written.
        quantize: quantised formats by short name (``deliver.QUANTIZED``).
        heads: teachers whose heads are kept.
        weights: ``ema``, ``raw`` or ``auto``.
        student: name or index of one of several students; None takes the best.
        timm: classifier, output and final norm.
        preprocessing: put resizing and normalisation into the graphs of the other formats.
        opset: of ONNX.
        data: shards of real images for parity, calibration and scores; None takes the run's
            training shards where they are at hand.
        images: how many of them.
        prune: share of the channels inside to cut first; None prunes nothing.
        max_cosine_loss: a quantised file further from float than this is refused; None takes the
            default.
        max_agreement_loss: the same for the share of changed k-NN answers.
        results: the ``results.json`` of ``multikd evaluate``, for the card.
        licence: of the weights, in place of the most restrictive one found.
        data_licence: of the training data.
        cost: measure latency and multiply-adds.
        overwrite: replace an earlier export.
    """

    formats: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    weights: WeightChoice = "auto"
    student: str | None = None
    timm: TimmOptions = field(default_factory=TimmOptions)
    preprocessing: bool = False
    opset: int = 18
    data: str | None = None
    images: int = 512
    prune: float | None = None
    max_cosine_loss: float | None = None
    max_agreement_loss: float | None = None
    results: Path | None = None
    licence: str | None = None
    data_licence: str = ""
    cost: bool = True
    overwrite: bool = False


def run_export(
    checkpoint: Path, out: Path, settings: ExportSettings | None = None
) -> tuple[str, dict[str, Any]]:
    """Export the student of a checkpoint; returns (text, figures).

    Everything is written into a temporary folder that becomes ``out`` when the last check passed.

    Raises:
        ValueError: anything that can't be exported as asked, in one sentence; nothing is written.
        MissingExtraError: a format whose packages are not installed.
        OSError: the place can't be written to, or its disk is full.
    """
    from multikd.export.deliver import check_formats, write_formats

    asked = settings or ExportSettings()
    out = Path(out)
    check_target(out, asked.overwrite)
    if asked.prune is not None and asked.results is not None:
        raise ValueError("results are not of the pruned student: leave out --results, or --prune")
    if asked.heads and asked.timm.output == "tokens":
        raise ValueError("heads need the pooled student: leave out --heads or --output tokens")
    formats = check_formats(asked.formats, asked.quantize)
    results = read_results(asked.results)
    trained = load_student(checkpoint, asked.weights, asked.student)
    measured = trained.student
    pruning = None
    if asked.prune is not None:
        student, pruning = prune_student(trained.student, asked.prune)
        trained = replace(trained, student=student)
    if asked.heads and isinstance(trained.student, PrunedStudent):
        raise ValueError("a pruned student leaves without heads: leave out --heads")
    shared = has_classifier(trained) and not isinstance(trained.student, PrunedStudent)
    if has_classifier(trained) and not (shared and asked.timm == TimmOptions()):
        logger.warning(
            "the shared classifier reads the student as it was trained, pooled and normed: it is "
            "left out (export without --prune, --output and --no-final-norm to have it)"
        )
    heads = trained_heads(trained, asked.heads) if asked.heads else []
    facts = card_facts(
        trained,
        checkpoint=checkpoint,
        licence=asked.licence,
        data_licence=asked.data_licence,
        results=None if asked.results is None else card_results(results, measured, asked.results),
    )
    if pruning is not None:
        facts = replace(
            facts, notes=f"{facts.notes}; then {pruning.text()}, and not trained since then"
        )
    with new_folder(out, asked.overwrite) as folder:
        written = write_timm(folder, trained.student, facts, asked.timm)
        if heads:
            logger.info("heads: %s", ", ".join(asked.heads))
            written.head_errors = write_heads(folder, trained.student, heads)
            written.heads = json.loads((folder / HEADS).read_text(encoding="utf-8"))["heads"]
        if shared and asked.timm == TimmOptions():
            written.classifier = write_classifier(folder, trained)
        written.formats = write_formats(folder, trained, asked, formats)
        if asked.cost:
            written.cost = measure_cost(trained.student)
        write_card(folder, trained.student.spec, facts, written)
    text, figures = _text(out, trained, facts, written), _figures(out, trained, facts, written)
    if pruning is not None:
        text += f"\n  {pruning.text()}; distil it further before use:\n    {_go_on(out)}"
        figures["pruning"] = pruning.as_dict()
    return text, figures


def split_names(text: str) -> tuple[str, ...]:
    """``a,b`` → its names, each once, in their order."""
    return tuple(dict.fromkeys(name for name in (n.strip() for n in text.split(",")) if name))


def card_facts(
    trained: TrainedStudent,
    *,
    checkpoint: Path | None = None,
    licence: str | None = None,
    data_licence: str = "",
    results: CardResults | None = None,
) -> CardFacts:
    """What the card says of a student out of a checkpoint.

    Args:
        trained: the student.
        checkpoint: its file, to be hashed.
        licence: of the weights, in place of the most restrictive one found.
        data_licence: of the training data; empty takes what ``dataset.json`` says.
        results: what was measured of it.
    """
    results = results or CardResults()
    teachers = tuple(
        TeacherFacts(
            name=facts["encoder"],
            licence=facts["licence"],
            source=facts["source"],
            called=name,
            link=link_of(facts["encoder"]),
            revision=facts.get("fingerprint", ""),
        )
        for name, facts in trained.teachers.items()
    )
    data_sets = data_facts(trained.config)
    stated = [str(d.get("licence") or d.get("license") or "") for d in data_sets]
    if not data_licence and stated and all(stated):
        from multikd.export.licences import most_restrictive

        data_licence = most_restrictive(stated)
    return CardFacts(
        teachers=teachers,
        scores=results.scores,
        retention=results.retention,
        costs=results.costs,
        gaps=results.gaps,
        groups=results.groups,
        measured_by=results.source,
        licence=licence,
        data=", ".join(str(d.get("source") or d.get("urls")) for d in data_sets),
        data_licence=data_licence,
        data_sets=data_sets,
        notes=f"{trained.weights} weights after {trained.epoch} epochs, {trained.step} steps",
        start=start_facts(trained.config),
        weights=trained.weights,
        recipe=recipe(trained),
        config=redact(trained.checkpoint.get(CHECKPOINT_KEY, {}).get("config", "")),
        trained_by=trained.version,
        seeds=seeds(trained.config),
        checkpoint={}
        if checkpoint is None
        else {"name": Path(checkpoint).name, "sha256": sha256(Path(checkpoint))},
        class_names=_class_names(data_sets, trained.student.num_classes),
    )


def _class_names(data_sets: Sequence[dict[str, Any]], classes: int) -> tuple[str, ...]:
    for entry in data_sets:
        names = entry.get("classes")
        if classes and isinstance(names, list) and len(names) == classes:
            return tuple(str(name) for name in names)
    return ()


def _text(out: Path, trained: TrainedStudent, facts: CardFacts, written: Written) -> str:
    classes = "" if written.num_classes else ", num_classes=0"
    owners = facts.owners_of(facts.binding_licence)
    lines = [
        f"wrote {out} ({trained.weights} weights after {trained.epoch} epochs)",
        f"  licence   {facts.binding_licence} (of {', '.join(owners) or 'your choice'})",
        f"  pruned    sys.path.insert(0, '{out}'); student_pruned.load()"
        if written.pruned
        else f"  timm      timm.create_model('local-dir:{out}', pretrained=True{classes})",
    ]
    for name, error in written.head_errors.items():
        lines.append(f"  head      {name}, {error:.1e} from the unfolded ladder")
    if written.classifier:
        lines.append(
            f"  deployed  sys.path.insert(0, '{out}'); student_classifier.load()  "
            f"(projector and classifier of {', '.join(written.classifier['teachers'])})"
        )
    for report in written.formats:
        lines.append(f"  {report['text']}")
    if written.cost is not None and written.cost.milliseconds is not None:
        lines.append(
            f"  cost      {written.parameters / 1e6:.1f} M parameters, "
            f"{written.cost.milliseconds:.2f} ms an image (p50, batch 1, one thread)"
        )
    return "\n".join(lines)


def _go_on(out: Path) -> str:
    """The command of a further distillation."""
    return (
        "multikd fit --config CONFIG_OF_THE_RUN --trainer.default_root_dir=NEW_FOLDER "
        f"--model.student=multikd.export.prune.PrunedStudent --model.student.pruning={out}"
    )


def _figures(
    out: Path, trained: TrainedStudent, facts: CardFacts, written: Written
) -> dict[str, Any]:
    return {
        "export": str(out),
        "weights": trained.weights,
        "epoch": trained.epoch,
        "licence": facts.binding_licence,
        "parameters": written.parameters,
        "heads": dict(written.head_errors),
        "classifier": dict(written.classifier),
        "formats": [dict(report) for report in written.formats],
        "cost": None if written.cost is None else vars(written.cost),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
