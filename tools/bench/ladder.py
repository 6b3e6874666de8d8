"""The fused ladder against a naive one at the same mathematics: forward, loss, backward, memory.

    python tools/bench/ladder.py [--json FILE] [--published FOLDER]

Sizes are those of UNIC with a ViT-S/16 student (D 384, hidden 384 and 1536 at the last of 12 rungs,
four teachers of width 384, 14×14 patches, batch 16), and of a small student with wide teachers (D
192, width 1280, 8×8 patches, batch 64). Cases: ladder alone with a gradient for every row; the
same with the rows of a hardest-kept draw of p = 0.5 (of the others the gradient is zero); and
ladder with loss and dropping. Printed beside: the floor, the time of the naive case's matrix
products at the rate of a 2048³ product measured in the same run; bytes kept for the backward pass;
the peak.

`--published FOLDER` (a checkout of naver/unic) also runs the published ladder, loss and dropping.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import (
    arguments,
    finish,
    in_turns,
    peak_bytes,
    product_rate,
    ratio,
    saved_bytes,
    shown,
    summary,
)
from naive import NaiveLadder, naive_dropping, naive_losses
from torch import Tensor, nn

from multikd.ladder import Ladder
from multikd.losses import FeatureLoss, HardestKept, weigh
from multikd.projectors import MLPProjectors
from multikd.types import Grid, TokenFeatures, Widths


@dataclass
class Sizes:
    """One case's sizes."""

    width: int
    hidden: int
    last_hidden: int
    teacher: int
    side: int
    batch: int
    rungs: int = 12
    teachers: int = 4

    @property
    def products(self) -> float:
        """FLOP of the forward pass's matrix products."""
        hidden = (self.rungs - 1) * self.hidden + self.last_hidden
        rows = self.batch * (self.side**2 + 1)
        return 2.0 * rows * self.teachers * hidden * (self.width + self.teacher)


SIZES = {
    "vit_s": Sizes(384, 384, 1536, 384, 14, 16),
    "wide": Sizes(192, 192, 768, 1280, 8, 64),
}


class Case:
    """Both ladders on the same inputs, with the same weights."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self.names = [f"teacher{t}" for t in range(sizes.teachers)]
        widths = Widths(sizes.width, sizes.width)
        teacher = Widths(sizes.teacher, sizes.teacher)
        self.ladder = Ladder(
            [widths] * sizes.rungs,
            dict.fromkeys(self.names, teacher),
            MLPProjectors(sizes.hidden, sizes.last_hidden),
        )
        self.naive = NaiveLadder(self.ladder)
        count = sizes.side**2
        self.grid: Grid = (sizes.side, sizes.side)
        self.summaries = [
            torch.randn(sizes.batch, sizes.width, requires_grad=True) for _ in range(sizes.rungs)
        ]
        self.patches = [
            torch.randn(sizes.batch, count, sizes.width, requires_grad=True)
            for _ in range(sizes.rungs)
        ]
        self.targets = {
            name: TokenFeatures(
                torch.randn(sizes.batch, sizes.teacher),
                torch.randn(sizes.batch, count, sizes.teacher),
                self.grid,
            )
            for name in self.names
        }
        self.keep = torch.ones(sizes.teachers, sizes.batch)
        self.dropper = HardestKept(0.5)
        self.dropper.bind(self.names)
        self.dropper.train()
        self.positions = torch.arange(sizes.batch)
        self.epoch = 0

    def autocast(self) -> AbstractContextManager[object]:
        """Of this case's dtype."""
        mixed = self.dtype != torch.float32
        return torch.autocast("cpu", dtype=self.dtype if mixed else None, enabled=mixed)

    def fused(self) -> dict[str, dict[str, Tensor]]:
        """Predictions of our ladder."""
        rungs = [
            TokenFeatures(s, p, self.grid)
            for s, p in zip(self.summaries, self.patches, strict=True)
        ]
        grids: dict[str, Grid | None] = dict.fromkeys(self.names, self.grid)
        with self.autocast():
            found = self.ladder(rungs, grids)
        return {n: {"summary": f.summary, "patches": f.patches} for n, f in found.items()}

    def plain(self) -> dict[str, dict[str, Tensor]]:
        """Predictions of the naive ladder."""
        with self.autocast():
            return self.naive(self.summaries, self.patches)  # type: ignore[no-any-return]

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """Everything that gets a gradient."""
        return [*module.parameters(), *self.summaries, *self.patches]

    def alone(self, forward: Callable[[], Any], module: nn.Module, keep: Tensor) -> None:
        """Forward and backward with a given gradient, zero in the rows that are not kept."""
        found = forward()
        tensors, gradients = [], []
        for t, name in enumerate(self.names):
            for token, tensor in found[name].items():
                given = self.gradients[token].to(tensor.dtype)
                mask = keep[t].view(-1, *[1] * (tensor.ndim - 1))
                tensors.append(tensor)
                gradients.append(given * mask)
        torch.autograd.backward(tensors, gradients)
        self.clear(module)

    def clear(self, module: nn.Module) -> None:
        """Forget gradients, as zero_grad(set_to_none=True) does."""
        for tensor in self.parameters(module):
            tensor.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """A gradient for the predictions of one teacher."""
        if not hasattr(self, "_gradients"):
            target = self.targets[self.names[0]]
            self._gradients = {
                "summary": torch.randn_like(target.summary) / target.summary.numel(),  # type: ignore[arg-type,union-attr]
                "patches": torch.randn_like(target.patches) / target.patches.numel(),  # type: ignore[arg-type,union-attr]
            }
        return self._gradients

    def whole_fused(self) -> None:
        """Ladder, loss, dropping and backward, ours."""
        found = self.fused()
        loss = FeatureLoss()
        rows = [
            loss(TokenFeatures(f["summary"], f["patches"], self.grid), self.targets[n])
            for n, f in found.items()
        ]
        losses = torch.stack(rows)
        keep = self.dropper.keep(losses.detach(), self.positions, self.epoch)
        self.epoch += 1
        total, _ = weigh(losses, keep, torch.ones(len(losses)), "batch")
        total.backward()  # type: ignore[no-untyped-call]
        self.clear(self.ladder)

    def whole_naive(self) -> None:
        """The same, naive."""
        found = self.plain()
        with self.autocast():
            total = naive_dropping(naive_losses(found, self.targets)[0])
        total.backward()  # type: ignore[no-untyped-call]
        self.clear(self.naive)

    def published(self, folder: Path) -> tuple[nn.Module, Callable[[], Any], Callable[[], None]]:
        """The published ladder with the same weights; its forward pass and its whole case."""
        sys.path.insert(0, str(folder))
        from modeling.losses import unic_loss  # type: ignore[import-not-found]
        from modeling.unic import LP  # type: ignore[import-not-found]

        module = LP(
            self.sizes.width,
            dict.fromkeys(self.names, self.sizes.teacher),
            self.sizes.rungs,
            hidden_dim=self.sizes.hidden,
            last_hidden_dim=self.sizes.last_hidden,
        )

        def forward() -> Any:
            with self.autocast():
                found = module(
                    [self.summaries[0], *self.summaries], [self.patches[0], *self.patches]
                )
            return {n: {"summary": f["cls"], "patches": f["patch"]} for n, f in found.items()}

        def whole() -> None:
            with self.autocast():
                found = module(
                    [self.summaries[0], *self.summaries], [self.patches[0], *self.patches]
                )
                targets = {
                    n: {"cls": self.targets[n].summary, "patch": self.targets[n].patches}
                    for n in self.names
                }
                total, _ = unic_loss(found, targets, metric_dict={})
            total.backward()
            self.clear(module)

        return module, forward, whole


def hardest_draw(case: Case) -> Tensor:
    """A draw of hardest-kept dropping that keeps as much as is expected: one teacher of an image,
    and half the others."""
    expected = (1 + (case.sizes.teachers - 1) / 2) / case.sizes.teachers
    losses = torch.rand(case.sizes.teachers, case.sizes.batch)
    draws = [case.dropper.keep(losses, case.positions, epoch) for epoch in range(50)]
    return min(draws, key=lambda keep: abs(float(keep.mean()) - expected))


def measure(options: argparse.Namespace, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """All figures of one case."""
    case = Case(SIZES[name], dtype)
    keep = hardest_draw(case)
    every = torch.ones_like(keep)
    case.gradients  # noqa: B018 - drawn before anything is timed
    cases: dict[str, dict[str, Callable[[], None]]] = {
        "alone": {
            "naive": lambda: case.alone(case.plain, case.naive, every),
            "fused": lambda: case.alone(case.fused, case.ladder, every),
        },
        "dropping": {
            "naive": lambda: case.alone(case.plain, case.naive, keep),
            "fused": lambda: case.alone(case.fused, case.ladder, keep),
        },
        "with loss": {"naive": case.whole_naive, "fused": case.whole_fused},
    }
    if options.published:
        module, forward, whole = case.published(options.published)
        cases["alone"]["published"] = lambda: case.alone(forward, module, every)
        cases["dropping"]["published"] = lambda: case.alone(forward, module, keep)
        cases["with loss"]["published"] = whole
    cases = {what: cases[what] for what in options.cases}
    rate = product_rate(dtype)
    figures: dict[str, Any] = {"product_rate": rate, "kept_share": float(keep.mean()), "cases": {}}
    for what, runs in cases.items():
        # Four turns until the heap is as large as both need: pages are mapped while it grows.
        times = in_turns(runs, options.repeats, warm_up=4)
        row: dict[str, Any] = {variant: summary(values) for variant, values in times.items()}
        row["floor"] = 3 * case.sizes.products / rate
        row["ratio"] = ratio(times["naive"], times["fused"])
        if "published" in times:
            row["published_to_naive"] = ratio(times["published"], times["naive"])
        figures["cases"][what] = row
    figures["memory"] = False
    if "alone" not in cases:
        return figures
    figures["memory"] = True
    saved = {
        "naive": saved_bytes(case.plain, case.parameters(case.naive)),
        "fused": saved_bytes(case.fused, case.parameters(case.ladder)),
    }
    peaks = {variant: peak_bytes(run) for variant, run in cases["alone"].items()}
    figures["saved_bytes"] = {**saved, "share": saved["fused"] / saved["naive"]}
    figures["peak_bytes"] = {**peaks, "share": peaks["fused"] / peaks["naive"]}
    return figures


def rows_of(name: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """For people."""
    rows: list[tuple[str, ...]] = []
    for what, row in found["cases"].items():
        published = row.get("published_to_naive")
        rows.append(
            (
                f"{name}, {what}",
                f"{1e3 * row['floor']:.0f}",
                shown(row["naive"], scale=1e3),
                shown(row["fused"], scale=1e3),
                shown(row["ratio"], "×"),
                "" if published is None else shown(published, "×"),
            )
        )
    for what, key in (
        ()
        if not found["memory"]
        else (("MB kept for backward", "saved_bytes"), ("peak MB", "peak_bytes"))
    ):
        row = found[key]
        values = [f"{row[variant] / 1e6:.0f}" for variant in ("naive", "fused")]
        rows.append((f"{name}, {what}", "", *values, f"{100 * row['share']:.1f} %", ""))
    return rows


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=tuple(SIZES), nargs="+", default=list(SIZES))
    names = ("alone", "dropping", "with loss")
    parser.add_argument("--cases", choices=names, nargs="+", default=list(names))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--published", type=Path, help="checkout of naver/unic to run beside")
    options = arguments(parser)
    figures: dict[str, Any] = {}
    titles = ("ms: median [range]", "floor", "naive", "fused", "fused is", "published/naive")
    rows: list[tuple[str, ...]] = [titles]
    for dtype in options.dtypes:
        for name in options.sizes:
            found = measure(options, name, getattr(torch, dtype))
            figures[f"{name} {dtype}"] = found
            rows += rows_of(f"{name} {dtype}", found)
    finish(figures, "ladder, forward + backward", rows, options.json)


if __name__ == "__main__":
    main()
