"""Data sets of a task file: splits with labels, metadata and targets, seen at any size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from multikd.data.crops import centre_box
from multikd.data.decode import DEFAULT_MAX_PIXELS, SampleFault
from multikd.evaluation.task import SplitName
from multikd.retention.bulk import resize_all
from multikd.retention.digest import combined
from multikd.retention.images import Dense, ImageSource, open_images
from multikd.retention.metadata import read_metadata
from multikd.retention.prefetch import in_threads
from multikd.types import Batch, Fault, Grid

log = logging.getLogger(__name__)

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
NEIGHBOURS = 16  # images after a corrupt one that are tried in its place
_GRACE = 1000


@dataclass
class DataSpec:
    """A data set, as a task file names it. A split's source is any of

    shards (``DIR``, ``x-{000..009}.tar``, an address, a list), an image folder (class = folder),
    ``torchvision:NAME:ROOT[:SPLIT]``, ``idx:IMAGES:LABELS``, a ``.csv``/``.parquet`` with the
    columns ``path`` and ``label`` (or ``labels``: several, divided by ``;``),
    ``ade20k:ROOT:SPLIT``, ``voc:ROOT:SPLIT``, ``masks:IMAGES:MASKS``, ``nyud:ROOT[:LIST]``,
    ``depth:IMAGES:DEPTHS[:UNITS]``.

    Attributes:
        train: source of the labelled images that a probe learns from.
        val: source of images to choose settings on.
        test: source of the images that are scored.
        size: side in pixels at which every encoder sees the images; None: each its own.
        crop: share of the short side that the centre crop keeps (0.875: resize 256, crop 224).
        classes: names in the order of their numbers; None: the source's own.
        metadata: table (``.csv``, ``.parquet``) with a ``key`` column, for scores by group.
        limit: take so many images of each split, evenly spread; None: all.
        max_fault_rate: share of unreadable images past which the evaluation stops.
        max_pixels: larger images are faults.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    size: int | None = None
    crop: float = 1.0
    classes: list[str] | None = None
    metadata: str | None = None
    limit: int | None = None
    max_fault_rate: float = 0.01
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass
class ImageSplit:
    """One split of a data set: what tasks know as ``EvalSplit``.

    Attributes:
        name: ``data set/split``.
        source: the images; row i of the split is image ``rows[i]`` of it.
        rows: int64 ``(M,)``.
        crop: see ``DataSpec``.
        metadata: column → M values.
        classes, labels, keys, dense: see ``EvalSplit``.
    """

    name: str
    source: ImageSource
    rows: npt.NDArray[np.int64]
    crop: float = 1.0
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    labels: Tensor | None = None
    keys: Sequence[str] = field(init=False, repr=False)
    dense: Dense | None = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [self.source.keys[row] for row in self.rows.tolist()]
        self.dense = self.source.dense

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Of the images and their order; labels and metadata don't count."""
        chosen = None if len(self.rows) == len(self.source) else self.rows.tobytes()
        return combined(images=self.source.fingerprint(), rows=chosen)

    def without(self, places: Sequence[int]) -> ImageSplit:
        """The split without these of its images (those that can't be read)."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(places)] = False
        chosen = torch.from_numpy(keep)
        return ImageSplit(
            self.name,
            self.source,
            self.rows[keep],
            self.crop,
            {
                k: [v for v, kept in zip(c, keep, strict=True) if kept]
                for k, c in self.metadata.items()
            },
            self.classes,
            None if self.labels is None else self.labels[chosen],
        )

    # ---------------------------------------------------------------- pixels

    def view(self, index: int, size: Grid) -> npt.NDArray[np.uint8]:
        """One image as its view, uint8 ``(H, W, 3)``.

        Raises:
            SampleFault: it can't be read.
        """
        return self.pixels(index, size).transpose(1, 2, 0)

    def pixels(
        self, index: int, size: Grid, interpolation: str = "bicubic"
    ) -> npt.NDArray[np.uint8]:
        """One image as its view, uint8 ``(3, H, W)``."""
        image = self.source.read(int(self.rows[index]))
        seen = image.resize(
            (size[1], size[0]), _RESAMPLING[interpolation], box=self._box(image.size, size)
        )
        values = np.asarray(seen)
        # A grey image is resized once and not three times: the channels come out the same.
        return (
            np.broadcast_to(values, (3, *values.shape))
            if values.ndim == 2
            else values.transpose(2, 0, 1)
        )

    def target(self, index: int, size: Grid) -> npt.NDArray[Any]:
        """Mask int64 or depth float32 ``(H, W)``, the nearest value at each place of the view."""
        image = self.source.target(int(self.rows[index]))
        seen = image.resize(
            (size[1], size[0]), Image.Resampling.NEAREST, box=self._box(image.size, size)
        )
        return np.array(seen).astype(np.int64 if self.dense == "mask" else np.float32)

    def _box(self, image_size: tuple[int, int], size: Grid) -> tuple[float, float, float, float]:
        resize = (round(size[0] / self.crop), round(size[1] / self.crop))
        return centre_box(image_size, resize, size)

    def batches(
        self,
        size: Grid,
        interpolation: str = "bicubic",
        batch_size: int = 64,
        workers: int = 2,
    ) -> Iterator[Batch]:
        """All images in order. A corrupt one shows a neighbour's pixels and is among the faults."""
        places = np.arange(len(self), dtype=np.int64)
        chunks = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
        return self.chunks(chunks, size, interpolation, workers)

    def chunks(
        self,
        chunks: Sequence[npt.NDArray[np.int64]],
        size: Grid,
        interpolation: str = "bicubic",
        workers: int = 2,
    ) -> Iterator[Batch]:
        """Batches of these places, read ahead by threads (Pillow decodes outside the GIL)."""

        def load(places: npt.NDArray[np.int64]) -> Batch:
            return self._batch(places, size, interpolation)

        return in_threads(load, chunks, workers)

    def _batch(self, places: npt.NDArray[np.int64], size: Grid, interpolation: str) -> Batch:
        faults: list[Fault] = []
        pictures = self.source.pictures(self.rows[places])
        if pictures is not None:
            box = self._box((pictures.shape[2], pictures.shape[1]), size)
            seen = resize_all(pictures, (size[1], size[0]), box, _RESAMPLING[interpolation])
            shown = seen[:, None] if seen.ndim == 3 else seen.transpose(0, 3, 1, 2)
            pixels = np.broadcast_to(shown, (len(places), 3, *size)).copy()
        else:
            pixels = self._one_by_one(places.tolist(), size, interpolation, faults)
        labels = torch.full((len(places),), -1, dtype=torch.int64)
        if self.labels is not None and self.labels.ndim == 1:
            labels = self.labels[torch.from_numpy(places)].to(torch.int64)
        return Batch(
            views=[torch.from_numpy(pixels)],
            labels=labels,
            keys=[self.keys[place] for place in places.tolist()],
            dataset=torch.zeros(len(places), dtype=torch.int64),
            positions=torch.from_numpy(places),
            samples=torch.from_numpy(self.rows[places]),
            faults=faults,
        )

    def _one_by_one(
        self, places: list[int], size: Grid, interpolation: str, faults: list[Fault]
    ) -> npt.NDArray[np.uint8]:
        pixels = np.empty((len(places), 3, *size), dtype=np.uint8)
        for row, place in enumerate(places):
            try:
                pixels[row] = self.pixels(place, size, interpolation)
            except SampleFault as fault:
                faults.append(Fault(fault.cause, self.name, self.keys[place], fault.detail))
                pixels[row] = self._stand_in(place, size, interpolation)
        return pixels

    def _stand_in(self, place: int, size: Grid, interpolation: str) -> npt.NDArray[np.uint8]:
        for step in range(1, min(NEIGHBOURS, len(self) - 1) + 1):
            try:
                return self.pixels((place + step) % len(self), size, interpolation)
            except SampleFault:
                continue
        return np.zeros((3, *size), dtype=np.uint8)


@dataclass
class EvalDataset:
    """A data set of a task file, opened.

    Attributes:
        name: in the task file.
        spec: what the file says of it.
        splits: by name.
    """

    name: str
    spec: DataSpec
    splits: dict[str, ImageSplit]

    def check_faults(self, split: str, faults: int, seen: int) -> None:
        """Stop where too many images can't be read.

        Raises:
            ValueError: past ``max_fault_rate``, counted over at least 1,000 images.
        """
        if faults > self.spec.max_fault_rate * max(seen, _GRACE):
            raise ValueError(
                f"{faults} of {seen} images of {self.name}/{split} can't be read, more than "
                f"max_fault_rate={self.spec.max_fault_rate} allows: correct the data, or raise the "
                "rate in the task file"
            )


def open_data(name: str, spec: DataSpec) -> EvalDataset:
    """Open and check every split of a data set.

    Raises:
        ValueError: one sentence about what is not there or does not fit.
    """
    _check_spec(name, spec)
    classes = None if spec.classes is None else tuple(spec.classes)
    splits: dict[str, ImageSplit] = {}
    sources: dict[str, ImageSource] = {}
    order: tuple[SplitName, ...] = ("train", "val", "test")
    for split in order:
        text = getattr(spec, split)
        if text is None or text == []:
            continue
        where = f"{name}/{split}"
        try:
            source = open_images(text, classes, spec.max_pixels)
            source.check()
        except ValueError as error:
            other = f" (--data {name}.{split}=SOURCE takes another)"
            hint = other if "does not exist" in str(error) else ""
            raise ValueError(f"{where}: {error}{hint}") from error
        sources[split] = source
        if not len(source):
            raise ValueError(f"the split {where} has no images")
        # The first split's classes number the others', too.
        if classes is None and source.classes:
            classes = source.classes
    for split in order:
        if split in sources:
            splits[split] = _split(f"{name}/{split}", sources[split], spec, classes)
    return EvalDataset(name, spec, splits)


def _check_spec(name: str, spec: DataSpec) -> None:
    if not any((spec.train, spec.val, spec.test)):
        raise ValueError(f"the data set {name!r} has no split: give train, val or test")
    if spec.size is not None and spec.size < 1:
        raise ValueError(f"the size of {name!r} must be at least 1 pixel, received {spec.size}")
    if not 0 < spec.crop <= 1:
        raise ValueError(f"the crop of {name!r} must lie in (0, 1], received {spec.crop}")
    if spec.limit is not None and spec.limit < 1:
        raise ValueError(f"the limit of {name!r} must be at least 1 image, received {spec.limit}")
    if not 0 <= spec.max_fault_rate <= 1:
        raise ValueError(
            f"max_fault_rate of {name!r} must be in 0 … 1, received {spec.max_fault_rate}"
        )


def _split(
    where: str, source: ImageSource, spec: DataSpec, classes: tuple[str, ...] | None
) -> ImageSplit:
    rows = np.arange(len(source), dtype=np.int64)
    if spec.limit is not None and spec.limit < len(source):
        rows = np.linspace(0, len(source) - 1, spec.limit).round().astype(np.int64)
    labels = None if source.labels is None else source.labels[torch.from_numpy(rows)]
    if labels is not None and labels.ndim == 1:
        labels = _renumbered(where, labels, source.classes, classes)
    metadata = read_metadata(where, source, rows, spec.metadata)
    return ImageSplit(where, source, rows, spec.crop, metadata, classes, labels)


def _renumbered(
    where: str, labels: Tensor, own: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Tensor:
    """Labels in the numbering of the data set's classes.

    Raises:
        ValueError: a label outside them.
    """
    if classes is None:
        return labels
    if own and own != classes and set(own) <= set(classes):
        table = torch.tensor([classes.index(name) for name in own] + [-1])
        labels = table[labels]  # −1 takes the last entry: none stays none
    wrong = labels[labels >= len(classes)]
    if len(wrong):
        raise ValueError(
            f"{where} has the label {int(wrong[0])}, outside the {len(classes)} classes of the "
            f"data set ({', '.join(classes[:3])}, …): correct the labels or the class list"
        )
    return labels
