"""What ``multikd evaluate`` runs."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multikd.checkpoints import WeightChoice
from multikd.data.sources import DEFAULT_CACHE
from multikd.data.workers import usable_cores
from multikd.retention.encoders import OpenOptions
from multikd.retention.extract import ExtractOptions
from multikd.retention.store import PatchDtype

log = logging.getLogger(__name__)

OUT = Path("multikd-evaluation")
RESULTS = "results.json"
WORKERS = min(16, usable_cores())
CACHE = DEFAULT_CACHE / "evaluation"


@dataclass(frozen=True)
class EvaluateSettings:
    """What the command line asks for; see ``multikd evaluate --help``.

    Attributes:
        tasks: task file, by path or shipped name.
        out: folder of results.json, results.csv and report.html.
        data: ``DATASET.SPLIT=SOURCE`` in place of what the task file says.
        heads: ``all``, or teachers whose heads are columns.
        with_teachers: add the checkpoint's own teachers.
        weights: of checkpoints.
        cache: folder of features.
        device: ``auto``, ``cpu``, ``cuda``, …
        devices: how many.
        batch_size: images of a forward pass.
        workers: threads that read images.
        patch_dtype: of patch tokens on disk.
        cost: measure parameters, multiply-adds, memory and latency.
        pictures: nearest neighbours and patch components for the page.
        progress: show bars.
        overwrite: replace earlier results in ``out``.
    """

    tasks: str
    out: Path = OUT
    data: tuple[str, ...] = ()
    heads: Literal["all"] | tuple[str, ...] = "all"
    with_teachers: bool = False
    weights: WeightChoice = "auto"
    cache: Path = CACHE
    device: str = "auto"
    devices: int = 1
    batch_size: int = 64
    workers: int = WORKERS
    patch_dtype: PatchDtype = "float16"
    cost: bool = True
    pictures: bool = True
    progress: bool = True
    overwrite: bool = False

    @property
    def opening(self) -> OpenOptions:
        """How encoders are opened."""
        return OpenOptions(self.weights, self.heads, self.with_teachers)

    @property
    def extraction(self) -> ExtractOptions:
        """How features are computed."""
        return ExtractOptions(
            cache=self.cache.expanduser(),
            batch_size=self.batch_size,
            workers=self.workers,
            patch_dtype=self.patch_dtype,
            accelerator=self.device,
            devices=self.devices,
        )


def run_evaluate(
    encoders: Sequence[str], settings: EvaluateSettings
) -> tuple[str, dict[str, Any]] | None:
    """Score encoders on the tasks of a file; returns (text, figures), None on ranks but the first.

    Raises:
        ValueError: a mistake in encoders, task file or data, before anything is extracted.
        KeyboardInterrupt: features that were written are kept.
    """
    from multikd.retention import run
    from multikd.retention.costs import measure_costs
    from multikd.retention.outcome import present

    begun = time.perf_counter()
    _check(encoders, settings)
    options = settings.extraction
    found = run.prepare(
        encoders, settings.tasks, settings.data, settings.opening, options, settings.progress
    )
    _say_what(found, settings)
    if not run.extract_all(found, options, settings.progress):
        return None
    if settings.cost:
        # Before scoring, as an interruption of that would cost the figures; these are kept.
        measure_costs(found, options.cache, device_of(settings.device), settings.progress)
    run.score_all(found, device_of(settings.device), settings.progress)
    return present(found, settings, begun)


def run_drift(
    encoders: Sequence[str], new: str | None, reference: str | None, settings: EvaluateSettings
) -> tuple[str, dict[str, Any]] | None:
    """Whether new images are still such as the reference's, by what the encoder makes of them."""
    from multikd.retention.drifting import drift

    if not new or not reference:
        raise ValueError(
            "drift compares two sets of images: give --drift NEW and --reference OLD (shards, a "
            "folder, or any other source)"
        )
    return drift(encoders, new, reference, settings)


def only_compares(encoders: Sequence[str], tasks: str | None, drift: str | None) -> None:
    """Refuse what ``--compare`` would leave undone.

    Raises:
        ValueError: encoders, tasks or drift were asked for beside it.
    """
    if encoders or tasks or drift:
        raise ValueError(
            "--compare reads earlier results.json files and runs nothing: leave out encoders, "
            "--tasks and --drift"
        )


def split_heads(text: str) -> Literal["all"] | tuple[str, ...]:
    """``--heads``: all, none or names."""
    if text == "all":
        return "all"
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


def run_compare(paths: Sequence[Path], out: Path | None) -> tuple[str, dict[str, Any]]:
    """Earlier results side by side."""
    from multikd.retention.compare import compare

    return compare(list(paths), out)


def device_of(accelerator: str) -> str:
    """The torch device on which tasks run the encoder.

    Raises:
        ValueError: it is not there.
    """
    import torch

    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: leave out --device, or use --device cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("there is no MPS device here: leave out --device, or use --device cpu")
    if accelerator == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


def command_line() -> str:
    """As it was typed, for results.json."""
    return shlex.join(["multikd", *sys.argv[1:]])


def _check(encoders: Sequence[str], settings: EvaluateSettings) -> None:
    if not encoders:
        raise ValueError(
            "evaluate needs an encoder: a .ckpt file, an exported folder, timm:NAME, "
            "open_clip:NAME/TAG or packaged:NAME"
        )
    if not settings.tasks:
        raise ValueError("evaluate needs --tasks FILE (`multikd configs` lists the shipped ones)")
    for name in ("batch_size", "devices"):
        if getattr(settings, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, received {getattr(settings, name)}")
    if settings.workers < 0:
        raise ValueError(f"--workers must be at least 0, received {settings.workers}")
    device_of(settings.device)
    out = settings.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if (out / RESULTS).exists() and not settings.overwrite:
        raise ValueError(
            f"{out} holds earlier results: name another --out, or replace them with --overwrite"
        )
    for folder in (out, settings.cache.expanduser()):
        place = folder
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"the folder {folder} can't be written to: name another one")


def _say_what(found: Any, settings: EvaluateSettings) -> None:
    tasks, columns = len(found.tasks.tasks), len(found.columns)
    log.info(
        "%d task%s on %d encoder%s: %s",
        tasks,
        "" if tasks == 1 else "s",
        columns,
        "" if columns == 1 else "s",
        ", ".join(column.name for column in found.columns),
    )
