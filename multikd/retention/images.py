"""Where the images of a split come from: shards, folders, tables, IDX, torchvision, dense folders.

A source lists keys, labels and classes once, and hands out decoded images one by one, in whichever
thread asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from multikd.data.decode import (
    DEFAULT_MAX_PIXELS,
    IMAGE_EXTENSIONS,
    SampleFault,
    decode_image,
    decode_label,
    find_image,
)
from multikd.data.origins import Origin, open_origin
from multikd.data.origins.base import Listing
from multikd.data.origins.idx import IdxOrigin
from multikd.data.origins.table import TableOrigin, read_table
from multikd.data.origins.torchvision import TorchvisionOrigin
from multikd.data.remote import is_remote
from multikd.data.sources import ShardSource
from multikd.data.specs import dataset_facts

Dense = Literal["mask", "depth"]


class ImageSource(ABC):
    """The images of one split.

    Attributes:
        keys: one an image.
        labels: int64 ``(M,)`` with −1 for none, float ``(M, K)`` of 0 and 1, or None.
        classes: K names, where they are known.
        dense: what ``target`` gives, if anything.
    """

    keys: Sequence[str]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    dense: Dense | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The upright image, RGB or (where that is all there is) grey ``L``.

        Raises:
            SampleFault: it can't be read.
        """

    def pictures(self, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8] | None:
        """These images as one array ``(B, H, W[, 3])``, where the source is one; else None."""
        del indexes
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with images, their order and their number; labels don't count."""

    def record(self, index: int) -> dict[str, Any]:
        """What the source knows of an image beside its label: columns for scores by group."""
        del index
        return {}

    def target(self, index: int) -> Image.Image:
        """Mask (mode ``I``: class of each pixel, 255 = ignored) or depth (mode ``F``, metres)."""
        raise ValueError(f"{type(self).__name__} has no masks and no depths")

    def check(self) -> None:  # noqa: B027  most sources have nothing to look for
        """Look for what would fail later; raises ValueError."""


class ShardImages(ImageSource):
    """Samples of webdataset shards; several labels an image are numbered as ``classes``."""

    def __init__(
        self,
        urls: str | list[str],
        max_pixels: int = DEFAULT_MAX_PIXELS,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.source = ShardSource(urls)
        self.max_pixels = max_pixels
        self._places = [
            (shard, number)
            for shard, count in enumerate(self.source.lengths.tolist())
            for number in range(count)
        ]
        self.keys = [key for index in self.source.indexes for key in index.keys]
        facts = dataset_facts(self.source.urls[0])
        own = facts.get("classes")
        self.classes = tuple(map(str, own)) if own else None
        self._given = classes
        self._extensions = {ext for index in self.source.indexes for ext in index.extensions}
        self.labels = self._read_labels()

    def _read_labels(self) -> Tensor | None:
        if not self._extensions & {"cls", "json"}:
            return None
        labels: list[int] = []
        several: list[list[Any] | None] = []
        for shard, number in self._places:
            try:
                members = self.source.read_members(shard, number, ["cls", "json"])
                record = _json(members)
                several.append(record.get("labels"))
                labels.append(decode_label(members))
            except SampleFault:
                labels.append(-1)  # counted as a fault when the image is read
                several.append(None)
        if any(isinstance(entry, list) for entry in several):
            return self._multi_hot(several)
        return torch.tensor(labels, dtype=torch.int64)

    def _multi_hot(self, several: list[list[Any] | None]) -> Tensor:
        names = [[str(name) for name in entry or ()] for entry in several]
        labels, self.classes = multi_hot(names, self._given or self.classes)
        return labels

    def read(self, index: int) -> Image.Image:
        """See the base class."""
        shard, number = self._places[index]
        extensions = self.source.indexes[shard].extensions
        wanted = [e for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        members = self.source.read_members(shard, number, [*wanted, "cls"])
        decode_label(members)  # a label that can't be read is a fault of the sample
        return decode_image(find_image(members), self.max_pixels)

    def record(self, index: int) -> dict[str, Any]:
        """The sample's ``json`` member."""
        if "json" not in self._extensions:
            return {}
        try:
            return _json(self.source.read_members(*self._places[index], ["json"]))
        except SampleFault:
            return {}

    def fingerprint(self) -> str:
        """Of names, sizes, keys and (of local shards) modification times."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        for url in self.source.urls:
            if not is_remote(url):
                digest.update(str(os.stat(url).st_mtime_ns).encode())
        return digest.hexdigest()


class OriginImages(ImageSource):
    """Anything that shards could be written from, read in place."""

    def __init__(
        self, origin: Origin, listing: Listing, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        self.origin = origin
        self.listing = listing
        self.max_pixels = max_pixels
        self.keys = listing.names
        self.classes = tuple(listing.classes) or None
        if any(label >= 0 for label in listing.labels):
            self.labels = torch.tensor(listing.labels, dtype=torch.int64)
        self._columns: dict[str, list[str]] = {}
        if isinstance(origin, TableOrigin):
            columns = read_table(origin.table)
            if "labels" in columns:
                names = [[n.strip() for n in t.split(";") if n.strip()] for t in columns["labels"]]
                self.labels, self.classes = multi_hot(names, origin.classes or None)
            known = ("path", "label", "labels")
            self._columns = {name: c for name, c in columns.items() if name not in known}
        self._direct = isinstance(origin, IdxOrigin) or (
            isinstance(origin, TorchvisionOrigin) and origin.pictures
        )

    def read(self, index: int) -> Image.Image:
        """See the base class."""
        if self._direct:
            picture: Image.Image = self.origin.picture(index)  # type: ignore[attr-defined]
            return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
        return decode_image(self.origin.read(index, self.keys[index]), self.max_pixels)

    def pictures(self, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8] | None:
        """See the base class."""
        return self.origin.pixels[indexes] if isinstance(self.origin, IdxOrigin) else None

    def record(self, index: int) -> dict[str, Any]:
        """Further columns of a table."""
        return {name: column[index] for name, column in self._columns.items()}

    def fingerprint(self) -> str:
        """Of the source, names, sizes and (of files) modification times."""
        listing = self.listing
        digest = hashlib.sha256("\n".join(listing.names).encode("utf-8", "surrogateescape"))
        digest.update(repr(listing.sizes).encode())
        digest.update(type(self.origin).__name__.encode())
        root = getattr(self.origin, "root", None)
        if isinstance(self.origin, TorchvisionOrigin):
            facts = (self.origin.name, self.origin.split, os.stat(str(root)).st_mtime_ns)
            digest.update(repr(facts).encode())
        elif not isinstance(self.origin, IdxOrigin):
            folder = root or os.path.dirname(str(getattr(self.origin, "table", "")))
            for name in listing.names:
                path = os.path.join(str(folder), name)
                if os.path.isfile(path):
                    digest.update(str(os.stat(path).st_mtime_ns).encode())
        return digest.hexdigest()


class DenseFolder(ImageSource):
    """Pairs of image and target files.

    Args:
        pairs: (key, image, target).
        dense: what the targets are.
        convert: value of a target's pixel → class or metres.
        classes: names.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, Path, Path]],
        dense: Dense,
        *,
        scale: float = 1.0,
        zero_is_ignored: bool = False,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.keys = [key for key, _, _ in pairs]
        self.dense = dense
        self.scale = scale
        self.zero_is_ignored = zero_is_ignored
        self.classes = classes

    def read(self, index: int) -> Image.Image:
        """See the base class."""
        return decode_image(_bytes(self.pairs[index][1]))

    def target(self, index: int) -> Image.Image:
        """See the base class."""
        key, _, path = self.pairs[index]
        try:
            with Image.open(path) as image:
                if image.mode not in ("P", "L", "1") and not image.mode.startswith(("I", "F")):
                    raise ValueError(
                        f"the {self.dense} {path} of {key} is a {image.mode} image: expected an "
                        "index or grey PNG, one value a pixel"
                    )
                values = torch.from_numpy(_array(image).astype("float32"))
        except OSError as error:
            raise ValueError(
                f"the {self.dense} of {key} can't be read ({error}): {path}"
            ) from error
        if self.dense == "depth":
            return Image.fromarray((values / self.scale).numpy())
        classes = values.to(torch.int32)
        if self.zero_is_ignored:
            classes = torch.where(classes == 0, 255, classes - 1)
        return Image.fromarray(classes.numpy())

    def fingerprint(self) -> str:
        """Of the images' names, sizes and modification times."""
        digest = hashlib.sha256()
        for key, image, _ in self.pairs:
            stat = image.stat()
            digest.update(f"{key}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check(self) -> None:
        """Every target has its image's size (headers alone), a sample's values are classes."""
        for key, image, target in self.pairs:
            try:
                with Image.open(image) as a:
                    size = a.size
                    # Turned by its EXIF mark, as the image is when it is decoded.
                    if a.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                        size = (size[1], size[0])
            except Exception:
                continue  # a corrupt image is a fault, counted and named later
            try:
                with Image.open(target) as b:
                    other = b.size
            except OSError as error:
                raise ValueError(f"the {self.dense} of {key} can't be read: {target}") from error
            if size != other:
                raise ValueError(
                    f"the {self.dense} of {key} is {other[0]}×{other[1]} and its image "
                    f"{size[0]}×{size[1]}: expected equal sizes ({target})"
                )
        if self.dense == "mask" and self.classes:
            for index in range(0, len(self), max(1, len(self) // 50)):
                values = _array(self.target(index))
                wrong = values[(values < 0) | ((values >= len(self.classes)) & (values != 255))]
                if wrong.size:
                    raise ValueError(
                        f"the mask of {self.keys[index]} has the class {int(wrong[0])}, outside "
                        f"the {len(self.classes)} classes of the data set: correct the class list"
                    )


def open_images(
    text: str | list[str],
    classes: Sequence[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> ImageSource:
    """The images that a task file names.

    Args:
        text: shards (``.tar``, a folder of them, a brace range, an address, a list of these), an
            image folder, ``torchvision:NAME:ROOT[:SPLIT]``, ``idx:IMAGES:LABELS``, a table,
            ``ade20k:ROOT:SPLIT``, ``voc:ROOT:SPLIT``, ``masks:IMAGES:MASKS``,
            ``depth:IMAGES:DEPTHS[:UNITS]`` or ``nyud:ROOT[:LIST]``.
        classes: names in the order of their numbers.
        max_pixels: larger images are faults.

    Raises:
        ValueError: nothing is there, or it is not what it should be.
    """
    from multikd.retention.dense import DENSE_KINDS, open_dense

    if isinstance(text, list):
        return ShardImages([os.path.expanduser(url) for url in text], max_pixels, classes)
    kind, _, rest = text.partition(":")
    if kind in DENSE_KINDS and rest:
        return open_dense(kind, rest, tuple(classes) if classes else None)
    if _is_shards(text):
        return ShardImages(os.path.expanduser(text), max_pixels, classes)
    origin = open_origin(text, classes)
    return OriginImages(origin, origin.list_items(), max_pixels)


def multi_hot(
    names: Sequence[Sequence[str]], classes: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Class names (or numbers, as text) of each image → float ``(M, K)`` of 0 and 1, K names."""
    found = sorted({name for entry in names for name in entry})
    if classes is None and all(name.isdigit() for name in found):
        classes = [str(n) for n in range(max(map(int, found), default=-1) + 1)]
    known = tuple(classes or found)
    number = {name: i for i, name in enumerate(known)} | {
        str(i): i for i in range(len(known)) if str(i) not in known
    }
    labels = torch.zeros(len(names), len(known))
    for row, entry in enumerate(names):
        for name in entry:
            if name not in number:
                raise ValueError(
                    f"the label {name!r} is outside the class list of {len(known)} names: "
                    "correct the labels or the classes of the task file"
                )
            labels[row, number[name]] = 1.0
    return labels, known


def _is_shards(text: str) -> bool:
    if is_remote(text) or text.endswith(".tar"):
        return True
    path = Path(text).expanduser()
    return path.is_dir() and any(child.suffix == ".tar" for child in path.iterdir())


def _json(members: dict[str, bytes]) -> dict[str, Any]:
    try:
        record = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleFault("unreadable", f"{path}: {error.strerror or error}") from error


def _array(image: Image.Image) -> Any:
    return np.array(image)


__all__ = ["DenseFolder", "ImageSource", "OriginImages", "ShardImages", "multi_hot", "open_images"]
