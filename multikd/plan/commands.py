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
from multikd.plan.counts import StepCounts, combined, count_step
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
        groups = [None] if module.partition is None else module.partition.groups
        of_groups = [count_views(module, data, group) for group in groups]
        counts = max(of_groups, key=lambda c: c.total)  # the others wait for its ranks
    epochs = cli.trainer.max_epochs
    held = max(sum(memory_bytes(of, data.batch_size).values()) for of in of_groups)
    figures = {
        "batch_size": data.batch_size,
        "images": images,
        "epochs": epochs if epochs and epochs > 0 else None,
        "flop_per_image": counts.total,
        "counts": asdict(counts),
        "memory_bytes": memory_bytes(counts, data.batch_size),
        "share": _shares(counts),
        "predictions": [
            _prediction(counts, data.batch_size, gpu, devices, images, epochs, held)
            for gpu in gpus
            for devices in DEVICES
        ],
        "assumed": asdict(ASSUMED),
    }
    if module.partition is not None:
        figures["partition"] = [
            {
                "teachers": list(of.teachers),
                "flop_per_image": of.total,
                "memory_bytes": memory_bytes(of, data.batch_size),
            }
            for of in of_groups
        ]
    return _text(figures, counts), figures


def count_views(
    module: DistillationModule, data: ShardDataModule, names: Sequence[str] | None
) -> StepCounts:
    """An image's step over the run's views, with the teachers of a rank; None: all of them."""
    chosen, policies = module.student_views(len(data.train_views)), data.train_views
    sizes = [policies[view].size for view in chosen]
    if len(set(sizes)) == 1 and not data.schedule.settings():
        side = policies[0].size
        return count_step(module, (side, side), len(chosen), names)
    shares = data.schedule.shares or (1.0,) * len(chosen)
    often = [1.0] * len(chosen)
    if data.schedule.mode == "alternate":
        often = [share / sum(shares) for share in shares]
    shown = [data.schedule.shown(view, data.batch_size) / data.batch_size for view in chosen]
    counted = {side: count_step(module, (side, side), 1, names) for side in set(sizes)}
    return combined(list(zip([counted[side] for side in sizes], often, shown, strict=True)))


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
    counts: StepCounts,
    batch: int,
    gpu: str,
    devices: int,
    images: int,
    epochs: int | None,
    held: float,
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
        "fits": held < 0.9 * hardware.memory,
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
    for number, group in enumerate(figures.get("partition", [])):
        held = group["memory_bytes"]
        lines.append(
            f"ranks {number} mod {len(figures['partition'])}: {', '.join(group['teachers'])}: "
            f"{sum(held.values()) / 1e9:.1f} GB, teachers {held['teachers'] / 1e9:.2f} GB of it, "
            f"{group['flop_per_image'] / 1e9:.1f} GFLOP an image"
        )
    if "partition" in figures:
        lines.append("  (above and below: the ranks with most to compute; the others wait)")
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
