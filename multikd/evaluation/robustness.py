"""Accuracy of a clean linear probe on images that were corrupted, attacked or resized."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from multikd.errors import MissingExtraError
from multikd.evaluation.corruptions import (
    CORRUPTIONS,
    LEAST_SIDE,
    SEVERITIES,
    check_corruptions,
    corrupt,
    mean_corruption_error,
    require_corruptions,
)
from multikd.evaluation.labelled import (
    by_groups,
    check_groups,
    check_labels,
    class_names,
    labelled_rows,
)
from multikd.evaluation.probe_head import ProbedEncoder, evenly, fit_probed, images_of
from multikd.evaluation.task import EvalSplit, Subject, Task, TaskResult
from multikd.types import EncoderSpec


@dataclass
class _Probed(Task):
    """What tasks on changed test images share: a probe fitted on clean features, some images.

    Attributes:
        limit: test images that are changed, evenly spaced over the split.
        batch_size: images encoded at once.
        c: inverse strength of the probe's penalty; None chooses it on a part of the train split.
        groups: columns of the test split's metadata to score by.
        seed: of draws.
    """

    data: str
    limit: int = 1000
    batch_size: int = 32
    c: float | None = 1.0
    groups: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch_size < 1:
            raise ValueError(
                f"limit and batch_size must be at least 1, received {self.limit} and "
                f"{self.batch_size}"
            )

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses labels that can't be scored."""
        super().check(splits, specs)
        check_labels(splits, type(self).__name__)
        check_groups(self.groups, splits)

    def _start(self, subject: Subject) -> tuple[ProbedEncoder, list[int], Tensor, list[str]]:
        """Probe, places of the test images, their labels, names of classes."""
        names = class_names(subject.splits, ("train", "test"))
        probed = fit_probed(subject, len(names), self.c, self.seed).eval()
        test = labelled_rows(subject, "test")
        chosen = evenly(len(test.kept), self.limit)
        return probed, test.kept[chosen].tolist(), test.y[chosen], names

    def _grouped(self, subject: Subject, places: list[int], rows: Any) -> dict[str, Any]:
        if not self.groups:
            return {}
        split = subject.splits["test"]
        return {"groups": by_groups(self.groups, split, torch.tensor(places), rows)}


@dataclass
class Corruptions(_Probed):
    """Top-1 on corrupted images, mean over corruptions and severities (ImageNet-C).

    1 − value is the unnormalised mean corruption error. With a reference the metric ``mCE`` is the
    paper's, 1 being an encoder as bad as the reference. The corruptions are applied to the view
    that the encoder sees, as in ImageNet-C.

    Args:
        corruptions: by name; all fifteen by default.
        severities: 1 to 5.
        reference: corruption → error rate at each of the severities, of the encoder that mCE is
            relative to (AlexNet in the paper): ``details["errors"]`` of an earlier results.json.
    """

    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    reference: dict[str, list[float]] | None = None

    metric = "corrupted top1"
    source = "Hendrycks & Dietterich 2019, arXiv 1903.12261"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_corruptions(self.corruptions, self.severities)
        if self.reference is not None:
            ones = {name: [1.0] * len(self.severities) for name in self.corruptions}
            mean_corruption_error(ones, self.reference)  # same names and severities

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses encoders that see fewer than 32 px, and a library that is not there."""
        super().check(splits, specs)
        for name, spec in specs.items():
            if min(spec.image_size) < LEAST_SIDE:
                raise ValueError(
                    f"Corruptions on {self.data!r} need images of at least {LEAST_SIDE} px, and "
                    f"the encoder {name!r} sees {min(spec.image_size)}: leave one of them out"
                )
        require_corruptions()

    def score(self, subject: Subject) -> TaskResult:
        """Mean top-1; ``per_sample`` is each image's share of right answers."""
        probed, places, labels, _ = self._start(subject)
        begun = time.perf_counter()
        at = {place: i for i, place in enumerate(places)}
        right = torch.zeros(len(places), len(self.corruptions), len(self.severities))
        clean = torch.zeros(len(places))
        for found, images in images_of(
            subject, "test", places, subject.spec.image_size, self.batch_size
        ):
            rows = torch.tensor([at[place] for place in found])
            clean[rows] = _right(probed, images, labels[rows])
            pixels = images.permute(0, 2, 3, 1).numpy()
            for i, name in enumerate(self.corruptions):
                for j, severity in enumerate(self.severities):
                    changed = np.stack(
                        [
                            corrupt(image, name, severity, self.seed + place)
                            for image, place in zip(pixels, found, strict=True)
                        ]
                    )
                    views = torch.from_numpy(changed).permute(0, 3, 1, 2)
                    right[rows, i, j] = _right(probed, views, labels[rows])
        shares = right.double()
        per_sample = shares.mean(dim=(1, 2)).numpy()
        by_name = shares.mean(dim=(0, 2)).tolist()
        errors = {
            name: (1 - shares[:, i].mean(dim=0)).tolist() for i, name in enumerate(self.corruptions)
        }
        relative = (
            {} if self.reference is None else {"mCE": mean_corruption_error(errors, self.reference)}
        )
        return TaskResult(
            float(per_sample.mean()),
            per_sample,
            metrics={
                "clean top1": float(clean.double().mean()),
                **relative,
                **dict(zip(self.corruptions, by_name, strict=True)),
            },
            details={
                "errors": errors,
                "severities": list(self.severities),
                "images": len(places),
                **self._grouped(subject, places, per_sample),
            },
            seconds=time.perf_counter() - begun,
        )


@dataclass
class Adversarial(_Probed):
    """Top-1 of encoder and linear probe under an attack that sees both (white box).

    FGSM (Goodfellow et al. 2015) or PGD with a random start (Madry et al. 2018) in the L∞ ball, by
    the Adversarial Robustness Toolbox, on images in [0, 1].

    Args:
        attack: ``fgsm`` or ``pgd``.
        epsilon: radius in 255ths.
        steps: of PGD.
        step_size: of PGD in 255ths; None takes 2.5 · epsilon / steps (Madry et al.).
    """

    limit: int = 256
    attack: Literal["fgsm", "pgd"] = "pgd"
    epsilon: float = 1.0
    steps: int = 10
    step_size: float | None = None

    metric = "attacked top1"
    source = "Madry et al. 2018, arXiv 1706.06083; FGSM: Goodfellow et al. 2015, arXiv 1412.6572"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.epsilon if self.step_size is None else self.step_size
        if self.attack not in ("fgsm", "pgd") or not 0 < self.epsilon <= 255 or not size > 0:
            raise ValueError(
                "an attack is fgsm or pgd with epsilon above 0 and up to 255 and steps above 0, "
                f"received {self.attack!r}, {self.epsilon} and {self.step_size}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, received {self.steps}")

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses to go on without the library."""
        super().check(splits, specs)
        _art()

    def score(self, subject: Subject) -> TaskResult:
        """Top-1 on the attacked images; ``clean top1`` of the same ones in the metrics."""
        probed, places, labels, names = self._start(subject)
        begun = time.perf_counter()
        at = {place: i for i, place in enumerate(places)}
        clean, attacked = torch.zeros(len(places)), torch.zeros(len(places))
        moved = 0.0
        size = subject.spec.image_size
        for found, images in images_of(subject, "test", places, size, self.batch_size):
            rows = torch.tensor([at[place] for place in found])
            pixels = images.float() / 255
            changed = self.attacked(probed, pixels, labels[rows], len(names))
            moved = max(moved, float((changed - pixels).abs().max()))
            with torch.no_grad():
                clean[rows] = _hits(probed(pixels), labels[rows])
                attacked[rows] = _hits(probed(changed), labels[rows])
        per_sample = attacked.double().numpy()
        return TaskResult(
            float(per_sample.mean()),
            per_sample,
            metrics={"clean top1": float(clean.double().mean())},
            details={
                "images": len(places),
                "largest change": 255 * moved,
                **self._grouped(subject, places, per_sample),
            },
            seconds=time.perf_counter() - begun,
        )

    def attacked(
        self, probed: ProbedEncoder, images: Tensor, labels: Tensor, classes: int
    ) -> Tensor:
        """Images in [0, 1], at most ``epsilon``/255 away in every value."""
        evasion, classification = _art()
        classifier = classification.PyTorchClassifier(
            probed,
            torch.nn.CrossEntropyLoss(),
            tuple(images.shape[1:]),
            classes,
            clip_values=(0.0, 1.0),
            # The probe follows its encoder, wherever that is.
            device_type="cpu",
        )
        radius = self.epsilon / 255
        if self.attack == "fgsm":
            attack = evasion.FastGradientMethod(
                classifier, eps=radius, batch_size=len(images), num_random_init=0
            )
        else:
            step = self.step_size or 2.5 * self.epsilon / self.steps
            attack = evasion.ProjectedGradientDescentPyTorch(
                classifier,
                eps=radius,
                eps_step=min(step / 255, radius),
                max_iter=self.steps,
                num_random_init=1,
                batch_size=len(images),
                verbose=False,
            )
        one_hot = torch.nn.functional.one_hot(labels, classes).float().numpy()
        with _seeded(self.seed):
            changed = attack.generate(images.numpy(), one_hot)
        return torch.from_numpy(np.asarray(changed, dtype=np.float32))


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1).cpu() == labels).float()


def _right(probed: ProbedEncoder, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return _hits(probed(images.float() / 255), labels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's and PyTorch's global generators, from a seed, afterwards as they were."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def _art() -> tuple[Any, Any]:
    try:
        from art.attacks import evasion
        from art.estimators import classification
    except ImportError as error:
        raise MissingExtraError(
            "adversarial-robustness-toolbox", "robustness", "attacking a probe"
        ) from error
    return evasion, classification
