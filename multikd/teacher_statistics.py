"""``multikd teachers stats``: mean and covariance of every teacher of a config, over its views."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from multikd.data.claims import claims
from multikd.data.module import ShardDataModule
from multikd.errors import unknown_name
from multikd.fit import build_cli, without_known_noise
from multikd.modules.allotment import allot
from multikd.modules.distillation import DistillationModule, to_float
from multikd.normalizers import CovarianceNormalizer
from multikd.normalizers.hadamard import construction
from multikd.normalizers.measured import Statistics, write_statistics
from multikd.types import TOKEN_TYPES, TokenType

# Statistics are what is measured here: a file of them that the config names is not needed yet.
_WITHOUT = "--model.normalizers=multikd.normalizers.NoNormalizers"


class _Sums(CovarianceNormalizer):
    """Sums alone: nothing is decomposed while they grow."""

    def decompose(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The identity."""
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        return identity, identity


def run_stats(
    settings: Sequence[str],
    out: Path,
    images: int,
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Measure and write; returns (text, figures).

    Args:
        settings: as ``multikd fit`` takes them: ``--config``, ``--data.train``, …
        out: the safetensors file.
        images: at least so many training views of each teacher are measured (whole batches; or all
            of an epoch). With data of single teachers each sees its own.
        names: the teachers; none for all.
        overwrite: replace ``out``.

    Raises:
        ValueError: the config can't be built, an unknown teacher, one that has fewer than two
            images, or ``out`` is in the way.
    """
    if images < 2:
        raise ValueError(f"--images must be 2 or more, received {images}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another --out, or --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"the folder of {out} does not exist: make it, or give another --out")
    with without_known_noise():
        cli = build_cli([*settings, _WITHOUT], run=False)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
        raise ValueError("statistics are measured with a DistillationModule and a ShardDataModule")
    for name in names:
        if name not in module.teacher_names:
            raise unknown_name("teacher", name, module.teacher_names)
    chosen = tuple(names) or module.teacher_names
    device = cli.trainer.strategy.root_device
    module.teachers.to(device)
    sums = {n: _Sums(module.teacher(n).widths, images=2**62, every=2**62) for n in chosen}
    for one in sums.values():
        one.to(device).train()
    measured = _measure(module, data, sums, images, device)
    for name, count in measured.items():
        if count < 2:
            raise ValueError(
                f"teacher {name!r} had {count} of an epoch's images: give its data set more weight "
                "(data.train), or leave it out with --teachers"
            )
    found = {name: _statistics(one) for name, one in sums.items()}
    about = {
        "images": min(measured.values()),
        "views": data.train_views[0].describe(),
        "teachers": {
            name: {
                "encoder": module.teacher(name).spec.name,
                "fingerprint": module.teacher(name).fingerprint(),
                "resize": module.teacher(name).resize,
                "images": measured[name],
            }
            for name in chosen
        },
    }
    write_statistics(out, found, about)
    rows = [_row(name, token, of) for name, by in found.items() for token, of in by.items()]
    figures = {"file": str(out), **about, "statistics": rows}
    return _text(rows, min(measured.values()), out), figures


@torch.no_grad()
def _measure(
    module: DistillationModule,
    data: ShardDataModule,
    sums: dict[str, _Sums],
    images: int,
    device: torch.device,
) -> dict[str, int]:
    """How many images each teacher was measured on."""
    seen = dict.fromkeys(sums, 0)
    columns = (
        TextColumn("   statistics"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    data.setup("fit")
    # As in training: an image of another's data set is none of a teacher's.
    whose = claims(data.mixture(), module.teacher_names, module.teacher_data)
    loader = data.train_dataloader()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=images)
        for batch in loader:
            pixels = to_float(batch.views[0].to(device))
            allotment = allot(batch, tuple(sums), whose, tuple(sums), device)
            for name in allotment.present:
                sums[name].update(module.run_teacher(name, allotment.shown(name, pixels)))
                seen[name] += allotment.images[name]
            bar.update(task, completed=min(images, *seen.values()))
            if min(seen.values()) >= images:
                break
    return seen


def _statistics(sums: _Sums) -> dict[TokenType, Statistics]:
    return {
        token: sums.statistics(token)
        for token in TOKEN_TYPES
        if getattr(sums.widths, token) is not None
    }


def _row(name: str, token: TokenType, of: Statistics) -> dict[str, Any]:
    values = torch.linalg.eigvalsh(of.covariance).clamp(min=0.0)
    shares = values / values.sum().clamp(min=1e-300)
    deviations = of.covariance.diagonal().clamp(min=0.0).sqrt()
    return {
        "teacher": name,
        "token": token,
        "width": len(of.mean),
        "observations": of.n,
        "mean_norm": float(of.mean.norm()),
        "scale": float(values.mean().sqrt()),
        "deviation_min": float(deviations.min()),
        "deviation_max": float(deviations.max()),
        "effective_rank": float(torch.special.entr(shares).sum().exp()),
        "hadamard": construction(len(of.mean)),
    }


def _text(rows: Sequence[dict[str, Any]], images: int, out: Path) -> str:
    header = ("teacher", "token", "width", "mean norm", "φ", "σ min … max", "eff. rank", "Hadamard")
    cells = [header] + [
        (
            r["teacher"],
            r["token"],
            str(r["width"]),
            f"{r['mean_norm']:.3g}",
            f"{r['scale']:.3g}",
            f"{r['deviation_min']:.2g} … {r['deviation_max']:.2g}",
            f"{r['effective_rank']:.1f}",
            r["hadamard"] or "none: plane rotations",
        )
        for r in rows
    ]
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(header))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(c, widths, strict=True)).rstrip() for c in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    short = [r for r in rows if r["observations"] < 2 * r["width"]]
    if short:
        lines.append(
            f"too few: {', '.join(r['teacher'] + '/' + r['token'] for r in short)} have less than "
            "two observations a dimension; measure more --images"
        )
    lines.append(f"{images} images → {out}")
    file = shlex.quote(f"--model.normalizers.statistics={out}")
    lines.append(f"to use them: --model.normalizers=PHISNormalizers {file}")
    return "\n".join(lines)
