"""One method with one seed, within a budget of CPU seconds: ``compare_methods.py`` starts these.

    OMP_NUM_THREADS=1 python tools/compare_runs.py OUT NAME SEED SECONDS

A run is a shipped config with overrides. A few warm-up steps on a throw-away copy tell what a step
costs and what a run costs whatever its length; the run's length is then set so that warm-up and
cosine fit into the budget. All is CPU time of this process, which has one thread, so that other
load on the machine changes it little. Teachers' forward passes count: as part of the steps where
they run live, and as the measured cost of filling the cache where features are cached (the cache
itself is shared by runs, so that it is filled once). Whichever gives more steps is taken.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from multikd.config_files import load_config
from multikd.data.module import ShardDataModule
from multikd.data.views import EvalViews, LightViews
from multikd.demo.embedded import CLASSES
from multikd.demo.scoring import Features, both_sets, score
from multikd.export import export_timm_folder
from multikd.files import write_text_atomically
from multikd.fit import build_cli, without_known_noise
from multikd.modules.distillation import to_float
from multikd.runs.overrides import get, put
from multikd.runs.trainer import class_of
from multikd.stages.chain import read_chain
from multikd.stages.plan import stage_config
from multikd.students import StudentEncoder
from multikd.teachers import Teacher
from multikd.types import TokenFeatures

TRAIN, TEST = "multikd-demo/shards/train", "multikd-demo/shards/test"
FEW = f"{TRAIN}/shard-000000.tar"  # 1,000 labels
HEADS, FEW_HEADS, PSEUDO = "multikd-demo/heads", "multikd-demo/heads-few", "multikd-demo/pseudo"
REFERENCE = "reference.json"
WARM_UP, SKIPPED = 7, 2  # steps on the throw-away copy, and of them those not counted
KEPT_CALLBACKS = ("FiniteLossGuard",)


@dataclass(frozen=True)
class Method:
    """What is run.

    Attributes:
        config: a shipped config.
        settings: dotted keys and values over it.
        cache: folder of cached features; "" where teachers are trained, or there are none.
        chain: a shipped chain in place of a config, its stages sharing the budget evenly.
        member: of several students, the one that is compared.
        charge: entry of reference.json whose CPU seconds count, too.
        note: for the table.
    """

    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    cache: str = ""
    chain: str = ""
    member: str = ""
    charge: str = ""
    note: str = ""


def _single(name: str) -> Method:
    encoder = {"encoder": f"packaged:efficientnet_{name}", "resize": "none", "dtype": "float32"}
    teacher = {"class_path": "multikd.teachers.Teacher", "init_args": encoder}
    note = f"no labels; {name} alone"
    return Method("demo", {"model.teachers": {name: teacher}}, "features-plain", note=note)


METHODS: dict[str, Method] = {
    "labels": Method("classics/labels", note="from scratch"),
    "response": Method("classics/response", cache="features-heads"),
    "fitnets": Method("classics/fitnets", cache="features-plain"),
    "attention_transfer": Method("classics/attention_transfer", cache="features-plain"),
    "rkd": Method("classics/rkd", cache="features-plain"),
    "similarity": Method("classics/similarity", cache="features-plain"),
    "ladder_lite0": _single("lite0"),
    "ladder_lite1": _single("lite1"),
    "ladder_lite2": _single("lite2"),
    "ladder_three": Method("demo", {}, "features-plain", note="no labels; with dropping"),
    "atsc": Method(
        "classics/atsc", {"model.teachers.lite0.head": f"{HEADS}/lite0.safetensors"},
        note="own = projector and shared classifier",
    ),
    "lgtm": Method("classics/lgtm", {"model.teacher.head": f"{HEADS}/lite0.safetensors"}),
    "self": Method("classics/self_distillation", note="the average"),
    "mutual": Method("classics/mutual", member="narrow", note="the resnet10t of two"),
    "progressive": Method(chain="progressive", cache="features-plain", note="no labels"),
    "curriculum": Method("classics/curriculum", cache="features-heads"),
    "labels_1000": Method("classics/labels", {"data.train": FEW}, note="1,000 labels"),
    "pseudolabel": Method(
        "classics/pseudolabel", {"data.train.few.urls": FEW, "data.train.many.urls": PSEUDO},
        charge="pseudo_seconds", note="1,000 labels",
    ),
}  # fmt: skip


class Clock(pl.Callback):
    """CPU seconds of the process at the end of every training batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())


def shared_config(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """What all methods have in common: data, views, one process, and no files written."""
    trainer = config.setdefault("trainer", {})
    given = trainer.get("callbacks") or []
    trainer |= {
        "callbacks": [c for c in given if class_of(c) in KEPT_CALLBACKS],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "max_epochs": -1,
        "default_root_dir": "scratch",
    }
    config["seed_everything"] = seed
    for key, value in (
        ("train", get(config, "data.train") or TRAIN),
        ("val", None),
        ("bank", None),
    ):
        put(config, f"data.{key}", value)
    put(config, "data.seed", seed)
    put(config, "data.recorded_seed", 0)  # one cache for runs of all seeds
    put(config, "data.num_workers", 0)
    put(config, "data.in_memory", True)
    put(config, "model.schedule.warmup_epochs", 0.0)
    put(config, "model.schedule.warmup_share", 0.1)
    return config


def with_cache(config: dict[str, Any], cache: str) -> dict[str, Any]:
    """The config with cached features (of one recorded view of each image), or live teachers."""
    config = copy.deepcopy(config)
    put(config, "data.cache", cache or None)
    put(config, "data.train_views.recorded", 1 if cache else None)
    if cache:
        callback = {"class_path": "multikd.callbacks.PrecomputeFeatures"}
        config["trainer"]["callbacks"] = [*config["trainer"]["callbacks"], callback]
    return config


def fitted(config: dict[str, Any], steps: int) -> tuple[Any, Clock, float]:
    """A fit of so many steps; returns (CLI with the trained module, clock, CPU seconds)."""
    config = copy.deepcopy(config)
    config["trainer"]["max_steps"] = steps
    clock = Clock()
    with without_known_noise():
        cli = build_cli([f"--config={json.dumps(config)}"], run=False, typed=False)
        trainer: Any = cli.trainer  # it has callbacks, which its type does not say
        trainer.callbacks.append(clock)
        begun = time.process_time()
        cli.trainer.fit(cli.model, cli.datamodule)
    return cli, clock, time.process_time() - begun


@dataclass
class Trained:
    """A module after its share of the budget.

    Attributes:
        module: trained.
        steps: optimiser steps.
        cached: whether the teachers' features were.
        step_seconds: what a step cost in the warm-up.
        spent: CPU seconds, the charge for the cache among them.
    """

    module: Any
    steps: int
    cached: bool
    step_seconds: float
    spent: float


def train(config: dict[str, Any], cache: str, fill: float, budget: float, images: int) -> Trained:
    """Measure a few steps, and train for as many as fit into the budget.

    Args:
        config: with what is shared.
        cache: folder of cached features; "" for none.
        fill: CPU seconds that filling it took (of the teachers of this run).
        budget: CPU seconds.
        images: of the training set.
    """
    chosen, charge = with_cache(config, cache), fill if cache else 0.0
    fresh = bool(cache) and not Path(cache).exists()
    _, clock, seconds = fitted(chosen, WARM_UP)
    cost, fixed = _costs(clock, seconds)
    if fresh:  # the warm-up filled it, which the charge pays for
        fixed = max(0.0, fixed - fill)
    if cache:
        batch = int(get(config, "data.batch_size"))
        live = cost + fill * batch / images
        if (budget - fill - fixed) / cost < (budget - fixed) / live:
            chosen, charge = with_cache(config, ""), 0.0
            _, clock, seconds = fitted(chosen, WARM_UP)
            cost, fixed = _costs(clock, seconds)
    steps = max(1, int((budget - charge - fixed) / cost))
    cli, _, seconds = fitted(chosen, steps)
    return Trained(cli.model, steps, bool(charge), cost, seconds + charge)


def _costs(clock: Clock, seconds: float) -> tuple[float, float]:
    """CPU seconds of a step (median), and those of a run whatever its length."""
    steps = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][SKIPPED - 1 :]
    cost = statistics.median(steps)
    return cost, max(0.0, seconds - cost * len(clock.ends))


# --- scores -----------------------------------------------------------------------------------


def loaders() -> tuple[Any, Any]:
    """All 4,000 train images and the 1,000 held-out ones, as every encoder is scored on them."""
    data = ShardDataModule(
        TRAIN, val=TEST, bank=TRAIN, train_views=LightViews(64), eval_views=EvalViews(64),
        num_workers=0, in_memory=True, eval_batch_size=100,
    )  # fmt: skip
    data.setup("fit")
    queries, bank = data.val_dataloader()
    return bank, queries


class Deployed(nn.Module):
    """A trained module as it is used: features of its student, and logits where it has any."""

    def __init__(self, module: Any, member: str = "") -> None:
        super().__init__()
        self.module = module
        self.student: StudentEncoder = (
            module.student_of(member) if member
            else getattr(module, "inference_student", None) or module.student
        )  # fmt: skip
        # Of adaptive teaching the module answers, with projector and shared classifier.
        self.by_module = not member and self.student.num_classes == 0

    def forward(self, images: Tensor) -> TokenFeatures:
        """``images``: float ``(B, 3, H, W)`` in [0, 1]."""
        if self.by_module and type(self.module).__name__ == "AdaptiveModule":
            found: TokenFeatures = self.module(images)
            return found
        return self.student.features(images)


@torch.inference_mode()
def accuracy(encoder: nn.Module, queries: Any) -> float | None:
    """Of the student's own classifier on the held-out images; None where it has none."""
    right, seen = 0, 0
    encoder.eval()
    for batch in queries:
        logits = encoder(to_float(batch.views[0])).logits
        if logits is None:
            return None
        real = batch.positions >= 0
        right += int(((logits.argmax(1) == batch.labels) & real).sum())
        seen += int(real.sum())
    return right / seen


def scores(name: str, features: Features) -> dict[str, float]:
    """k-NN and logistic regression on the features, by what ``multikd demo`` scores with."""
    found = score(name, "student", features, None, CLASSES)
    return {k: float(getattr(found, k).double().mean()) for k in ("knn", "logistic")}


# --- one run ----------------------------------------------------------------------------------


def run(name: str, seed: int, budget: float) -> dict[str, Any]:
    """Train a method within a budget and score it; the working directory is the table's folder."""
    method = METHODS[name]
    reference = json.loads(Path(REFERENCE).read_text(encoding="utf-8"))
    charge = float(reference[method.charge]) if method.charge else 0.0
    wall = time.perf_counter()
    if method.chain:
        stages = _chain(method, seed, budget, reference)
    else:
        config = copy.deepcopy(load_config(method.config))
        for key, value in method.settings.items():
            put(config, key, value)
        config = shared_config(config, seed)
        fill = _fill(config, reference) if method.cache else 0.0
        stages = [train(config, method.cache, fill, budget - charge, reference["images"])]
    wall = time.perf_counter() - wall
    last = stages[-1]
    encoder = Deployed(last.module, method.member)
    bank, queries = loaders()
    own = accuracy(encoder, queries)
    means = scores(name, both_sets(encoder, bank, queries))
    trained = {p for s in stages for p in s.module.parameters() if p.requires_grad}
    student = sum(p.numel() for p in encoder.student.parameters())
    used = sum(p.numel() for p in trained - set(encoder.student.parameters()))
    return {
        "method": name,
        "seed": seed,
        "budget": budget,
        **means,
        "own": own,
        "cpu_seconds": charge + sum(s.spent for s in stages),
        "wall_seconds": wall,
        "steps": [s.steps for s in stages],
        "cached": [s.cached for s in stages],
        "step_seconds": [s.step_seconds for s in stages],
        "student_parameters": student,
        "added_parameters": used,
        "note": method.note,
    }


def _fill(config: dict[str, Any], reference: dict[str, Any]) -> float:
    """CPU seconds of one view of every image through the teachers of a config."""
    return sum(float(reference["fill_seconds"][n]) for n in get(config, "model.teachers"))


def _chain(method: Method, seed: int, budget: float, reference: dict[str, Any]) -> list[Trained]:
    """Every stage with an even share of the budget; each one's export teaches the next."""
    chain, done = read_chain(method.chain), []
    out = Path(f"scratch/{method.chain}-{seed}")
    shutil.rmtree(out, ignore_errors=True)
    share, images = budget / len(chain.stages), int(reference["images"])
    for place, stage in enumerate(chain.stages):
        config = shared_config(stage_config(chain, stage, out), seed)
        if place == 0:
            done.append(train(config, method.cache, _fill(config, reference), share, images))
        else:
            # Its teacher is this run's own: the warm-up fills a cache that nobody else reads.
            fill = _forward_seconds(config, images)
            own = "" if fill > share / 2 else str(out / f"features-{place}")
            done.append(train(config, own, fill, share, images))
        if stage is not chain.stages[-1]:
            export_timm_folder(done[-1].module.student.eval(), out / stage.name / "export")
    return done


def _forward_seconds(config: dict[str, Any], count: int) -> float:
    """CPU seconds of all train images through a config's teachers, from three batches."""
    images = torch.rand(64, 3, 64, 64)
    total = 0.0
    for entry in get(config, "model.teachers").values():
        teacher = Teacher(**entry["init_args"])
        with torch.inference_mode():
            teacher(images, 32)
            begun = time.process_time()
            for _ in range(3):
                teacher(images, 32)
            total += (time.process_time() - begun) / 3 / len(images) * count
    return total


def main() -> int:
    """``OUT NAME SEED SECONDS``."""
    torch.set_num_threads(1)
    out, name, seed, seconds = sys.argv[1:5]
    found = run(name, int(seed), float(seconds))
    folder = Path(out) / "runs" / f"{name},seed={seed}"
    write_text_atomically(folder / "result.json", json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
