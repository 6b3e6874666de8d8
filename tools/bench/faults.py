"""What broken samples cost a loader beyond the samples themselves.

    python tools/bench/faults.py --json faults.json

Writes shards of JPEGs (500 × 375 px), once sound and once with ``--share`` of the images broken
(cut short, of no known format, or without bytes, a third each), and reads an epoch of both in turn
through ``ShardDataModule``, batch by batch, in one process and one thread. Every batch is full in
both: a broken sample's place is filled by a neighbour, under the same draw of the augmentation. The
cost is the time of an epoch with broken samples over that without, less one: what is paid for
trying them, beyond their being lost. That good samples are each seen at their place, and broken
ones named, is checked in the same runs.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from multikd.data.module import ShardDataModule
from multikd.data.views import UnicViews
from multikd.types import Batch

BATCH = 20


def write(folder: Path, images: list[bytes], broken: dict[int, bytes], per_shard: int) -> None:
    """Shards of these images, some of them replaced."""
    folder.mkdir()
    for start in range(0, len(images), per_shard):
        with tarfile.open(folder / f"s-{start // per_shard:03d}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, len(images))):
                data = broken.get(number, images[number])
                for extension, content in (("jpg", data), ("cls", b"1")):
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def photographs(count: int, rng: np.random.Generator) -> list[bytes]:
    """JPEGs with the spectrum of photographs: noise of several sizes, laid over one another."""
    made = []
    for _ in range(count):
        total = np.zeros((375, 500, 3))
        for size in (4, 16, 64):
            noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            total += np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC))
        buffer = io.BytesIO()
        Image.fromarray((total / 3).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def epochs(folders: dict[Path, set[str]], number: int) -> dict[Path, tuple[float, float]]:
    """Seconds, by the clock and of the processor, of an epoch of each folder.

    They take turns batch by batch, so that whatever else the machine does meets both alike.

    Raises:
        RuntimeError: a good sample is not at its place, or a broken one is not named.
    """
    modules: dict[Path, ShardDataModule] = {}
    batches: dict[Path, list[Batch]] = {}
    took = {folder: [0.0, 0.0] for folder in folders}
    iterators = {}
    for folder in folders:
        data = modules[folder] = ShardDataModule(
            str(folder),
            train_views=UnicViews(224),
            batch_size=BATCH,
            num_workers=0,
            max_fault_rate=1.0,
        )
        data.setup("fit")
        loader = data.train_dataloader()
        loader.set_epoch(number)
        iterators[folder], batches[folder] = iter(loader), []
    order = list(folders)
    while iterators:
        for folder in [f for f in order if f in iterators]:
            begun = time.perf_counter(), time.process_time()
            batch = next(iterators[folder], None)
            ended = time.perf_counter(), time.process_time()
            if batch is None:
                del iterators[folder]
                continue
            batches[folder].append(batch)
            took[folder] = [t + e - b for t, b, e in zip(took[folder], begun, ended, strict=True)]
        order.reverse()
    for folder, broken in folders.items():
        check(batches[folder], broken)
        modules[folder].teardown()
    return {folder: (wall, cpu) for folder, (wall, cpu) in took.items()}


def check(batches: list[Batch], broken: set[str]) -> None:
    """Raise where a good sample is not at its place, or a broken one is not named."""
    faults = {fault.key for batch in batches for fault in batch.faults}
    places = [
        (key, str(sample))
        for batch in batches
        for key, sample in zip(batch.keys, batch.samples.tolist(), strict=True)
    ]
    wrong = [key for key, place in places if place not in broken and key != place]
    if faults != broken or wrong or len(places) != len({place for _, place in places}):
        raise RuntimeError(f"not exactly the good samples were seen: {sorted(wrong)[:5]}")


def measure(samples: int, share: float, repeats: int) -> dict[str, Any]:
    """Epochs of both sets side by side; the median of their ratios."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = photographs(samples, rng)
    chosen = sorted(rng.permutation(samples)[: round(samples * share)].tolist())
    broken = {
        n: (images[n][: len(images[n]) // 2], b"no image" * 2000, b"")[i % 3]
        for i, n in enumerate(chosen)
    }
    with tempfile.TemporaryDirectory() as name:
        sound, faulty = Path(name) / "sound", Path(name) / "faulty"
        write(sound, images, {}, 100)
        write(faulty, images, broken, 100)
        both = {sound: set[str](), faulty: {str(n) for n in chosen}}
        epochs(both, 0)  # indexes, caches, the processor's clock
        rows = [epochs(both, repeat) for repeat in range(repeats)]
    costs = [[row[faulty][i] / row[sound][i] - 1 for row in rows] for i in (0, 1)]
    return {
        "samples": samples,
        "broken": len(chosen),
        "repeats": repeats,
        "sound_images_per_s": round(samples / statistics.median(r[sound][0] for r in rows), 1),
        "faulty_places_per_s": round(samples / statistics.median(r[faulty][0] for r in rows), 1),
        "cost_beyond_lost_samples": round(statistics.median(costs[0]), 4),
        "spread": [round(min(costs[0]), 4), round(max(costs[0]), 4)],
        "cost_in_processor_time": round(statistics.median(costs[1]), 4),
        "only_good_samples_seen": True,  # or ``check`` had raised
    }


def main() -> int:
    """Run from the command line; 1 where the cost is above ``--limit``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=0.02)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    result = measure(arguments.samples, arguments.share, arguments.repeats)
    for name, value in result.items():
        print(f"{name:<28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return int(result["cost_beyond_lost_samples"] > arguments.limit)


if __name__ == "__main__":
    raise SystemExit(main())
