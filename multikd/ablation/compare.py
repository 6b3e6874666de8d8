"""``multikd teachers compare``: which teachers of a config complement one another."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from multikd.ablation.complement import (
    alike,
    greedy_by_labels,
    greedy_by_unlikeness,
    neighbour_votes,
    oracle_gain,
    recommend,
)
from multikd.data.module import ShardDataModule
from multikd.errors import MissingExtraError
from multikd.files import write_text_atomically
from multikd.fit import build_cli, without_known_noise
from multikd.modules.distillation import DistillationModule, to_float

LEAST = 0.01
_K = 20


def run_compare(
    settings: Sequence[str], images: int, out: Path | None, least: float = LEAST
) -> tuple[str, dict[str, Any]]:
    """Compare and recommend; returns (text, figures).

    Args:
        settings: as ``multikd fit`` takes them.
        images: how many images are looked at: of ``data.val``, else of ``data.train``.
        out: folder of compare.json and compare.html; None writes neither.
        least: what a teacher must add to be recommended.

    Raises:
        ValueError: the config can't be built, has one teacher only, or there are too few images.
    """
    if images <= 2 * _K:
        raise ValueError(f"--images must be more than {2 * _K}, received {images}")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    with without_known_noise():
        cli = build_cli(list(settings), run=False)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
        raise ValueError("teachers are compared with a DistillationModule and a ShardDataModule")
    if len(module.teacher_names) < 2:
        raise ValueError(
            f"the config has one teacher ({module.teacher_names[0]}): give two or more to compare"
        )
    role = "val" if data.has("val") else "train"
    features, labels, costs = extract(module, data, role, images, cli.trainer.strategy.root_device)
    if len(labels) <= 2 * _K:
        raise ValueError(f"data.{role} has {len(labels)} images: give more than {2 * _K}")
    figures = compare(features, labels, costs, least)
    figures["images"], figures["data"] = len(labels), role
    figures["encoders"] = {n: module.teacher(n).spec.name for n in module.teacher_names}
    text = as_text(figures)
    if out is not None:
        write_text_atomically(out / "compare.json", json.dumps(figures, indent=1) + "\n")
        try:
            write_text_atomically(out / "compare.html", page(figures))
            text += f"\npage: {out / 'compare.html'}"
        except MissingExtraError as error:
            text += f"\nno page: {error}"
    return text, figures


@torch.no_grad()
def extract(
    module: DistillationModule,
    data: ShardDataModule,
    role: str,
    images: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Name → ``(M, D)`` float32; labels ``(M,)``, −1 for none; seconds an image of each."""
    module.teachers.to(device)
    data.setup("fit")
    parts: dict[str, list[Tensor]] = {name: [] for name in module.teacher_names}
    taken: dict[str, list[float]] = {name: [] for name in module.teacher_names}
    labels: list[Tensor] = []
    seen = 0
    columns = (
        TextColumn("   teachers"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} images"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=images)
        for batch in data.eval_dataloader(role):
            real = batch.positions >= 0
            pixels = to_float(batch.views[0].to(device))
            for name in module.teacher_names:
                begun = time.perf_counter()
                found = module.run_teacher(name, pixels)
                summary = found.summary
                if summary is None:
                    if found.patches is None:
                        raise ValueError(f"teacher {name!r} gives neither summary nor patches")
                    summary = found.patches.mean(dim=1)
                parts[name].append(summary[real.to(device)].float().cpu())
                taken[name].append((time.perf_counter() - begun) / len(batch))
            labels.append(batch.labels[real])
            seen += int(real.sum())
            bar.update(task, completed=min(seen, images))
            if seen >= images:
                break
    data.teardown()
    paces = {n: float(torch.tensor(t[1:] or t).median()) for n, t in taken.items()}
    stacked = {name: torch.cat(rows)[:images] for name, rows in parts.items()}
    return stacked, torch.cat(labels)[:images], paces


def compare(
    features: Mapping[str, Tensor], labels: Tensor, costs: Mapping[str, float], least: float
) -> dict[str, Any]:
    """Everything that is told, as plain values."""
    names = list(features)
    cka, near = alike(features)
    figures: dict[str, Any] = {"teachers": names, "cka": cka, "neighbours": near,
                               "seconds_per_image": dict(costs)}  # fmt: skip
    known = labels >= 0
    if bool(known.all()) and int(labels.max()) > int(labels.min()):
        right = {n: neighbour_votes(rows, labels, _K) for n, rows in features.items()}
        some, best, share = oracle_gain(right)
        figures |= {
            "accuracy": {n: float(r.double().mean()) for n, r in right.items()},
            "oracle": some, "best": best, "oracle_gain": some - share,
        }  # fmt: skip
        steps = greedy_by_labels(right, costs)
    else:
        steps = greedy_by_unlikeness(names, cka, costs)
    chosen, reason = recommend(steps, least)
    figures["order"] = [
        {"name": s.name, "gain": s.gain, "cost": s.cost, "gain_per_cost": s.per_cost,
         "covered": s.covered}
        for s in steps
    ]  # fmt: skip
    figures |= {"recommended": chosen, "reason": reason, "least": least}
    return figures


def as_text(figures: Mapping[str, Any]) -> str:
    """For the terminal."""
    names = figures["teachers"]
    width = max(8, *(len(n) for n in names)) + 2
    lines = [f"{figures['images']:,} images of data.{figures['data']}"]
    for title, key in (("linear CKA", "cka"), ("10 nearest neighbours shared", "neighbours")):
        lines += ["", title, " " * width + "".join(f"{n:>{width}}" for n in names)]
        for name, row in zip(names, figures[key], strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{v:>{width}.3f}" for v in row))
    lines.append("")
    if "oracle" in figures:
        each = ", ".join(f"{n} {100 * v:.1f} %" for n, v in figures["accuracy"].items())
        lines += [
            f"right by their {_K} nearest others: {each}",
            f"right of some teacher: {100 * figures['oracle']:.1f} %, an oracle gain of "
            f"{100 * figures['oracle_gain']:.1f} points over {figures['best']}",
        ]
    else:
        lines.append("the images have no labels: teachers are ordered by how unlike they are")
    lines.append("greedy order by gain per cost:")
    for place, step in enumerate(figures["order"], start=1):
        lines.append(
            f"  {place}. {step['name']}: +{100 * step['gain']:.1f} %, "
            f"{1000 * step['cost']:.2f} ms an image"
        )
    lines.append(f"recommended: {', '.join(figures['recommended'])} ({figures['reason']})")
    return "\n".join(lines)


def page(figures: Mapping[str, Any]) -> str:
    """The same as one HTML file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from multikd.pages.heat import heat_map
    from multikd.pages.html import cell, document, header, picture, row, section, table

    names = figures["teachers"]
    maps = "".join(
        f"<div>{picture(heat_map(figures[key], names, title), title)}</div>"
        for key, title in (("cka", "linear CKA"), ("neighbours", "10 nearest neighbours shared"))
    )
    rows = [
        row(
            f"{place}. {step['name']}",
            [
                cell(f"+{100 * step['gain']:.1f} %"),
                cell(f"{1000 * step['cost']:.2f}"),
                cell("–" if step["covered"] is None else f"{100 * step['covered']:.1f} %"),
            ],
            figures["encoders"][step["name"]],
            "student" if step["name"] in figures["recommended"] else "",
        )
        for place, step in enumerate(figures["order"], start=1)
    ]
    head = [header("teacher"), header("adds"), header("ms an image"), header("right so far")]
    told = (
        f"<h1>Which teachers complement one another</h1><p>{figures['images']:,} images of "
        f"data.{escape(figures['data'])}.</p><p><b>Recommended: "
        f"{escape(', '.join(figures['recommended']))}.</b> {escape(figures['reason'])}.</p>"
    )
    if "oracle" in figures:
        told += (
            f"<p>Some teacher is right on {100 * figures['oracle']:.1f} % of the images, the best "
            f"alone ({escape(figures['best'])}) is {100 * figures['oracle_gain']:.1f} points below."
            "</p>"
        )
    return document(
        "multikd: teachers compared",
        [
            told,
            section("How alike they see", f'<div class="pair">{maps}</div>'),
            section("Greedy order by gain per cost", table(head, rows)),
        ],
        broad=True,
    )
