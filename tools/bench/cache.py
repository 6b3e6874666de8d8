"""A step from cached features against one with live teachers, as `multikd fit` runs them.

    python tools/bench/cache.py [--epochs 3] [--json FILE]

The shipped demo's shards, teachers (EfficientNet-Lite0/1/2) and student (ResNet-10) at 64 px,
through `multikd fit` itself in a process of its own each: seconds from the command to the first
training step, and images a second of the last epoch, with a feature cache that is complete and
without one.
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

from measuring import arguments, finish

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


def run(folder: Path, shards: Path, cache: Path | None, epochs: int) -> dict[str, float]:
    """One `multikd fit`."""
    settings = [
        *("fit", "--config", "demo", f"--trainer.max_epochs={epochs}"),
        f"--trainer.default_root_dir={folder}",
        f"--data.train={shards}",
        *("--data.val=null", "--data.bank=null", "--trainer.enable_progress_bar=false"),
        "--trainer.callbacks=[Throughput]"
        if cache is None
        else "--trainer.callbacks=[Throughput,PrecomputeFeatures]",
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
    logs = sorted(folder.rglob("metrics.csv"))
    rates = []
    with logs[-1].open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("train/images_per_second"):
                rates.append(float(row["train/images_per_second"]))
    return {"first_step_seconds": first, "images_per_second": sorted(rates)[len(rates) // 2]}


def main() -> None:
    """See the head of this file."""
    import multikd.demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    options = arguments(parser)
    shards = Path(multikd.demo.__file__).parent / "shards" / "train"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "features"
        run(folder / "a", shards, cache, 1)  # fills the cache
        figures["cached"] = run(folder / "b", shards, cache, options.epochs)
        figures["live"] = run(folder / "c", shards, None, options.epochs)
    figures["ratio"] = figures["cached"]["images_per_second"] / figures["live"]["images_per_second"]
    rows: list[tuple[str, ...]] = [("", "s to the first step", "images/s")]
    for name in ("cached", "live"):
        found = figures[name]
        rows.append(
            (name, f"{found['first_step_seconds']:.1f}", f"{found['images_per_second']:.0f}")
        )
    finish(figures, "multikd fit, demo config", rows, options.json)


if __name__ == "__main__":
    main()
