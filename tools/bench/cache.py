"""Training from cached features against live teachers, and how soon either begins.

    python tools/bench/cache.py [--starts 3] [--epochs 2] [--json FILE]

The shipped demo's shards, teachers (EfficientNet-Lite0/1/2) and student (ResNet-10) at 64 px,
through `multikd fit` itself, a process each, taking turns: seconds from the command to the end of
the first training step, and images a second between steps (all logged intervals but those of a
process's first epoch), with a complete feature cache and without one.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import arguments, finish, shown, summary

from multikd.demo.embedded import unpack_shards

# The command itself, with a clock that stops at the end of the first step.
_RUN = """
import sys, time
begun = float(sys.argv[1])
import lightning.pytorch as pl
from multikd.callbacks.throughput import Throughput
original = Throughput.on_train_batch_end
said = []
def first(self, *args):
    if not said:
        said.append(1)
        print("FIRST", time.time() - begun, flush=True)
    original(self, *args)
Throughput.on_train_batch_end = first
from multikd.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


def run(folder: Path, shards: Path, cache: Path | None, epochs: int) -> tuple[float, list[float]]:
    """One `multikd fit`: seconds to its first step, images a second of its later epochs."""
    callbacks = "[Throughput]" if cache is None else "[Throughput,PrecomputeFeatures]"
    settings = [
        *("fit", "--config", "demo", f"--trainer.max_epochs={epochs}"),
        f"--trainer.default_root_dir={folder}",
        f"--data.train={shards}",
        *("--data.val=null", "--data.bank=null", "--trainer.enable_progress_bar=false"),
        f"--trainer.callbacks={callbacks}",
        f"--data.cache={'null' if cache is None else cache}",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.log_every_n_steps=5",
    ]
    command = [sys.executable, "-c", _RUN, str(time.time()), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    first = next(float(x.split()[1]) for x in done.stdout.splitlines() if x.startswith("FIRST"))
    with sorted(folder.rglob("metrics.csv"))[-1].open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/images_per_second")]
    rates = [float(r["train/images_per_second"]) for r in rows if int(r["epoch"]) > 0]
    return first, rates or [float(row["train/images_per_second"]) for row in rows]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="processes of each kind")
    parser.add_argument("--epochs", type=int, default=2)
    options = arguments(parser)
    starts: dict[str, list[float]] = {"cached": [], "live": []}
    rates: dict[str, list[float]] = {"cached": [], "live": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack_shards(folder / "shards")
        shards, cache = folder / "shards" / "train", folder / "features"
        run(folder / "fill", shards, cache, 1)
        for number in range(options.starts):
            for kind, kept in (("cached", cache), ("live", None)):
                first, found = run(folder / f"{kind}{number}", shards, kept, options.epochs)
                starts[kind].append(first)
                rates[kind] += found
    figures: dict[str, Any] = {
        "first_step_seconds": {kind: summary(values) for kind, values in starts.items()},
        "images_per_second": {kind: summary(values) for kind, values in rates.items()},
        "processes": options.starts,
        "intervals": {kind: len(values) for kind, values in rates.items()},
    }
    speeds = figures["images_per_second"]
    figures["ratio"] = speeds["cached"]["median"] / speeds["live"]["median"]
    rows: list[tuple[str, ...]] = [("", "s to the first step", "images/s")]
    for kind in starts:
        rows.append((kind, shown(figures["first_step_seconds"][kind]), shown(speeds[kind])))
    rows.append(("cached over live", "", f"{figures['ratio']:.2f}"))
    finish(figures, "multikd fit, demo config", rows, options.json)


if __name__ == "__main__":
    main()
