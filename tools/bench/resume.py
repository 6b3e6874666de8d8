"""Does going on late in an epoch take longer to start than going on early?

    python tools/bench/resume.py [--samples 20000] [--repeats 7] [--json FILE]

Two checkpoints of one epoch over real shards on disk, at 10 % and at 90 % of it; for each, the time
from asking for the first batch, or from building the Trainer, to the end of the first optimiser
step. The two take turns, round by round, so that a busy moment of the machine meets both alike.
Reported: the medians, their ratio (90 % over 10 %), and which position the first batch had.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.modules import DistillationModule
from multikd.projectors import LinearProjectors
from multikd.saving import VerifiedCheckpointIO
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.teachers.encoder import BackboneEncoder

BATCH = 16
SHARD = 1000


def make_shards(folder: Path, samples: int) -> None:
    """Shards of 1,000 JPEGs of 32 px, each image another one."""
    pixels = np.random.default_rng(0)
    for first in range(0, samples, SHARD):
        with tarfile.open(folder / f"s-{first // SHARD:04d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, samples)):
                buffer = io.BytesIO()
                image = pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(buffer, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def module() -> DistillationModule:
    """A small ViT from a small ViT."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    return DistillationModule(
        {"vit": Teacher(BackboneEncoder(teacher, name="test_vit", image_size=32))},
        StudentEncoder("test_vit", image_size=32),
        projectors=LinearProjectors(),
    )


class FirstStep(pl.Callback):
    """When the first step ended, and at which position it began; stops there."""

    def __init__(self) -> None:
        self.ended = 0.0
        self.position = -1

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        """Note, and stop."""
        self.ended = time.perf_counter()
        self.position = int(batch.positions[0])
        trainer.should_stop = True


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    made: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
        "enable_checkpointing": False,
        "plugins": [VerifiedCheckpointIO()],
    }
    return pl.Trainer(**{**made, **settings})


def data(shards: Path, workers: int) -> ShardDataModule:
    """The shards in small batches."""
    return ShardDataModule(
        str(shards), train_views=LightViews(32), batch_size=BATCH, num_workers=workers
    )


def checkpoints(root: Path, shards: Path, samples: int) -> dict[str, Path]:
    """Real checkpoints, whose place is moved to 10 % and 90 % of the epoch (training there would
    take longer than all that is measured); everything in them but the counters is of step 1."""
    saver = ModelCheckpoint(root, "one", every_n_train_steps=1)
    runner = trainer(root, saver, FirstStep(), enable_checkpointing=True)
    runner.fit(module(), datamodule=data(shards, 0))
    whole = samples // BATCH
    paths = {}
    for share in (10, 90):
        state = torch.load(root / "one.ckpt", weights_only=True)
        batches = whole * share // 100
        state["ShardDataModule"].update(batches=batches, position=batches * BATCH)
        state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] = batches
        paths[f"{share} %"] = root / f"{share}.ckpt"
        torch.save(state, paths[f"{share} %"])
    return paths


def start(root: Path, shards: Path, path: Path, workers: int) -> tuple[float, int]:
    """Seconds from building the Trainer to the end of the first step, and its first position."""
    first, model, shown = FirstStep(), module(), data(shards, workers)
    begun = time.perf_counter()
    trainer(root, first).fit(model, datamodule=shown, ckpt_path=path)
    shown.teardown()
    return first.ended - begun, first.position


def main(argv: list[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    with tempfile.TemporaryDirectory(prefix="multikd-bench-") as folder:
        root = Path(folder)
        shards = root / "shards"
        shards.mkdir()
        make_shards(shards, arguments.samples)
        paths = checkpoints(root, shards, arguments.samples)
        for workers in (0, 2):
            times: dict[str, list[float]] = {name: [] for name in paths}
            positions: dict[str, int] = {}
            for round_ in range(arguments.repeats + 1):
                for name, path in paths.items():
                    seconds, positions[name] = start(root, shards, path, workers)
                    if round_:  # the first warms up
                        times[name].append(seconds)
            middle = {name: median(values) for name, values in times.items()}
            results.append(
                {
                    "workers": workers,
                    "samples": arguments.samples,
                    "seconds": {name: round(value, 4) for name, value in middle.items()},
                    "ratio": round(middle["90 %"] / middle["10 %"], 3),
                    "first_position": positions,
                    "repeats": arguments.repeats,
                }
            )
    print("| workers | start at 10 % | start at 90 % | ratio |")
    print("|---|---|---|---|")
    for row in results:
        early, late = row["seconds"].values()
        print(f"| {row['workers']} | {early:.3f} s | {late:.3f} s | {row['ratio']} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
