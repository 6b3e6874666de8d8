"""Frozen forward passes against the matrix-product floor: dtype, layout, compilation, sharing.

    python tools/bench/teachers.py [--compile] [--json FILE]

A ViT-S/16 and a ResNet-50 (random weights), batch 16 of 224 px: float32 weights, float32 weights
under bfloat16 autocast, bfloat16 weights (as `dtype: bfloat16` makes them), for the CNN with and
without channels last, for the ViT with and without bias and GELU inside the products; three
teachers that share a resize against three that do not. With --compile also `compile: true` (its
first batch takes a minute and is not timed).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import arguments, finish, in_turns, product_rate, summary
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from multikd.teachers import Teacher, TimmEncoder
from multikd.teachers.packing import PackedLinear
from multikd.teachers.resized import shared_sizes

MODELS = ("vit_small_patch16_224", "resnet50")


def teacher(name: str, **settings: Any) -> Teacher:
    """With random weights."""
    return Teacher(TimmEncoder(name, pretrained=False), image_size=224, **settings)


def under_autocast(made: Teacher, images: Tensor) -> None:
    """As a teacher of a user's own runs."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made.encoder(images)


def measure(options: argparse.Namespace, name: str, images: Tensor) -> dict[str, Any]:
    """One model."""
    plain, half = teacher(name, dtype="float32"), teacher(name, dtype="bfloat16")
    runs: dict[str, Callable[[], object]] = {
        "float32": lambda: plain(images),
        "autocast": lambda: under_autocast(plain, images),
        "bfloat16": lambda: half(images),
    }
    if any(isinstance(module, PackedLinear) for module in half.encoder.modules()):
        loose = {d: teacher(name, dtype=d, pack=False) for d in ("float32", "bfloat16")}
        runs["float32, not packed"] = lambda: loose["float32"](images)
        runs["bfloat16, not packed"] = lambda: loose["bfloat16"](images)
    if half.channels_last:
        other = teacher(name, dtype="bfloat16", channels_last=False)
        runs["bfloat16, channels first"] = lambda: other(images)
    if options.compile:
        compiled = teacher(name, dtype="bfloat16", compile=True)
        runs["bfloat16, compiled"] = lambda: compiled(images)
    with FlopCounterMode(display=False) as counter:
        plain(images)
    flop = float(counter.get_total_flops())
    rates = {"float32": product_rate(torch.float32), "half": product_rate(torch.bfloat16)}
    times = in_turns(runs, options.repeats)
    rows = {}
    for variant, values in times.items():
        floor = flop / rates["float32" if variant.startswith("float32") else "half"]
        middle = summary(values)
        rows[variant] = {**middle, "floor": floor, "to_floor": middle["median"] / floor}
    return rows


def resizing(options: argparse.Namespace) -> dict[str, Any]:
    """Three teachers of 160 px shown images of 224 px."""
    made = [Teacher(TimmEncoder("resnet18", pretrained=False), image_size=160) for _ in range(3)]
    images = torch.rand(options.batch, 3, 224, 224)

    def apart() -> None:
        for one in made:
            one(images)

    def together() -> None:
        with shared_sizes():
            apart()

    times = in_turns({"each resizes": apart, "shared": together}, options.repeats)
    return {name: summary(values) for name, values in times.items()}


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--compile", action="store_true")
    options = arguments(parser)
    images = torch.rand(options.batch, 3, 224, 224)
    figures: dict[str, Any] = {name: measure(options, name, images) for name in options.models}
    figures["resizing"] = resizing(options) if options.models == list(MODELS) else {}
    rows: list[tuple[str, ...]] = [("ms: median", "time", "floor", "× floor")]
    for name in options.models:
        for variant, found in figures[name].items():
            cells = (f"{1e3 * found['median']:.0f}", f"{1e3 * found['floor']:.0f}")
            rows.append((f"{name}, {variant}", *cells, f"{found['to_floor']:.2f}"))
    for name, found in figures["resizing"].items():
        rows.append((f"three teachers, {name}", f"{1e3 * found['median']:.0f}", "", ""))
    finish(figures, "teachers", rows, options.json)


if __name__ == "__main__":
    main()
