"""``multikd plan CONFIG``: what a run will cost, before anything is downloaded or allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from multikd.backbones import skeleton
from multikd.data.module import ShardDataModule
from multikd.errors import unknown_name
from multikd.fit import build_cli, without_known_noise
from multikd.modules.distillation import DistillationModule
from multikd.plan.counts import StepCounts, count_step
from multikd.plan.model import ASSUMED, HARDWARE, gradient_seconds, memory_bytes, step_seconds

IMAGENET = 1_281_167
DEVICES = (8, 64)


def run_plan(
    settings: Sequence[str],
    *,
    gpus: Sequence[str] = ("a100", "h100"),
    images: int = IMAGENET,
) -> tuple[str, dict[str, Any]]:
    """Count a config's step and predict its speed; text for people, figures for machines.

    Args:
        settings: as of ``multikd fit``.
        gpus: names out of ``HARDWARE``.
        images: in an epoch.

    Raises:
        ValueError: an unknown GPU, a mistake in the config, or one that can't be counted.
    """
    for name in gpus:
        if name not in HARDWARE:
            raise unknown_name("GPU", name, HARDWARE)
    if images < 1:
        raise ValueError(f"images must be 1 or more, received {images}")
    # Neither GPUs nor processes are asked for: shapes alone.
    here = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto")
    alone = (*here, "--trainer.num_nodes=1", "--trainer.logger=false")
    with without_known_noise(), skeleton(), torch.device("meta"):
        cli = build_cli([*settings, *alone], run=False)
        module, data = cli.model, cli.datamodule
        if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
            raise ValueError("plan counts a DistillationModule with a ShardDataModule")
        side = data.train_views[0].size
        views = len(module.student_views(len(data.train_views)))
        counts = count_step(module, (side, side), views)
    epochs = cli.trainer.max_epochs
    figures = {
        "batch_size": data.batch_size,
        "images": images,
        "epochs": epochs if epochs and epochs > 0 else None,
        "flop_per_image": counts.total,
        "counts": asdict(counts),
        "memory_bytes": memory_bytes(counts, data.batch_size),
        "share": _shares(counts),
        "predictions": [
            _prediction(counts, data.batch_size, gpu, devices, images, epochs)
            for gpu in gpus
            for devices in DEVICES
        ],
        "assumed": asdict(ASSUMED),
    }
    return _text(figures, counts), figures


def _shares(counts: StepCounts) -> dict[str, float]:
    """Share of a step's FLOP: of each teacher with its heads (thrice: forward and backward)."""
    heads = sum(counts.heads.values())
    shares = {
        name: (flop + 3.0 * counts.heads[name]) / counts.total
        for name, flop in counts.teachers.items()
    }
    rest = counts.training - 3.0 * heads
    return {**shares, "student": rest / counts.total}


def _prediction(
    counts: StepCounts, batch: int, gpu: str, devices: int, images: int, epochs: int | None
) -> dict[str, Any]:
    hardware = HARDWARE[gpu]
    parts = step_seconds(counts, batch, hardware.peak, hardware.bandwidth, ASSUMED)
    network = gradient_seconds(counts, hardware, devices)
    # Gradients are sent while the backward pass runs, two thirds of student and ladder.
    seconds = sum(parts.values()) + max(0.0, network - parts["student and ladder"] * 2.0 / 3.0)
    rate = devices * batch / seconds
    return {
        "gpu": hardware.name,
        "devices": devices,
        "step_seconds": seconds,
        "parts": {**parts, "network, before overlap": network},
        "images_per_second": rate,
        "images_per_second_per_gpu": rate / devices,
        "days": None if not epochs or epochs < 0 else epochs * images / rate / 86_400,
        "fits": sum(memory_bytes(counts, batch).values()) < 0.9 * hardware.memory,
    }


def _text(figures: dict[str, Any], counts: StepCounts) -> str:
    batch = figures["batch_size"]
    lines = [
        f"student {_millions(counts.student_parameters)}, ladder "
        f"{_millions(counts.ladder_parameters)} parameters ({_millions(counts.trained)} trained); "
        f"teachers {_millions(sum(counts.teacher_parameters.values()))}",
        f"a step of {batch} images on a rank: {batch * counts.total / 1e12:.2f} TFLOP "
        f"({counts.total / 1e9:.1f} GFLOP an image)",
    ]
    for name, share in figures["share"].items():
        own = counts.teachers.get(name)
        detail = "" if own is None else f"  {own / 1e9:6.1f} GFLOP an image, forward"
        lines.append(f"  {name:16} {100 * share:5.1f} %{detail}")
    memory = figures["memory_bytes"]
    lines.append(f"memory of a rank under bf16-mixed and DDP: {sum(memory.values()) / 1e9:.1f} GB")
    lines += [f"  {name:28} {value / 1e9:6.2f} GB" for name, value in memory.items() if value]
    epochs = figures["epochs"]
    lines.append(
        "PREDICTION, not measured: public peak figures, 45 % of them in the teachers and 35 % in "
        f"training; {figures['images']:,} images an epoch, "
        + (f"{epochs} epochs" if epochs else "no number of epochs given")
    )
    for row in figures["predictions"]:
        days = "" if row["days"] is None else f", {row['days']:.2f} days"
        room = "" if row["fits"] else " (batch too large for its memory)"
        lines.append(
            f"  {row['devices']:3} × {row['gpu']:15} {row['images_per_second']:>9,.0f} images/s"
            f"{days}{room}"
        )
    lines.append("the loader must keep up: see tools/bench/loader.py for images/s of one core")
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
