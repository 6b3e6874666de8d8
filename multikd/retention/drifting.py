"""``multikd evaluate ENCODER --drift NEW --reference OLD``: features of both, and what they say."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multikd.evaluation.agreement import prediction_cosine
from multikd.evaluation.drift_report import drift_report, drift_text
from multikd.retention.datasets import DataSpec, EvalDataset, open_data
from multikd.retention.encoders import Column, open_encoders
from multikd.retention.extract import extract, plan
from multikd.retention.subject import EncoderSubject, size_for

if TYPE_CHECKING:
    from multikd.retention.commands import EvaluateSettings

_SPLIT = "test"
_LEAST, _MOST = 12, 2000  # images of each set; more are evenly thinned out
_NO_TEACHERS = (
    "agreement  not measured: a checkpoint's heads are compared with its teachers when "
    "--with-teachers is given"
)


def drift(
    encoders: Sequence[str], new: str, reference: str, settings: EvaluateSettings
) -> tuple[str, dict[str, Any]] | None:
    """A report for every student or encoder; None on ranks but the first.

    At most 2,000 images of each set are run, evenly spread over it.
    Heads are not reported by themselves: they give the agreement with the teachers they are of.

    Raises:
        ValueError: no encoder, or images that are not there, too few or unreadable.
    """
    if not encoders:
        raise ValueError(
            "drift is what an encoder sees in new images: name one, for instance a checkpoint"
        )
    begun = time.perf_counter()
    columns = open_encoders(encoders, settings.opening)
    data = {
        "new": open_data("new", DataSpec(test=new, limit=_MOST)),
        "reference": open_data("reference", DataSpec(test=reference, limit=_MOST)),
    }
    for name, text in (("new", new), ("reference", reference)):
        count = len(data[name].splits["test"])
        if count < _LEAST:
            raise ValueError(
                f"drift needs at least {_LEAST} images in both sets, and {text} has {count}"
            )
    pairs = {c.name: teacher for c in columns if (teacher := _teacher_of(c, columns))}
    # A head without its teacher, or the other way round, has nothing to be compared with.
    used = [
        c
        for c in columns
        if c.role in ("student", "encoder")
        or c.name in pairs
        or any(c is teacher for teacher in pairs.values())
    ]
    options = settings.extraction
    requests = [
        (column, of_set, _SPLIT, "summary", size_for(column, of_set))
        for column in used
        for of_set in data.values()
    ]
    works = plan(requests, options)  # type: ignore[arg-type]
    if not extract(works, options, settings.progress):
        return None
    features = {
        column.name: {
            name: _features(EncoderSubject(column, of_set, options))
            for name, of_set in data.items()
        }
        for column in used
    }
    reports = {
        column.name: drift_report(
            features[column.name]["new"],
            features[column.name]["reference"],
            agreement=_agreement(column, columns, pairs, features),
        )
        for column in used
        if column.role in ("student", "encoder")
    }
    lines = [f"NEW {new} against REFERENCE {reference}"]
    for name, report in reports.items():
        lines += ["", f"== {name}", drift_text(report)]
        has_heads = any(c.role == "head" and _belongs(c, name) for c in columns)
        if has_heads and not report["agreement"]:
            lines.append(_NO_TEACHERS)
    lines += ["", *_unreadable(columns, data, settings), f"{time.perf_counter() - begun:.1f} s"]
    return "\n".join(lines), {"new": new, "reference": reference, "encoders": reports}


def _features(subject: EncoderSubject) -> Tensor:
    summary = subject.features(_SPLIT).summary
    if summary is None:
        raise ValueError(f"{subject.name} gave no features to compare")
    return summary


def _teacher_of(head: Column, columns: Sequence[Column]) -> Column | None:
    if head.role != "head":
        return None
    return next((c for c in columns if c.role == "teacher" and c.name == head.head), None)


def _belongs(head: Column, student: str) -> bool:
    return head.name.removesuffix(f"+{head.head}") == student


def _agreement(
    student: Column,
    columns: Sequence[Column],
    teachers: Mapping[str, Column],
    features: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Teacher → cosine of each (reference, new) image."""
    found = {}
    for head in columns:
        if head.name not in teachers or not _belongs(head, student.name):
            continue
        teacher = teachers[head.name].name
        old, fresh = (
            prediction_cosine(features[head.name][name], features[teacher][name])
            for name in ("reference", "new")
        )
        found[teacher] = (old, fresh)
    return found


def _unreadable(
    columns: Sequence[Column], data: Mapping[str, EvalDataset], settings: EvaluateSettings
) -> list[str]:
    lines = []
    for name, of_set in data.items():
        subject = EncoderSubject(columns[0], of_set, settings.extraction)
        keys = subject.note_faults(_SPLIT, "summary", size_for(columns[0], of_set))
        if keys:
            named = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            lines.append(f"{len(keys)} unreadable of {name}, left out: {named}")
    return lines
