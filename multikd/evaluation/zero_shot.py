"""Zero-shot classification: the class whose text is nearest to the image.

After CLIP (Radford et al., arXiv 2103.00020, section 3.1): each class is the normalised mean over
prompt templates of its normalised text embeddings; an image goes to the class of largest cosine.

Shapes: M images, K classes, D width of the joint space.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.evaluation.labelled import (
    answer_details,
    by_groups,
    check_groups,
    labelled_rows,
)
from multikd.evaluation.task import EvalSplit, Subject, Task, TaskResult
from multikd.types import EncoderSpec

TEMPLATES = ("a photo of a {}.",)


def zero_shot_scores(features: Tensor, text_weights: Tensor) -> Tensor:
    """Cosine of every image with every class, float64 ``(M, K)``.

    Args:
        features: ``(M, D)``.
        text_weights: ``(K, D)``, any scale.

    Raises:
        ValueError: widths that differ, or features that are not finite.
    """
    if features.ndim != 2 or text_weights.ndim != 2 or features.shape[1] != text_weights.shape[1]:
        raise ValueError(
            "images and texts must be (M, D) and (K, D) of one joint space, received "
            f"{tuple(features.shape)} and {tuple(text_weights.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite, received NaN or infinity")
    images, texts = (
        torch.nn.functional.normalize(rows.detach().cpu().to(torch.float64), dim=1)
        for rows in (features, text_weights)
    )
    return images @ texts.T


@dataclass
class ZeroShot(Task):
    """Top-1 accuracy of the nearest class text; encoders without a text tower are left out.

    Args:
        data: a data set with labels.
        templates: prompts with ``{}`` where the class name goes.
        classes: names in the order of the labels, where the data set's own are not words.
        groups: columns of the test split's metadata to score by.
    """

    data: str
    templates: tuple[str, ...] = TEMPLATES
    classes: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()

    metric = "top1"
    source = "Radford et al. 2021, arXiv 2103.00020, section 3.1"
    splits = ("test",)

    def __post_init__(self) -> None:
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong or not self.templates:
            raise ValueError(
                "a prompt template needs {} where the class name goes, received "
                f"{wrong[0] if wrong else 'none'!r}"
            )

    def applies(self, subject: Subject) -> bool:
        """The encoder has a text tower."""
        return subject.has_texts

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses data without labels or class names, and names that are given twice."""
        super().check(splits, specs)
        split = splits["test"]
        if split.labels is None or split.labels.ndim != 1 or not bool((split.labels >= 0).any()):
            raise ValueError(
                f"ZeroShot on {self.data!r} needs one label for each image, which {split.name} "
                "lacks: give labelled data"
            )
        names = self._names(split)
        top = int(split.labels.max())
        if top >= len(names):
            raise ValueError(
                f"ZeroShot on {self.data!r}: labels go up to {top}, and there are {len(names)} "
                "class names: list one for each label as classes in the task file"
            )
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"ZeroShot on {self.data!r}: the class name {twice[0]!r} stands twice, and texts "
                "cannot tell the two apart: name them differently"
            )
        check_groups(self.groups, splits)

    def score(self, subject: Subject) -> TaskResult:
        """Top-1 over labelled, readable test images."""
        split = subject.splits["test"]
        names = self._names(split)
        weights = subject.text_weights(names, self.templates)
        subject.features("test")
        split = subject.splits["test"]  # without what could not be read
        begun = time.perf_counter()
        test = labelled_rows(subject, "test")
        scores = zero_shot_scores(test.x, weights)
        answers = scores.argmax(dim=1)
        right = (answers == test.y).double().numpy()
        metrics, details = answer_details(answers, test, names)
        top = scores.topk(min(5, len(names)), dim=1).indices
        metrics["top5"] = float((top == test.y[:, None]).any(dim=1).double().mean())
        if self.groups:
            details["groups"] = by_groups(self.groups, split, test.kept, right)
        return TaskResult(
            float(right.mean()),
            right,
            metrics=metrics,
            details=details,
            seconds=time.perf_counter() - begun,
        )

    def _names(self, split: EvalSplit) -> Sequence[str]:
        names = self.classes or split.classes
        if not names:
            raise ValueError(
                f"ZeroShot on {self.data!r} needs class names, which {split.name} lacks: list them "
                "as classes in the task file"
            )
        return names
