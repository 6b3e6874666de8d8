"""Make the shards that the demo embeds: a class-balanced part of Fashion-MNIST.

    python tools/make_demo_shards.py [--source /usr/share/datasets/fashion-mnist]

Draws 400 images of every class from the train files and 100 from the t10k files (Debian package
``dataset-fashion-mnist``, or the files torchvision's ``FashionMNIST`` downloads) by a fixed seed,
writes them with ``write_shards`` and compresses each shard: a tar pads every member to 512 bytes,
so that 2.5 MB of PNG and labels are 11.6 MB of tar. ``multikd.demo.embedded`` unpacks them.

The same source gives the same tars; the gzip around them may differ with the zlib release.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multikd.data.origins.idx import read_idx
from multikd.data.writer import write_shards
from multikd.demo.embedded import CLASSES

SEED = 0
SPLITS = {"train": ("train", 400, 1000), "test": ("t10k", 100, 1000)}  # files, a class, a shard
TARGET = Path(__file__).parent.parent / "multikd" / "demo" / "shards"


def draw(labels: npt.NDArray[np.uint8], per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of ``per_class`` images of every class, ascending."""
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = [
        generator.permutation(np.flatnonzero(labels == label))[:per_class]
        for label in range(len(CLASSES))
    ]
    return np.sort(np.concatenate(parts)).astype(np.int64)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    """An IDX file of unsigned bytes: two zeros, type 8, rank, big-endian sizes, values."""
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def make(source: Path, target: Path) -> dict[str, int]:
    """Write ``target/train`` and ``target/test``; returns file name → bytes."""
    written = {}
    for split, (stem, per_class, per_shard) in SPLITS.items():
        images = read_idx(str(source / f"{stem}-images-idx3-ubyte.gz"))
        labels = read_idx(str(source / f"{stem}-labels-idx1-ubyte.gz"))
        chosen = draw(labels, per_class, SEED)
        folder = target / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as name:
            part = Path(name)
            write_idx(part / "images", images[chosen])
            write_idx(part / "labels", labels[chosen])
            write_shards(
                f"idx:{part / 'images'},{part / 'labels'}",
                part / "shards",
                samples_per_shard=per_shard,
                seed=SEED,
                classes=CLASSES,
            )
            for shard in sorted((part / "shards").glob("*.tar")):
                packed = folder / f"{shard.name}.gz"
                packed.write_bytes(gzip.compress(shard.read_bytes(), 9, mtime=0))
                written[f"{split}/{packed.name}"] = packed.stat().st_size
            manifest: dict[str, Any] = json.loads((part / "shards" / "dataset.json").read_text())
        # The temporary folder's name would differ from run to run.
        manifest["source"] = (
            f"Fashion-MNIST, {stem} files: {per_class} images of every class, drawn with seed "
            f"{SEED} (MIT, Zalando SE; see NOTICE)"
        )
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / "dataset.json").write_text(text, encoding="utf-8")
    return written


def main() -> None:
    """Parse the command line and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    written = make(arguments.source, arguments.out)
    for name, size in written.items():
        print(f"{size:>9,} B  {name}")
    print(f"{sum(written.values()):>9,} B  in all")


if __name__ == "__main__":
    main()
