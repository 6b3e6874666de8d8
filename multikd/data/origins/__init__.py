"""What shards are written from: image folders, tables of paths, IDX files, torchvision data sets.

An origin lists its items once, in the parent process; ``read`` gives an item's encoded bytes in
whichever process asks. Origins are small to pickle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from multikd.data.origins.base import Listing, Origin
from multikd.data.origins.folder import FolderOrigin
from multikd.data.origins.idx import IdxOrigin
from multikd.data.origins.table import TableOrigin
from multikd.data.origins.torchvision import TorchvisionOrigin

__all__ = ["Listing", "Origin", "open_origin"]


def open_origin(source: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Origin:
    """The origin that ``source`` names.

    Args:
        source: a folder of images (class = folder), ``torchvision:NAME:ROOT[:SPLIT]``,
            ``idx:IMAGES[:LABELS]``, or a ``.csv`` or ``.parquet`` with the columns ``path`` and,
            if there are classes, ``label``.
        classes: class names in the order of their numbers, where they must agree with another
            data set; None takes the sorted names that occur.

    Raises:
        ValueError: it is none of these, or it does not exist.
    """
    text = os.fspath(source)
    kind, _, rest = text.partition(":")
    if kind == "torchvision" and rest:
        name, _, root = rest.partition(":")
        return TorchvisionOrigin(*_name_root_split(text, name, root))
    if kind == "idx" and rest:
        separator = "," if "," in rest else ":"
        images, _, labels = rest.partition(separator)
        return IdxOrigin(images, labels, tuple(classes or ()))
    path = Path(text).expanduser()
    if not path.exists():
        raise ValueError(
            f"the source {text!r} does not exist: expected a folder of images, a .csv or .parquet, "
            "torchvision:NAME:ROOT[:SPLIT] or idx:IMAGES:LABELS"
        )
    if path.is_dir():
        return FolderOrigin(str(path), tuple(classes or ()))
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".pq"):
        return TableOrigin(str(path), tuple(classes or ()))
    raise ValueError(
        f"cannot write shards from the file {text!r}: expected a folder, a .csv or a .parquet"
    )


def _name_root_split(text: str, name: str, root: str) -> tuple[str, str, str]:
    if not name or not root:
        raise ValueError(f"expected torchvision:NAME:ROOT[:SPLIT], received {text!r}")
    head, _, tail = root.rpartition(":")
    if head and "/" not in tail and not os.path.exists(root):
        return name, head, tail
    return name, root, ""
