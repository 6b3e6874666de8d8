"""The real shards that ship with the package: 4,000 + 1,000 images of Fashion-MNIST.

They lie there as ``.tar.gz``, since a tar of small files is mostly padding (2.5 MB against 11.6).
Samples are read by byte range, so they are unpacked before use, and from then on they are shards
like any others. ``tools/make_demo_shards.py`` made them.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from multikd.files import write_atomically

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DESCRIPTION = "Fashion-MNIST (MIT, Zalando SE): 4,000 train and 1,000 held-out images, 28 × 28 grey"


@dataclass(frozen=True)
class EmbeddedShards:
    """Where the unpacked shards are, in the form that ``ShardSource`` takes."""

    train: list[str]
    test: list[str]


def unpack_shards(out: Path) -> EmbeddedShards:
    """Unpack the embedded shards into ``out/train`` and ``out/test``, with their licence.

    What is there already and right is left alone (with its index), what is not is replaced.

    Args:
        out: folder; made as needed. Takes 12 MB.

    Raises:
        OSError: the folder can't be written.
    """
    root = embedded_shards()
    notice = root / "NOTICE"
    _put(out / notice.name, notice.read_bytes())
    found: dict[str, list[str]] = {"train": [], "test": []}
    for split, paths in found.items():
        for packed in sorted((root / split).iterdir(), key=lambda entry: entry.name):
            path = out / split / packed.name.removesuffix(".gz")
            if packed.name.endswith(".tar.gz"):
                _put(path, gzip.decompress(packed.read_bytes()))
                paths.append(str(path))
            elif packed.name == "dataset.json":
                _put(path, packed.read_bytes())
    return EmbeddedShards(**found)


def embedded_shards() -> Traversable:
    """The folder inside the package that holds the packed shards and their notice."""
    return files("multikd.demo") / "shards"


def _put(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
