"""What ``multikd pseudolabel`` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from multikd.data.manifest import WriteReport
from multikd.data.module import ShardDataModule
from multikd.data.sources import ShardSource
from multikd.data.specs import dataset_facts
from multikd.errors import unknown_name
from multikd.fit import build_cli, without_known_noise
from multikd.modules.distillation import DistillationModule
from multikd.pseudolabels.ensemble import Ensemble, no_logits
from multikd.pseudolabels.tally import Tally
from multikd.pseudolabels.write import write_pseudolabels
from multikd.types import TokenFeatures


@dataclass(frozen=True)
class PseudolabelSettings:
    """What the command line asks for; see ``multikd pseudolabel --help``."""

    data: Sequence[str]
    out: Path
    threshold: float = 0.9
    teachers: tuple[str, ...] = ()
    progress: bool = True


def run_pseudolabel(
    settings: Sequence[str], asked: PseudolabelSettings
) -> tuple[str, dict[str, Any]]:
    """Label shards with a config's teachers; returns (text, figures).

    Args:
        settings: as of ``multikd fit``: ``--config``, …
        asked: the command's own.

    Raises:
        ValueError: a mistake in config or command, before any image is read; or nothing was kept.
    """
    if not 0 <= asked.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], received {asked.threshold}")
    if asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"--out {asked.out} is a file: name a folder")
    source = ShardSource(list(asked.data))
    if any(os.path.abspath(os.path.dirname(u)) == str(asked.out.absolute()) for u in source.urls):
        raise ValueError(f"--out {asked.out} is the folder of the images: name another")
    with without_known_noise():
        cli = build_cli(settings, run=False)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
        raise ValueError("pseudo-labels are of the teachers of a DistillationModule")
    names = asked.teachers or module.teacher_names
    if not names:
        raise ValueError(
            "this config has no teachers, whose classes pseudo-labels are: name the config of the "
            "teachers, not that of the student that learns from them"
        )
    for name in names:
        if name not in module.teacher_names:
            raise unknown_name("teacher", name, module.teacher_names)
        if not module.teacher(name).num_classes:
            raise ValueError(no_logits(name))
    counts = {name: module.teacher(name).num_classes for name in names}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the teachers have classes of their own ({counts}): label with those that share them, "
            "--teachers A,B"
        )
    device = cli.trainer.strategy.root_device
    module.teachers.to(device)
    identity = {
        "teachers": {name: module.teacher(name).fingerprint() for name in names},
        "view": data.eval_views.describe(),
    }
    columns = (TextColumn("   labels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not asked.progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("labels", total=len(source))
        report, tally = write_pseudolabels(
            source,
            asked.out,
            # Not run_teacher, which leaves out logits that no term asks for.
            Ensemble(partial(answers, module), dict.fromkeys(names, 1.0)),
            data.eval_views,
            threshold=asked.threshold,
            identity=identity,
            classes=_classes(source, next(iter(counts.values()))),
            batch_size=data.eval_batch_size,
            device=device,
            max_pixels=data.max_pixels,
            progress=lambda count: bar.advance(task, count),
        )
    figures = {
        "out": str(asked.out),
        "threshold": asked.threshold,
        "teachers": list(names),
        "images": tally.images,
        "written": report.total,
        "unreadable": tally.unreadable,
        "per_class": tally.classes,
        "thresholds": tally.rows(),
    }
    return _text(report, tally, figures), figures


def _classes(source: ShardSource, count: int) -> list[str]:
    """Names that the images' ``dataset.json`` gives, where they are as many as the teachers'."""
    found = dataset_facts(source.urls[0]).get("classes")
    return [str(n) for n in found] if isinstance(found, list) and len(found) == count else []


def _text(report: WriteReport, tally: Tally, figures: dict[str, Any]) -> str:
    size = sum(record.bytes for record in report.shards) / 1e6
    lines = [
        f"{report.total} of {tally.images} images have a confidence of {figures['threshold']} or "
        f"more: {len(report.shards)} shards, {size:.1f} MB, in {report.out}",
        f"teachers {', '.join(figures['teachers'])}",
    ]
    if tally.unreadable:
        lines.append(f"skipped  {tally.unreadable} images that can't be read")
    lines.append(f"labels   {min(tally.classes)} to {max(tally.classes)} of a class")
    lines.append(f"{'threshold':>9}{'images':>9}{'coverage':>10}{'accuracy':>10}")
    for row in figures["thresholds"]:
        right = "unknown" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        lines.append(
            f"{row['threshold']:>9g}{row['kept']:>9}{100 * row['coverage']:>8.1f} %{right:>10}"
        )
    if any(row["accuracy"] is not None for row in figures["thresholds"]):
        lines.append("accuracy is against the images' own labels, which the new shards leave out")
    return "\n".join(lines)


def answers(module: DistillationModule, name: str, images: Tensor) -> TokenFeatures:
    """A teacher's features of float images in [0, 1], its logits among them."""
    features: TokenFeatures = module.teacher(name)(images, module.student.spec.patch_size)
    return features
