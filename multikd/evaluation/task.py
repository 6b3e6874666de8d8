"""The nouns of an evaluation: a task scores a subject, which is one encoder before one data set.

A task knows a protocol and nothing of where encoders, images and cached features come from; the
room ``retention`` opens those and hands a :class:`Subject` to each task.

Shapes: M images of a split, N = h·w patches, D width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from multikd.types import Batch, EncoderSpec, Grid, TokenFeatures, TokenType

SplitName = Literal["train", "val", "test"]


class NotApplicable(ValueError):
    """A task that says nothing of this encoder (no text tower, …): its cell stays empty."""


class Request(NamedTuple):
    """Features that a task will ask for, so that one pass over the images serves all tasks."""

    split: str
    tokens: tuple[TokenType, ...] = ("summary",)
    size: Grid | None = None


class EvalSplit(Protocol):
    """One split of a data set, without any encoder.

    Attributes:
        name: ``data set/split``, for messages.
        keys: M names, one an image.
        labels: int64 ``(M,)`` with −1 for none; float ``(M, K)`` of 0 and 1 for multi-label; None.
        classes: K names, or None.
        metadata: column → M values (text), for scores by group.
        dense: ``mask`` (int64 class of each pixel, 255 = ignored), ``depth`` (float32 metres, 0 or
            less = unknown), or None.
    """

    name: str
    keys: Sequence[str]
    labels: Tensor | None
    classes: Sequence[str] | None
    metadata: Mapping[str, Sequence[str]]
    dense: Literal["mask", "depth"] | None

    def __len__(self) -> int:
        """M."""
        ...

    def fingerprint(self) -> str:
        """Changes when images, their order or their number change."""
        ...

    def batches(self, size: Grid, interpolation: str = "bicubic") -> Iterable[Batch]:
        """The images as uint8 views of ``size`` (H, W), in order; fillers have position −1."""
        ...

    def view(self, index: int, size: Grid) -> npt.NDArray[np.uint8]:
        """One image as its view of ``size``, uint8 ``(H, W, 3)``: what the page shows of it."""
        ...

    def target(self, index: int, size: Grid) -> npt.NDArray[Any]:
        """Mask or depth ``(H, W)`` of an image, cropped and resized as its view (nearest)."""
        ...


@dataclass
class EncodedSplit:
    """A split as one encoder sees it: row i of everything is image i of the split.

    Attributes:
        summary: float32 ``(M, D_s)``, or None where the encoder has none.
        patches: ``(M, N, D_p)``, possibly memory-mapped float16, or None where nobody asked.
        grid: ``(h, w)`` of the patches.
        faults: keys of images that could not be read (their rows are a neighbour's: leave out).
    """

    summary: Tensor | None
    patches: Tensor | npt.NDArray[np.float16] | None = None
    grid: Grid | None = None
    faults: Sequence[str] = ()


class Subject(Protocol):
    """One encoder before one data set: all that a task may ask for.

    Attributes:
        name: of the encoder, as the matrix calls it.
        spec: of the encoder.
        splits: of the data set.
        head: the teacher whose head gives these features; None for the encoder's own.
    """

    name: str
    spec: EncoderSpec
    head: str | None
    splits: Mapping[str, EvalSplit]

    @property
    def fingerprint(self) -> str:
        """Of weights and preprocessing: what cached features depend on."""
        ...

    def features(
        self, split: str, tokens: Sequence[TokenType] = ("summary",), size: Grid | None = None
    ) -> EncodedSplit:
        """Features of a split, extracted once and then read from disk.

        Args:
            split: its name.
            tokens: what is needed. ``summary`` falls back to the mean patch where there is none.
            size: of the images; None takes the encoder's own.
        """
        ...

    def encode(self, images: Tensor) -> TokenFeatures:
        """Float images ``(B, 3, H, W)`` in [0, 1] → features; differentiable in the images."""
        ...

    @property
    def has_texts(self) -> bool:
        """Whether there is a text tower for ``text_weights`` to ask."""
        ...

    def text_weights(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """``(K, D)`` unit rows of the text tower that belongs to this encoder (or head).

        Raises:
            NotApplicable: it has none.
        """
        ...


@dataclass
class TaskResult:
    """What a task says of one subject.

    Attributes:
        value: the task's metric.
        per_sample: ``(M_test,)`` contribution of each test image, so that ``statistic`` of them is
            ``value``; None where the metric is no function of rows.
        statistic: how rows make the value; by default their mean (per_sample may be ``(M, …)``).
        metrics: further figures by name.
        details: JSON values for the page, every key optional (``K`` classes; values as ``value``):
            ``classes`` [K names]; ``per_class`` {class: value}; ``confusion`` K × K counts, truth ×
            answer; ``groups`` {column: {"groups": {group: {"value", "low", "high", "count"}},
            "worst": group, "gap", "gap_low", "gap_high"}}; ``curves`` [{"name", "x", "y",
            "x_label", "y_label"}] (the page draws curves of one name of all encoders together; x
            may be text; y of a share in 0–1).
            ``neighbours`` and ``pca`` are added by the run (retention/gallery.py).
        seconds: what scoring took, extraction left out.
    """

    value: float
    per_sample: npt.NDArray[np.float64] | None = None
    statistic: Callable[[npt.NDArray[np.float64]], float] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Task(ABC):
    """A protocol with its settings, on a data set. Subclasses are dataclasses or plain classes.

    A subclass's constructor takes ``data: str`` (the name of a data set of the task file) first and
    typed settings after it; the task file names it by class.

    Attributes:
        data: name of the data set.
        metric: of the value, for instance ``top1``.
        unit: ``%`` where the value is a share in 0–1 to be shown × 100, else what it is in.
        higher_is_better: whether more is better.
        in_mean: whether the share of the best teacher enters the mean over tasks: of scores of a
            task, not of how well probabilities are calibrated, which no task is solved by.
        tokens: what ``check`` demands of an encoder.
        splits: what ``check`` demands of the data set.
        compares: whether ``score`` compares with teachers; the runner then sets ``teachers``
            (teacher → its subject before the same data set) ahead of ``score``.
    """

    data: str
    metric: ClassVar[str]
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    in_mean: ClassVar[bool] = True
    tokens: ClassVar[tuple[TokenType, ...]] = ("summary",)
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    compares: ClassVar[bool] = False
    teachers: Mapping[str, Subject]

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """What ``score`` will ask of this encoder's subject: extracted before any task runs.

        What is not named here is extracted when it is asked for, by one process alone.
        """
        del spec
        return [Request(split, self.tokens) for split in self.splits]

    def applies(self, subject: Subject) -> bool:
        """Whether the protocol says anything of this encoder; if not its cell stays empty."""
        del subject
        return True

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Refuse what can't be scored, before anything is extracted.

        Args:
            splits: of the data set.
            specs: encoder → what is known of it.

        Raises:
            ValueError: one sentence: what is missing or wrong, and the remedy.
        """
        for split in self.splits:
            if split not in splits:
                raise ValueError(
                    f"{type(self).__name__} on {self.data!r} needs a {split} split, which the data "
                    f"set lacks (it has {sorted(splits)}): give it in the task file"
                )
            if len(splits[split]) == 0:
                raise ValueError(f"the split {splits[split].name} has no images")
        for name, spec in specs.items():
            if "patches" in self.tokens and spec.widths.patches is None:
                raise ValueError(
                    f"{type(self).__name__} on {self.data!r} reads patch tokens, which the encoder "
                    f"{name!r} does not have: leave out the task or the encoder"
                )

    @abstractmethod
    def score(self, subject: Subject) -> TaskResult:
        """Score one encoder on the data set."""
