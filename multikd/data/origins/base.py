"""The noun: an origin lists its items and reads their encoded bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from multikd.data.decode import SampleFault
from multikd.errors import unknown_name


@dataclass
class Listing:
    """The items of an origin, in a fixed order.

    Attributes:
        names: what each item is called in messages, and (made safe) in its key.
        labels: class numbers, −1 for none.
        sizes: bytes of each item's file; 0 where items are no files.
        classes: class names by number; empty where none are known.
        notes: sentences for the user (what was passed over, what looks odd).
    """

    names: list[str]
    labels: list[int]
    sizes: list[int]
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """sha256 over names, labels, sizes and classes: changes when the source does."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for name, label, size in zip(self.names, self.labels, self.sizes, strict=True):
            digest.update(f"\n{name}\0{label}\0{size}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Origin(Protocol):
    """Something that shards can be written from."""

    def list_items(self) -> Listing:
        """All items; raises ValueError where there are none or the source is not as expected."""
        ...

    def read(self, item: int, name: str) -> bytes:
        """The encoded image of an item; raises SampleFault where it cannot be had."""
        ...


def numbered(
    names: Sequence[str], classes: Sequence[str], where: str
) -> tuple[list[int], list[str]]:
    """Class numbers of class names; '' is no class. Given classes must contain all names."""
    known = list(classes) or sorted(set(names) - {""})
    number = {name: i for i, name in enumerate(known)} | {"": -1}
    missing = next((name for name in names if name not in number), None)
    if missing is not None:
        raise unknown_name("class", missing, known, hint=f"(in {where})")
    return [number[name] for name in names], known


def read_file(path: str) -> bytes:
    """All bytes of a file; SampleFault ``missing`` or ``unreadable`` where that fails."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise SampleFault("missing", path) from error
    except OSError as error:
        raise SampleFault("unreadable", f"{path}: {error.strerror or error}") from error


def encode_png(image: Image.Image) -> bytes:
    """``image`` as PNG, with no metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
