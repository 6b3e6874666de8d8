"""What every task on labelled images shares: checks, rows, and what is said of the answers.

Shapes: M images of a split, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multikd.evaluation.groups import Statistic, group_scores, metadata_column
from multikd.evaluation.metrics import confusion_matrix, mean_class_accuracy, per_class_accuracy
from multikd.evaluation.task import EncodedSplit, EvalSplit, Subject
from multikd.types import EncoderSpec, TokenType

Features = Literal["summary", "patch_mean", "both"]
FEATURES: tuple[Features, ...] = ("summary", "patch_mean", "both")
# A confusion matrix of more classes can't be read, and would fill the results file.
CONFUSION_CLASSES = 100


@dataclass(frozen=True)
class LabelledRows:
    """The readable, labelled images of a split, as one encoder sees them.

    Attributes:
        x: float32 ``(M, D)``.
        y: int64 ``(M,)``, or float ``(M, K)`` of 0 and 1.
        kept: int64 ``(M,)``, their places in the split.
    """

    x: Tensor
    y: Tensor
    kept: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> LabelledRows:
        """Rows of which every one counts."""
        return cls(x, y, torch.arange(len(x)))


def tokens_for(features: Features) -> tuple[TokenType, ...]:
    """What must be extracted for ``features``."""
    return {"summary": ("summary",), "patch_mean": ("patches",), "both": ("summary", "patches")}[
        features
    ]  # type: ignore[return-value]


def check_features(features: Features, task: str, specs: Mapping[str, EncoderSpec]) -> None:
    """Refuse an encoder without the tokens that ``features`` needs.

    Raises:
        ValueError: an unknown choice, or an encoder that lacks them.
    """
    if features not in FEATURES:
        raise ValueError(f"{task} takes features from {', '.join(FEATURES)}, received {features!r}")
    for name, spec in specs.items():
        if features != "summary" and spec.widths.patches is None:
            raise ValueError(
                f"{task} with features={features} reads patch tokens, which the encoder {name!r} "
                "does not have: use features=summary, or leave the encoder out"
            )


def labelled_rows(subject: Subject, split: str, features: Features = "summary") -> LabelledRows:
    """Rows of a split that can be read and have a label.

    ``both`` is the summary beside the mean patch, each scaled to unit mean length over the split,
    so that neither outweighs the other.

    Raises:
        ValueError: no such image.
    """
    data = subject.splits[split]
    if data.labels is None:
        raise ValueError(f"the split {data.name} has no labels")
    encoded = subject.features(split, tokens_for(features))
    faulty = set(encoded.faults)
    readable = torch.tensor([key not in faulty for key in data.keys], dtype=torch.bool)
    labels = data.labels.cpu()
    if labels.ndim == 1:
        readable &= labels >= 0
    kept = readable.nonzero().flatten()
    if not len(kept):
        raise ValueError(f"the split {data.name} has no image that is readable and has a label")
    return LabelledRows(_rows(encoded, features, kept, data.name), labels[kept], kept)


def class_names(splits: Mapping[str, EvalSplit], names: Sequence[str]) -> list[str]:
    """Names of the classes of a data set: the class list, else numbers up to the largest label."""
    for name in names:
        if name in splits and splits[name].classes:
            return [str(c) for c in splits[name].classes or ()]
    largest = -1
    for name in names:
        if name in splits:
            labels = splits[name].labels
            if labels is not None and len(labels):
                largest = max(
                    largest, int(labels.max()) if labels.ndim == 1 else labels.shape[1] - 1
                )
    return [str(i) for i in range(largest + 1)]


def check_labels(
    splits: Mapping[str, EvalSplit], task: str, *, images_per_class: int = 1, purpose: str = ""
) -> None:
    """Refuse labels that a classifier can't be fitted to, or asked about.

    Args:
        splits: with ``train`` and ``test`` (and perhaps ``val``), none of them empty.
        task: for messages.
        images_per_class: of the train split, at least.
        purpose: what needs more than one.

    Raises:
        ValueError: one sentence: which labels, and the remedy.
    """
    names = class_names(splits, ("train", "test", "val"))
    counts = {}
    for name in ("train", "val", "test"):
        if name not in splits:
            continue
        split = splits[name]
        labels = _single_labels(split, task)
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= len(names):
            raise ValueError(
                f"the labels of {split.name} go from {low} to {high}, outside its list of "
                f"{len(names)} classes (0 to {len(names) - 1}, -1 for none): correct the labels, "
                "or give the whole list"
            )
        if split.classes and [str(c) for c in split.classes] != names:
            raise ValueError(
                f"the splits of {split.name.split('/')[0]} name different classes "
                f"({len(names)} and {len(split.classes)} names): give all splits one list"
            )
        counts[name] = torch.bincount(labels[labels >= 0], minlength=len(names))
        if not int(counts[name].sum()):
            raise ValueError(f"no image of {split.name} has a label, and {task} needs them")
    train = counts["train"]
    if int((train > 0).sum()) < 2:
        raise ValueError(
            f"{splits['train'].name} has images of {int((train > 0).sum())} class, and {task} "
            "needs two or more"
        )
    for name in ("test", "val"):
        if name in counts:
            missing = ((counts[name] > 0) & (train == 0)).nonzero().flatten().tolist()
            if missing:
                raise ValueError(
                    f"{_some(names, missing)} of {splits[name].name} has no image in "
                    f"{splits['train'].name}, so no answer could be right: add images, or leave "
                    "the class out"
                )
    few = ((train > 0) & (train < images_per_class)).nonzero().flatten().tolist()
    if few:
        raise ValueError(
            f"{_some(names, few)} has {int(train[few[0]])} image in {splits['train'].name}, and "
            f"{purpose or task} needs {images_per_class} of every class"
        )


def check_multi_labels(splits: Mapping[str, EvalSplit], task: str, positives: int) -> None:
    """The same for several labels an image.

    Args:
        splits: with ``train`` and ``test``.
        task: for messages.
        positives: images with and without each label that the train split needs.

    Raises:
        ValueError: one sentence.
    """
    names = class_names(splits, ("train", "test", "val"))
    for name in ("train", "val", "test"):
        if name not in splits:
            continue
        split = splits[name]
        labels = split.labels
        if labels is None or labels.ndim != 2:
            raise ValueError(
                f"{task} needs several labels an image, a 0 or 1 for every class, and {split.name} "
                f"has {'none' if labels is None else 'one'}: use LinearProbe"
            )
        if labels.shape[1] != len(names):
            raise ValueError(
                f"the labels of {split.name} are of {labels.shape[1]} classes and its list has "
                f"{len(names)}: correct one of them"
            )
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(f"the labels of {split.name} must be 0 or 1")
    train = splits["train"].labels
    test = splits["test"].labels
    if train is None or test is None:
        return
    with_it, without = train.sum(dim=0), (1 - train).sum(dim=0)
    few = ((with_it < positives) | (without < positives)).nonzero().flatten().tolist()
    if few:
        raise ValueError(
            f"{_some(names, few)} has {int(with_it[few[0]])} images with it and "
            f"{int(without[few[0]])} without in {splits['train'].name}, and {task} needs "
            f"{positives} of each"
        )
    if not bool(test.any()):
        raise ValueError(f"no image of {splits['test'].name} has any label")


def check_groups(columns: Sequence[str], splits: Mapping[str, EvalSplit]) -> None:
    """Refuse a column of metadata that the test split lacks.

    Raises:
        ValueError: see :func:`metadata_column`.
    """
    for column in columns:
        metadata_column(splits["test"].metadata, column, splits["test"].name)


def by_groups(
    columns: Sequence[str],
    split: EvalSplit,
    kept: Tensor,
    per_sample: Any,
    statistic: Statistic | None = None,
) -> dict[str, Any]:
    """``details["groups"]``: the metric by group, for every column."""
    found = {}
    for column in columns:
        values = metadata_column(split.metadata, column, split.name)
        some = [values[i] for i in kept.tolist()]
        found[column] = group_scores(per_sample, some, statistic=statistic).details()
    return found


def answer_details(
    answers: Tensor, rows: LabelledRows, classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details that follow from answers alone: by class, and what is confused."""
    per_class = per_class_accuracy(answers, rows.y, len(classes))
    details: dict[str, Any] = {
        "classes": list(classes),
        "per_class": dict(zip(unique(classes), per_class, strict=True)),
    }
    if len(classes) <= CONFUSION_CLASSES:
        details["confusion"] = confusion_matrix(answers, rows.y, len(classes)).tolist()
    return {"mean_per_class": mean_class_accuracy(answers, rows.y, len(classes))}, details


def by_class(
    rows: npt.NDArray[np.float64],
    labels: Tensor,
    names: Sequence[str],
    statistic: Statistic | None = None,
) -> dict[str, float | None]:
    """The metric of every class's images; None where it has none, or none was asked."""
    found: dict[str, float | None] = {}
    for i, name in enumerate(unique(names)):
        some = rows[(labels == i).numpy()]
        value = math.nan
        if len(some):
            value = float(some.mean() if statistic is None else statistic(some))
        found[name] = None if math.isnan(value) else value
    return found


def unique(names: Sequence[str]) -> list[str]:
    """Names that can be keys: a repeated one gets its index."""
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names)]


def _rows(encoded: EncodedSplit, features: Features, kept: Tensor, name: str) -> Tensor:
    parts = []
    if features != "patch_mean":
        if encoded.summary is None:
            raise ValueError(f"the encoder gave no summary of {name}")
        parts.append(encoded.summary[kept].to(torch.float32))
    if features != "summary":
        parts.append(_mean_patches(encoded, kept, name))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p / p.norm(dim=1).mean().clamp(min=1e-12) for p in parts], dim=1)


def _mean_patches(encoded: EncodedSplit, kept: Tensor, name: str) -> Tensor:
    """float32 ``(M, D)``; patches may lie on disk, so some images at a time."""
    patches = encoded.patches
    if patches is None:
        raise ValueError(f"the encoder gave no patch tokens of {name}")
    means = []
    for part in torch.split(kept, 256):
        rows = patches[part] if isinstance(patches, Tensor) else np.asarray(patches[part.numpy()])
        means.append(torch.as_tensor(rows).to(torch.float32).mean(dim=1))
    return torch.cat(means)


def _single_labels(split: EvalSplit, task: str) -> Tensor:
    labels = split.labels
    if labels is None:
        raise ValueError(f"{split.name} has no labels, and {task} needs them")
    if labels.ndim != 1:
        raise ValueError(
            f"{split.name} has several labels an image, and {task} takes one: use MultiLabelProbe"
        )
    return labels.cpu()


def _some(names: Sequence[str], indices: Sequence[int]) -> str:
    """'class x' or 'classes x, y and 7 more' with a verb in the singular after it."""
    first = repr(names[indices[0]])
    return f"class {first}" + (f" (and {len(indices) - 1} more)" if len(indices) > 1 else "")
