"""An image folder as an origin: class = folder."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass

from multikd.data.decode import IMAGE_EXTENSIONS
from multikd.data.origins.base import Listing, numbered, read_file


@dataclass
class FolderOrigin:
    """A folder of images: ``root/class/…/image``; images right under root have no class.

    Hidden files and folders and files without an image's extension are passed over. Links are
    followed, each folder once.
    """

    root: str
    classes: tuple[str, ...] = ()

    def list_items(self) -> Listing:
        """Images in the order of their paths; classes are the names of the first-level folders."""
        found: list[tuple[str, int]] = []
        passed: Counter[str] = Counter()
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:  # a link back to a folder above
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in files:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    passed["hidden"] += 1
                elif name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                    passed["no image's extension"] += 1
                else:
                    size = os.path.getsize(path) if os.path.exists(path) else 0
                    found.append((os.path.relpath(path, self.root), size))
        if not found:
            raise ValueError(
                f"the folder {self.root!r} holds no images ({_counted(passed) or 'it is empty'}): "
                "expected images in one folder per class"
            )
        found.sort()
        names = [name for name, _ in found]
        return self._labelled(names, [size for _, size in found], passed)

    def _labelled(self, names: list[str], sizes: list[int], passed: Counter[str]) -> Listing:
        # macOS may store 'é' as two code points: the same class must have one name everywhere.
        folders = [
            unicodedata.normalize("NFC", name.split(os.sep)[0]) if os.sep in name else ""
            for name in names
        ]
        labels, classes = numbered(folders, self.classes, self.root)
        notes = [f"files passed over: {_counted(passed)}"] if passed else []
        loose = folders.count("")
        if loose == len(names):
            notes.append("no class folders: the shards carry no labels")
        elif loose:
            notes.append(f"{loose} images lie outside the class folders and carry no label")
        if set(classes) and set(classes) <= {"train", "val", "valid", "validation", "test"}:
            notes.append(
                f"the classes are called {', '.join(classes)}: "
                f"did you mean {os.path.join(self.root, classes[0])}?"
            )
        return Listing(names, labels, sizes, classes, notes)

    def read(self, item: int, name: str) -> bytes:
        """The file's bytes."""
        return read_file(os.path.join(self.root, name))


def _counted(causes: Counter[str]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
