"""A whole training step against a naive one: teachers, student, ladder, losses, backward, AdamW.

    python tools/bench/step.py [--dtypes bfloat16 float32] [--json FILE] [--published FOLDER]

A ViT-S/16 student, four ViT-S/16 teachers (random weights; the arithmetic does not care), batch 16
of uint8 images of 224 px, UNIC's ladder (hidden 384/1536) with hardest-kept dropping. *Naive* runs
the same models as timm makes them under autocast, the ladder, losses and dropping of `naive.py`,
and torch's AdamW as it comes; its student has torch's fused attention and its teachers products
and a softmax, as in the published code. *Ours* is `DistillationModule.step` with teachers in
bfloat16 weights; *cached* is the same with the teachers' features in the batch. All under one
allocator and the same flags.

`--published FOLDER` (a checkout of naver/unic) also runs the published step: its own student,
ladder, loss, dropping and standardiser, and four of its DINO teachers in the size of a ViT-S.

The floor beside: FLOP of the step's products, counted, at the rate of a 2048³ product in the same
run. Parts of ours are timed in three steps more, each beside the floor of its own products (those
of the kept images, in the ladder's backward pass).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from measuring import arguments, finish, in_turns, product_rate, ratio, shown, summary
from naive import NaiveLadder, NaiveStandardizer, naive_dropping, naive_losses
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from multikd.losses import HardestKept
from multikd.modules import DistillationModule
from multikd.normalizers import EMAStandardizers
from multikd.optim import fuse, parameter_groups
from multikd.projectors import MLPProjectors
from multikd.students import StudentEncoder
from multikd.teachers import Teacher, TimmEncoder
from multikd.types import Batch, StudentOutput, TokenFeatures

ARCHITECTURE = "vit_small_patch16_224"
M = TypeVar("M", bound=nn.Module)


def build(count: int, dtype: torch.dtype, size: int = 224) -> DistillationModule:
    """UNIC's parts with ``count`` teachers."""
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    teachers = {
        f"teacher{t}": Teacher(
            TimmEncoder(ARCHITECTURE, pretrained=False, image_size=size), dtype=cast(Any, name)
        )
        for t in range(count)
    }
    module = DistillationModule(
        teachers,
        StudentEncoder(ARCHITECTURE, image_size=size),
        projectors=MLPProjectors(384, 1536),
        normalizers=EMAStandardizers(total_steps=1000),
        dropper=HardestKept(0.5),
    )
    return module.train()


def batch_of(images: int, size: int = 224) -> Batch:
    """Images of noise."""
    return Batch(
        views=[torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)],
        labels=torch.full((images,), -1),
        keys=[str(i) for i in range(images)],
        dataset=torch.zeros(images, dtype=torch.int64),
        positions=torch.arange(images),
        samples=torch.arange(images),
    )


class Ours:
    """A step as Lightning makes it, without Lightning."""

    def __init__(self, module: DistillationModule, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.optimizer = _optimizer([("student", module.student), ("ladder", module.ladder)])
        fuse(self.optimizer)
        self.number = 0

    def autocast(self) -> AbstractContextManager[object]:
        """Of this dtype."""
        return autocast(self.dtype)

    def __call__(self, batch: Batch) -> None:
        """Everything."""
        self.optimizer.zero_grad()
        batch.positions = batch.positions + len(batch)  # other draws of the dropping
        with self.autocast():
            total, _ = self.module.step(batch, 0, self.number, training=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.number += 1

    def parts(
        self, batch: Batch, clock: Callable[[], float] = time.perf_counter
    ) -> dict[str, float]:
        """Seconds of each part of one step, or what else ``clock`` counts."""
        module = self.module
        marks = [("", clock())]
        self.optimizer.zero_grad()
        images = batch.views[0].float().div_(255.0)
        with self.autocast():
            targets = module.targets(batch, images, 0, module.teacher_names)
            marks.append(("teachers", clock()))
            output: StudentOutput = module.student(images)
            marks.append(("student forward", clock()))
            grids = {n: targets[n].grid for n in targets}
            predictions = module.ladder(output.rungs, grids)
            marks.append(("ladder forward", clock()))
            wanted = {}
            for name, raw in targets.items():
                wanted[name] = module.normalizer(name)(raw)
                module.normalizer(name).update(raw)
            marks.append(("normalisers", clock()))
            losses = torch.stack(
                [module.losses[n](predictions[n], wanted[n], batch) for n in targets]
            )
            keep = module.dropper.keep(losses.detach(), batch.positions, 0, module.teacher_names)
            total = (losses * keep).sum() / keep.sum()
            marks.append(("losses", clock()))
        edges = [t for rung in output.rungs for t in (rung.summary, rung.patches) if t is not None]
        parameters = list(module.ladder.parameters())
        found = torch.autograd.grad(total, [*edges, *parameters])
        marks.append(("loss and ladder backward", clock()))
        torch.autograd.backward(edges, found[: len(edges)])
        for parameter, gradient in zip(parameters, found[len(edges) :], strict=True):
            parameter.grad = gradient
        marks.append(("student backward", clock()))
        self.optimizer.step()
        marks.append(("optimiser", clock()))
        return {name: end - begun for (_, begun), (name, end) in pairwise(marks)}


class Naive:
    """The same mathematics in the plainest way."""

    def __init__(self, module: DistillationModule, dtype: torch.dtype) -> None:
        self.dtype = dtype
        size = module.student.spec.image_size[0]
        self.student = as_timm_makes_it(StudentEncoder(ARCHITECTURE, image_size=size).train())
        self.ladder = NaiveLadder(module.ladder)
        self.teachers = {
            name: as_timm_makes_it(
                TimmEncoder(ARCHITECTURE, pretrained=False, image_size=size).eval(), fused=False
            )
            for name in module.teacher_names
        }
        self.normalize = NaiveStandardizer()
        self.optimizer = _optimizer([("student", self.student), ("ladder", self.ladder)])

    def run_teachers(self, images: Tensor) -> dict[str, TokenFeatures]:
        """Float32 weights under autocast."""
        with torch.no_grad(), autocast(self.dtype):
            return {name: teacher(images) for name, teacher in self.teachers.items()}

    def __call__(self, batch: Batch) -> None:
        """Everything."""
        self.optimizer.zero_grad()
        images = batch.views[0].float() / 255.0
        targets = {n: self.normalize(n, f) for n, f in self.run_teachers(images).items()}
        with autocast(self.dtype):
            output: StudentOutput = self.student(images)
            predictions = self.ladder(
                [rung.summary for rung in output.rungs], [rung.patches for rung in output.rungs]
            )
            losses, _ = naive_losses(predictions, targets)
            total = naive_dropping(losses)
        total.backward()  # type: ignore[no-untyped-call]
        total.item()
        self.optimizer.step()


class Published:
    """The step of naver/unic, from a checkout, with its readings by the host."""

    def __init__(self, folder: Path, teachers: int, dtype: torch.dtype) -> None:
        sys.path.insert(0, str(folder))
        from dinov2.models.vision_transformer import get_model  # type: ignore[import-not-found]
        from modeling.losses import unic_loss  # type: ignore[import-not-found]
        from modeling.unic import LP, UNIC  # type: ignore[import-not-found]

        published = importlib.import_module("teachers")  # a file beside this one has that name
        vision = importlib.import_module("teachers.vit_dino").VisionTransformer
        self.dtype, self.loss, self.run = dtype, unic_loss, published.get_teacher_output
        encoder = get_model(arch="vit_small", patch_size=16, drop_path_rate=0.0, img_size=224)
        names = [f"teacher{t}" for t in range(teachers)]
        ladder = LP(384, dict.fromkeys(names, 384), 12, hidden_dim=384, last_hidden_dim=1536)
        self.model = UNIC(encoder, ladder).train()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.teachers = {
            name: vision(
                img_size=[224],
                patch_size=16,
                embed_dim=384,
                depth=12,
                num_heads=6,
                qkv_bias=True,
                norm_layer=norm,
            )
            .eval()
            .requires_grad_(False)
            for name in names
        }
        self.statistics = {
            name: {
                "cls": {"mean": torch.zeros(1, 384), "std": torch.ones(1, 384)},
                "patch": {"mean": torch.zeros(1, 1, 384), "std": torch.ones(1, 1, 384)},
            }
            for name in names
        }
        self.optimizer = _optimizer([("student", self.model)])

    def run_teachers(self, images: Tensor) -> Any:
        """Float32 weights under autocast, and the standardisers."""
        with torch.no_grad(), autocast(self.dtype):
            return self.run(images, self.teachers, self.statistics, 0.5)

    def __call__(self, batch: Batch) -> None:
        """Everything."""
        images = batch.views[0].float() / 255.0
        with autocast(self.dtype):
            found = self.model(images)
            targets = self.run_teachers(images)
            loss, _ = self.loss(found, targets, 0.5, 0.5, 0.5, metric_dict={})
        loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def as_timm_makes_it(model: M, fused: bool = True) -> M:
    """Without this package's operators for CPUs.

    Args:
        model: of ours.
        fused: torch's fused attention; else timm's own products and softmax.
    """
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module._forward_hooks_always_called.clear()
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]
    return model


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Nothing for float32."""
    mixed = dtype != torch.float32
    return torch.autocast("cpu", dtype=dtype if mixed else None, enabled=mixed)


def _optimizer(parts: list[tuple[str, nn.Module]]) -> torch.optim.Optimizer:
    named = [(f"{part}.{n}", p) for part, module in parts for n, p in module.named_parameters()]
    return torch.optim.AdamW(parameter_groups(named), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.03)


def flop(run: Callable[[], object]) -> float:
    """FLOP of a call's matrix products, attention and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """All figures of one dtype."""
    module = build(options.teachers, dtype)
    batch = batch_of(options.batch)
    ours, naive = Ours(module, dtype), Naive(module, dtype)
    cached = batch_of(options.batch)
    images = batch.views[0].float() / 255.0
    found = module.targets(batch, images, 0, module.teacher_names)
    kept = torch.float16 if dtype == torch.bfloat16 else torch.float32
    cached.cached = {name: features.to(dtype=kept) for name, features in found.items()}
    rate = product_rate(dtype)
    work = {
        "step": flop(lambda: naive(batch)),
        "teachers": flop(lambda: naive.run_teachers(images)),
    }
    runs: dict[str, Callable[[], object]] = {
        "naive": lambda: naive(batch),
        "ours": lambda: ours(batch),
        "cached": lambda: ours(cached),
        "teachers, naive": lambda: naive.run_teachers(images),
        "teachers, ours": lambda: module.targets(batch, images, 0, module.teacher_names),
    }
    if options.published:
        published = Published(options.published, options.teachers, dtype)
        runs["published"] = lambda: published(batch)
        runs["teachers, published"] = lambda: published.run_teachers(images)
    times = in_turns(runs, options.repeats, options.warm_up)
    parts = [ours.parts(batch) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        products = ours.parts(batch, lambda: float(counter.get_total_flops()))
    rate = max(rate, product_rate(dtype))  # the first may have met a busy moment
    return {
        "product_rate": rate,
        "flop": work,
        "floor": {name: value / rate for name, value in work.items()},
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": {
            "whole step": ratio(times["naive"], times["ours"]),
            "from cached features": ratio(times["naive"], times["cached"]),
            "teachers": ratio(times["teachers, naive"], times["teachers, ours"]),
            **(
                {
                    "published to naive": ratio(times["published"], times["naive"]),
                    "published to ours": ratio(times["published"], times["ours"]),
                }
                if options.published
                else {}
            ),
        },
        "teachers_to_floor": ratio(
            times["teachers, ours"], [work["teachers"] / rate] * options.repeats
        ),
        "parts": {name: summary([p[name] for p in parts]) for name in parts[0]},
        "floor_of_parts": {name: count / rate for name, count in products.items()},
    }


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--teachers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--published", type=Path, help="checkout of naver/unic to run beside")
    options = arguments(parser)
    rows: list[tuple[str, ...]] = [("", "median [range]")]
    figures: dict[str, Any] = {}
    for name in options.dtypes:
        found = figures[name] = measure(options, getattr(torch, name))
        rows.append((f"{name}: floor of step, of teachers, ms", _floors(found)))
        rows += [(f"{name}: {w}, ms", shown(v, scale=1e3)) for w, v in found["seconds"].items()]
        rows += [(f"{name}: {w}, ratio", shown(v, "×")) for w, v in found["ratio"].items()]
        rows.append((f"{name}: teachers to floor", shown(found["teachers_to_floor"], "×")))
        for part, seconds in found["parts"].items():
            floor = f"; floor {1e3 * found['floor_of_parts'][part]:.0f}"
            rows.append((f"{name}: part {part}, ms", shown(seconds, scale=1e3) + floor))
    finish(figures, "training step", rows, options.json)


def _floors(found: dict[str, Any]) -> str:
    return ", ".join(f"{1e3 * value:.0f}" for value in found["floor"].values())


if __name__ == "__main__":
    main()
