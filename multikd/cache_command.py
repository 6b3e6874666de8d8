"""``multikd cache``: the teachers of a config once over every recorded view, kept on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from multikd.callbacks.precompute import fill_cache, fingerprints_of, settle_logits
from multikd.data.cache import FeatureCache, TeacherRecord
from multikd.data.cache_record import cache_file, codec_file
from multikd.data.module import ShardDataModule
from multikd.fit import MultikdCLI, build_cli, without_known_noise
from multikd.modules.distillation import DistillationModule, to_float

_TIMED_BATCHES = 3
_TRAINER = ("accelerator", "devices", "num_nodes", "strategy")


@dataclass(frozen=True)
class TeacherPlan:
    """What one teacher's features take.

    Attributes:
        name: of the teacher.
        encoder: what it is.
        parameters: of the encoder.
        row_bytes: of one view.
        size: bytes on disk in all.
        missing: views that are still to be computed.
        seconds_per_image: measured on a few batches; None where nothing was run.
    """

    name: str
    encoder: str
    parameters: int
    row_bytes: int
    size: int
    missing: int
    seconds_per_image: float | None


class CachePass(pl.LightningModule):
    """Fills a cache under a Lightning trainer, which starts the ranks and machines."""

    def __init__(self, module: DistillationModule, data: ShardDataModule, progress: bool) -> None:
        super().__init__()
        self.parts = (module, data)  # in a tuple: nothing of them is this module's own
        self.progress = progress
        self.computed = 0

    def setup(self, stage: str) -> None:
        """Here, where Lightning has set up the ranks; there is nothing to loop over for it."""
        module, data = self.parts
        self.computed = fill_cache(
            self.trainer, module, data, fingerprints_of(module), self.progress
        )

    def forward(self, batch: Any) -> None:
        """Lightning asks for one."""

    def predict_dataloader(self) -> list[Any]:
        """Nothing more."""
        return []


def run_cache(
    settings: Sequence[str], out: Path, dry_run: bool = False, progress: bool = True
) -> tuple[str, dict[str, Any]] | None:
    """Compute what is missing; returns (text, figures), None on ranks but the first.

    Args:
        settings: as ``multikd fit`` takes them.
        out: folder of the cache.
        dry_run: say how large it gets and how long it takes, and write nothing.
        progress: show a bar.

    Raises:
        ValueError: the config can't be built, has no recorded views, or the folder holds features
            of something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    with without_known_noise():
        cli = build_cli([*settings, f"--data.cache={out}"], run=False)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, DistillationModule) or not isinstance(data, ShardDataModule):
        raise ValueError("a cache is made for a DistillationModule and a ShardDataModule")
    data.setup("fit")
    settle_logits(module, str(out))
    fingerprints = fingerprints_of(module)
    begun = time.perf_counter()
    complete = data.cache_complete(fingerprints, verify=True)
    plans = plan_cache(module, data, timed=not complete)
    if dry_run or complete:
        return _text(plans, data, out, complete, dry_run), _figures(plans, data, out)
    trainer = _trainer(cli)
    task = CachePass(module, data, progress)
    with without_known_noise():
        trainer.predict(task, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    seconds = time.perf_counter() - begun
    figures = {
        **_figures(plans, data, out), "seconds": seconds, "computed": task.computed,
        "bytes_on_disk": size_on_disk(out, data, module.teacher_names),
    }  # fmt: skip
    text = _text(plans, data, out, True, False)
    return f"{text}\n{seconds:.1f} s", figures


def plan_cache(
    module: DistillationModule, data: ShardDataModule, timed: bool = True
) -> list[TeacherPlan]:
    """Size and time of every teacher's features, with nothing written.

    The size follows from the shapes; the time from a few batches of real views.
    """
    source = data.cache_source()
    fingerprints = fingerprints_of(module)
    try:
        kept = FeatureCache(data.cache or "", source)
    except FileNotFoundError:
        kept = None
    views = _some_views(data) if timed else []
    device = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda")
    module.teachers.to(device)
    size = data.train_views[0].size
    plans = []
    for name in module.teacher_names:
        teacher = module.teacher(name)
        record = None if kept is None else kept.records.get(name)
        if record is None or kept is None:
            example = module.run_teacher(name, torch.zeros(1, 3, size, size, device=device))
            record = TeacherRecord.of(fingerprints[name], example, data.cache_storage)
            missing = source.rows
        else:
            missing = _lacking(kept, name)
        plans.append(
            TeacherPlan(
                name, teacher.spec.name, teacher.num_parameters, record.row_bytes,
                planned_bytes(record, source.rows), missing,
                _seconds(module, name, views, device) if views else None,
            )
        )  # fmt: skip
    return plans


def planned_bytes(record: TeacherRecord, rows: int) -> int:
    """Bytes of a teacher's files: rows, one byte each of ``done``, checksums, scales and bases."""
    total = rows * (record.row_bytes + 1) + -(-rows // record.chunk) * 33
    for token in record.tokens:
        shape = getattr(record, token)
        width, stored = shape[-1], record.stored_shape(token)[-1]
        if record.storage.dtype_of(token) == "int8":
            total += 8 * stored
        if stored < width:
            total += 4 * width * (stored + 1)
    return total


def size_on_disk(out: Path, data: ShardDataModule, names: Sequence[str]) -> int:
    """Bytes of these teachers' files."""
    cache = FeatureCache(out, data.cache_source())
    total = 0
    for name in names:
        record = cache.records[name]
        paths = [
            cache_file(out, cache.source, name, record, what)[0]
            for what in (*record.tokens, "done", "sums")
        ]
        paths += [codec_file(out, name)] if record.codec else []
        total += sum(path.stat().st_size for path in paths)
    return total


def _lacking(cache: FeatureCache, name: str) -> int:
    try:
        return len(cache.missing([name]))
    except ValueError:  # cut off
        return cache.source.rows


def _some_views(data: ShardDataModule) -> list[torch.Tensor]:
    views = []
    for batch in data.example_dataloader((_TIMED_BATCHES + 1) * data.eval_batch_size):
        views.append(batch.views[0])
    return views


@torch.no_grad()
def _seconds(
    module: DistillationModule, name: str, views: Sequence[torch.Tensor], device: torch.device
) -> float:
    """Median seconds an image over a few batches, after one to warm up."""
    taken = []
    for number, view in enumerate(views):
        begun = time.perf_counter()
        features = module.run_teacher(name, to_float(view.to(device)))
        (features.summary if features.summary is not None else features.patches).sum().item()  # type: ignore[union-attr]
        if number or len(views) == 1:
            taken.append((time.perf_counter() - begun) / len(view))
    return float(np.median(taken))


def _trainer(cli: MultikdCLI) -> pl.Trainer:
    settings = cli._get(cli.config_init, "trainer", default={})
    chosen = {key: settings[key] for key in _TRAINER if settings.get(key) is not None}
    return pl.Trainer(
        **chosen,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _figures(plans: Sequence[TeacherPlan], data: ShardDataModule, out: Path) -> dict[str, Any]:
    source = data.cache_source()
    return {
        "cache": str(out),
        "rows": source.rows,
        "views": source.views,
        "bytes": sum(plan.size for plan in plans),
        "teachers": {
            plan.name: {
                "encoder": plan.encoder, "parameters": plan.parameters, "bytes": plan.size,
                "bytes_per_view": plan.row_bytes, "missing": plan.missing,
                "seconds_per_image": plan.seconds_per_image,
            }
            for plan in plans
        },
    }  # fmt: skip


def _text(
    plans: Sequence[TeacherPlan], data: ShardDataModule, out: Path, complete: bool, dry_run: bool
) -> str:
    source = data.cache_source()
    left = "missing" if dry_run else "computed"
    lines = [
        f"{source.rows:,} rows: {source.views} recorded views of {sum(source.samples):,} images",
        f"{'teacher':<16}{'bytes a view':>14}{'size':>12}{left:>12}{'ms an image':>13}{'time':>11}",
    ]
    for plan in plans:
        pace = plan.seconds_per_image
        lines.append(
            f"{plan.name:<16}{plan.row_bytes:>14,}{plan.size / 1e6:>9,.1f} MB{plan.missing:>12,}"
            + (f"{'–':>13}{'–':>11}" if pace is None
               else f"{1000 * pace:>13.2f}{pace * plan.missing:>9,.0f} s")
        )  # fmt: skip
    total = sum(plan.size for plan in plans) / 1e6
    lines.append(f"in all {total:,.1f} MB" + (" (nothing was written)" if dry_run else ""))
    if complete:
        lines.append(f"complete: {out}; train on it with --data.cache={out}")
    return "\n".join(lines)
