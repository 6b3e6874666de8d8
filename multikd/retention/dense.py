"""Folder layouts of dense data sets: ADE20K, VOC, NYU depth, and plain pairs of folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from multikd.data.decode import IMAGE_EXTENSIONS
from multikd.retention.images import DenseFolder

DENSE_KINDS = ("ade20k", "voc", "masks", "depth", "nyud")
_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
Pairs = list[tuple[str, Path, Path]]


def open_dense(kind: str, rest: str, classes: tuple[str, ...] | None) -> DenseFolder:
    """A dense data set by its layout.

    ``ade20k:ROOT:SPLIT``
        ``ROOT/images/SPLIT/X.jpg`` and ``ROOT/annotations/SPLIT/X.png``; 0 ("other") is ignored,
        1 … 150 become 0 … 149, as the published benchmark has it.
    ``voc:ROOT:SPLIT``
        ``ROOT/JPEGImages/X.jpg``, ``ROOT/SegmentationClass/X.png`` for every line X of
        ``ROOT/ImageSets/Segmentation/SPLIT.txt``; 21 classes, 255 ignored.
    ``masks:IMAGES:MASKS``
        two folders with equal names; index PNGs, 255 ignored.
    ``depth:IMAGES:DEPTHS[:UNITS]``
        two folders with equal names; depths in UNITS to the metre (1000: millimetres), 0 unknown.
    ``nyud:ROOT[:LIST]``
        ``rgb_N.jpg`` beside ``sync_depth_N.png`` (millimetres) anywhere below ROOT, or the pairs
        ``IMAGE DEPTH …`` of the lines of LIST.

    Raises:
        ValueError: a folder is missing, there are no pairs, or an image has no target.
    """
    parts = rest.split(":")
    opened = _OPENERS[kind](parts, classes)
    if not opened.pairs:
        raise ValueError(f"{kind}:{rest} holds no pairs of image and target: check the layout")
    return opened


def _ade20k(parts: list[str], classes: tuple[str, ...] | None) -> DenseFolder:
    root, split = _two("ade20k:ROOT:SPLIT", parts)
    folder = Path(root).expanduser()
    pairs = _matched(folder / "images" / split, folder / "annotations" / split)
    names = classes or tuple(str(n + 1) for n in range(150))
    return DenseFolder(pairs, "mask", zero_is_ignored=True, classes=names)


def _voc(parts: list[str], classes: tuple[str, ...] | None) -> DenseFolder:
    root, split = _two("voc:ROOT:SPLIT", parts)
    folder = Path(root).expanduser()
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = [line.strip() for line in _text(listing).splitlines() if line.strip()]
    pairs = [
        (n, folder / "JPEGImages" / f"{n}.jpg", folder / "SegmentationClass" / f"{n}.png")
        for n in names
    ]
    return DenseFolder(_there(pairs), "mask", classes=classes or _VOC)


def _masks(parts: list[str], classes: tuple[str, ...] | None) -> DenseFolder:
    images, masks = _two("masks:IMAGES:MASKS", parts)
    pairs = _matched(Path(images).expanduser(), Path(masks).expanduser())
    return DenseFolder(pairs, "mask", classes=classes)


def _depth(parts: list[str], classes: tuple[str, ...] | None) -> DenseFolder:
    del classes
    *folders, units = parts if len(parts) == 3 else [*parts, "1000"]
    images, depths = _two("depth:IMAGES:DEPTHS[:UNITS]", folders)
    pairs = _matched(Path(images).expanduser(), Path(depths).expanduser())
    return DenseFolder(pairs, "depth", scale=_number(units))


def _nyud(parts: list[str], classes: tuple[str, ...] | None) -> DenseFolder:
    del classes
    root = Path(parts[0]).expanduser()
    if len(parts) > 1:
        pairs = []
        for line in _text(Path(parts[1]).expanduser()).splitlines():
            words = line.split()
            if len(words) >= 2 and words[1] != "None":
                image, depth = (root / word.lstrip("/") for word in words[:2])
                pairs.append((words[0].lstrip("/"), image, depth))
        return DenseFolder(_there(pairs), "depth", scale=1000.0)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: expected nyud:ROOT[:LIST]")
    pairs = [
        (str(image.relative_to(root)), image, _depth_of(image))
        for image in sorted(root.rglob("rgb_*.*"))
        if _depth_of(image).is_file()
    ]
    return DenseFolder(pairs, "depth", scale=1000.0)


def _depth_of(image: Path) -> Path:
    return image.with_name(image.stem.replace("rgb_", "sync_depth_", 1) + ".png")


_OPENERS: dict[str, Callable[[list[str], tuple[str, ...] | None], DenseFolder]] = {
    "ade20k": _ade20k,
    "voc": _voc,
    "masks": _masks,
    "depth": _depth,
    "nyud": _nyud,
}


def _matched(images: Path, targets: Path) -> Pairs:
    """Images with the target of the same stem, in the order of their paths."""
    for folder in (images, targets):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: check the data set's layout")
    return _there(
        [
            (str(path.relative_to(images).with_suffix("")), path, _target(path, images, targets))
            for path in sorted(images.rglob("*"))
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
        ]
    )


def _target(path: Path, images: Path, targets: Path) -> Path:
    return (targets / path.relative_to(images)).with_suffix(".png")


def _there(pairs: Pairs) -> Pairs:
    for key, image, target in pairs:
        for path in (image, target):
            if not path.is_file():
                raise ValueError(
                    f"{key} lacks {path}: every image needs its target, and the reverse"
                )
    return pairs


def _two(form: str, parts: list[str]) -> tuple[str, str]:
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"expected {form}, received {':'.join(parts)!r}")
    return parts[0], parts[1]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the list {path}: check the data set's layout") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f"units to the metre must be a number above 0, received {text!r}")
    return value
