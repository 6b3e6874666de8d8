"""A classification data set of torchvision as an origin."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from multikd.data.decode import SampleFault
from multikd.data.origins.base import Listing, encode_png, read_file
from multikd.errors import unknown_name


@dataclass
class TorchvisionOrigin:
    """A classification data set of torchvision that is already on disk; nothing is downloaded.

    Where the data set keeps image files, their bytes are handed on as they are; else PNG.
    """

    name: str
    root: str
    split: str = ""

    @cached_property
    def _dataset(self) -> Any:
        from torchvision import datasets

        kinds = {n for n in datasets.__all__ if isinstance(getattr(datasets, n), type)}
        if self.name not in kinds:
            raise unknown_name("torchvision data set", self.name, kinds)
        kind = getattr(datasets, self.name)
        accepted = inspect.signature(kind).parameters
        options: dict[str, object] = {"download": False} if "download" in accepted else {}
        if "split" in accepted:
            options["split"] = self.split or "train"
        elif "train" in accepted:
            if self.split not in ("", "train", "test", "val"):
                raise ValueError(
                    f"{self.name} has the splits 'train' and 'test', received {self.split!r}"
                )
            options["train"] = self.split in ("", "train")
        elif self.split:
            raise ValueError(f"{self.name} has no splits, received {self.split!r}")
        try:
            return kind(os.path.expanduser(self.root), **options)
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"torchvision's {self.name} is not usable under {self.root!r} ({reason}): "
                "get it first, e.g. with download=True in Python"
            ) from error

    @cached_property
    def _files(self) -> list[tuple[str, int]] | None:
        """Image files with labels, where the data set is made of them."""
        for samples in (getattr(self._dataset, n, None) for n in ("samples", "_samples", "imgs")):
            if isinstance(samples, list) and samples and _is_file_sample(samples[0]):
                return [(str(sample[0]), int(sample[1])) for sample in samples]
        files = getattr(self._dataset, "_image_files", None)
        labels = getattr(self._dataset, "_labels", None)
        if isinstance(files, list) and isinstance(labels, list) and len(files) == len(labels):
            return [(str(f), int(n)) for f, n in zip(files, labels, strict=True)]
        return None

    def __getstate__(self) -> dict[str, str]:
        return {"name": self.name, "root": self.root, "split": self.split}

    def list_items(self) -> Listing:
        """Items in torchvision's order."""
        data = self._dataset
        if len(data) == 0:
            raise ValueError(f"torchvision's {self.name} under {self.root!r} is empty")
        if self._files is not None:
            labels = [label for _, label in self._files]
            names = [
                os.path.relpath(path, os.path.expanduser(self.root)) for path, _ in self._files
            ]
            sizes = [os.path.getsize(p) if os.path.isfile(p) else 0 for p, _ in self._files]
        else:
            labels = self._targets()
            names, sizes = [str(i) for i in range(len(data))], [0] * len(data)
        classes = [c if isinstance(c, str) else str(c[0]) for c in getattr(data, "classes", [])]
        if len(classes) <= max(labels):
            classes = [str(n) for n in range(max(labels) + 1)]
        return Listing(names, labels, sizes, classes)

    def _targets(self) -> list[int]:
        for name in ("targets", "labels", "_labels", "y"):
            values = getattr(self._dataset, name, None)
            if values is not None and len(values) == len(self._dataset):
                break
        else:
            values = [self._dataset[i][1] for i in range(len(self._dataset))]
        try:
            return [int(value) for value in values]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"torchvision's {self.name} has no class numbers as targets "
                f"(received {type(values[0]).__name__}): only classification sets can be written"
            ) from error

    def read(self, item: int, name: str) -> bytes:
        """The file's bytes, or the image as PNG."""
        if self._files is not None:
            return read_file(self._files[item][0])
        return encode_png(self.picture(item))

    @property
    def pictures(self) -> bool:
        """Whether items are no files, so that ``picture`` spares encoding and decoding them."""
        return self._files is None

    def picture(self, item: int) -> Image.Image:
        """The image as torchvision gives it; raises SampleFault where that is none."""
        image = self._dataset[item][0]
        if not isinstance(image, Image.Image):
            raise SampleFault("no image", f"torchvision gave a {type(image).__name__}")
        return image


def _is_file_sample(sample: object) -> bool:
    return (
        isinstance(sample, tuple)
        and len(sample) == 2
        and isinstance(sample[0], str | os.PathLike)
        and isinstance(sample[1], int)
    )
