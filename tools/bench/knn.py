"""Exact k-NN against the float32 matrix product alone, in one run, on real features.

    python tools/bench/knn.py [--json FILE] [--bank 60000] [--queries 10000] [--repeats 7]

Features are EfficientNet-Lite0's (from the wheel, 64 px, width 1280) of Fashion-MNIST out of
Debian's package; ``--synthetic`` draws clustered ones of the same shape instead, which saves the
minutes of extraction. The floor multiplies the same unit rows in chunks of 512 queries, in float32,
into one buffer, and does nothing else. Floor and k-NN take turns (queries in ``--parts`` parts, so
that a busy moment of the machine meets both alike); a ratio is of one such turn.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import resource
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multikd.evaluation.knn import vote
from multikd.evaluation.neighbours import nearest_neighbours

FASHION = Path("/usr/share/datasets/fashion-mnist")
WIDTH = 1280
CHUNK = 512


def real(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of Fashion-MNIST's first images; kept beside the tool's scratch."""
    from multikd.teachers.packaged import PackagedEncoder

    encoder = PackagedEncoder("efficientnet_lite0", image_size=64).eval()
    out: list[Tensor] = []
    for stem, count in (("train", train), ("t10k", test)):
        with gzip.open(FASHION / f"{stem}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16)
        with gzip.open(FASHION / f"{stem}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
        images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).copy()).float() / 255
        rows: list[Tensor] = []
        with torch.inference_mode():
            for part in torch.split(images, 128):
                big = torch.nn.functional.interpolate(part, (64, 64), mode="bilinear")
                summary = encoder(big.expand(-1, 3, -1, -1)).summary
                if summary is None:
                    raise TypeError("EfficientNet-Lite0 gave no summary")
                rows.append(summary)
        out += [torch.cat(rows).clone(), torch.from_numpy(labels.astype(np.int64))]
    return out[0], out[1], out[2], out[3]


def synthetic(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Non-negative, clustered features, about as crowded as real ones."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, WIDTH, generator=generator)
    out = []
    for count in (train, test):
        labels = torch.randint(0, 10, (count,), generator=generator)
        noise = torch.randn(count, WIDTH, generator=generator)
        out += [(centres[labels] + noise).relu(), labels]
    return out[0], out[1], out[2], out[3]


def floor(bank: Tensor, queries: Tensor) -> None:
    """The products alone."""
    buffer = torch.empty(CHUNK, len(bank))
    for part in torch.split(queries, CHUNK):
        torch.mm(part, bank.T, out=buffer[: len(part)])


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"p50": median(values), "p25": low, "p75": high, "min": min(values), "max": max(values)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both, turn by turn."""
    made = synthetic if options.synthetic else real
    bank, labels, queries, truth = made(options.bank, options.queries)
    unit = torch.nn.functional.normalize
    bank_unit, queries_unit = unit(bank), unit(queries)
    nearest_neighbours(bank[:2000], queries[:100], 20)
    parts = len(queries) // options.parts
    floors: list[float] = []
    searches: list[float] = []
    answers = torch.empty(0, dtype=torch.int64)
    for repeat in range(options.repeats):
        spent = [0.0, 0.0]
        found = []
        for number in range(options.parts):
            some = slice(number * parts, (number + 1) * parts)
            start = time.perf_counter()
            floor(bank_unit, queries_unit[some])
            spent[0] += time.perf_counter() - start
            start = time.perf_counter()
            near = nearest_neighbours(bank, queries[some], 20, options.memory_mb)
            found.append(vote(near, labels, 20, 0.07, 10))
            spent[1] += time.perf_counter() - start
        answers = torch.cat(found)
        floors.append(spent[0])
        searches.append(spent[1])
        print(f"repeat {repeat + 1}: floor {spent[0]:.2f} s, k-NN {spent[1]:.2f} s, "
              f"ratio {spent[1] / spent[0]:.3f}", flush=True)  # fmt: skip
    kept = len(answers)
    return {
        "features": "synthetic"
        if options.synthetic
        else "efficientnet_lite0, Fashion-MNIST, 64 px",
        "bank": len(bank),
        "queries": kept,
        "width": bank.shape[1],
        "k": 20,
        "memory_mb": options.memory_mb,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "repeats": options.repeats,
        "turns_per_repeat": options.parts,
        "accuracy": float((answers == truth[:kept]).double().mean()),
        "floor_seconds": spread(floors),
        "knn_seconds": spread(searches),
        "ratio": spread([s / f for s, f in zip(searches, floors, strict=True)]),
        "floor_gflops": 2e-9 * len(bank) * kept * bank.shape[1] / median(floors),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bank", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", type=int, default=2, help="turns of each repeat")
    parser.add_argument("--memory-mb", type=float, default=512.0)
    parser.add_argument("--synthetic", action="store_true", help="no images, no wheel needed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(
        f"{found['bank']} x {found['queries']} x {found['width']}, {found['features']}, "
        f"{found['threads']} threads, {found['memory_mb']:g} MB: "
        f"k-NN accuracy {100 * found['accuracy']:.2f} %"
    )
    for name, title in (
        ("floor_seconds", "matrix product alone, s"),
        ("knn_seconds", "exact k-NN, s"),
        ("ratio", "k-NN / product"),
    ):
        row = found[name]
        print(
            f"{title:24} p50 {row['p50']:.3f}  [p25 {row['p25']:.3f}, p75 {row['p75']:.3f}]  "
            f"min {row['min']:.3f}  max {row['max']:.3f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
