"""``multikd teachers fit-head`` and ``calibrate``: classifiers on frozen teachers, and how sure.

Both build the teachers of a config alone (no student, no terms), and run them once over labelled
shards with the config's evaluation views.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import multikd
from multikd.config_errors import condense
from multikd.config_parser import Unbuildable, construct
from multikd.data.module import ShardDataModule
from multikd.errors import unknown_name
from multikd.evaluation.extract import summary_vectors
from multikd.evaluation.linear import LogisticFit, logistic_regression, stratified
from multikd.evaluation.temperature import LEAST_IMAGES, Calibrated, calibrate
from multikd.files import write_text_atomically
from multikd.fit import ParsedOnly, build_cli, without_known_noise
from multikd.imports import only_allowed
from multikd.modules.distillation import to_float
from multikd.teachers import Teacher
from multikd.teachers.head import ClassifierHead, write_head
from multikd.teachers.trainable import TrainableTeacher
from multikd.types import TokenFeatures

_HELD = 0.2
# What these commands make; what a config already has of it is not applied.
_CALIBRATION = ("temperature", "bias")
_HEAD = ("head", *_CALIBRATION)


@dataclass
class Labelled:
    """One teacher's answers to M labelled images: ``(M, D)`` or ``(M, K)`` and int64 ``(M,)``."""

    values: Tensor
    labels: Tensor


def run_fit_head(
    settings: Sequence[str],
    data: str,
    out: Path,
    names: Sequence[str] = (),
    encoder: str | None = None,
    overwrite: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Fit a linear classifier on each teacher's summaries; returns (text, figures).

    Multinomial logistic regression on standardised summaries; its penalty is chosen on a fifth of
    the images, which are scored and then learned from, too.

    Args:
        settings: of the run whose teachers they are, as ``multikd fit`` takes them.
        data: labelled shards.
        out: a file that ends in ``.safetensors`` for one teacher, or a folder for NAME.safetensors.
        names: of the teachers; none for all.
        encoder: a teacher by its encoder's name, in place of a config's.
        overwrite: replace what is there.

    Raises:
        ValueError: no labels, a class without an image, or ``out`` is in the way.
    """
    teachers, module, _ = prepare(settings, data, names, encoder, _HEAD)
    one = out.suffix == ".safetensors"
    if one and len(teachers) > 1:
        raise ValueError(
            f"--out {out} is one file and there are {len(teachers)} teachers "
            f"({', '.join(teachers)}): name a folder, or one of them with --teachers"
        )
    files = {name: out if one else out / f"{name}.safetensors" for name in teachers}
    for file in files.values():
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists: give another --out, or --overwrite")
    if not one and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder, or a file that ends .safetensors")
    found = run_teachers(teachers, module, lambda f: summary_vectors(f).float(), "summaries")
    rows: list[dict[str, Any]] = []
    for name, (x, y) in ((n, (f.values, f.labels)) for n, f in found.items()):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{int((~torch.isfinite(x)).any(dim=1).sum())} of {len(x)} summaries of teacher "
                f"{name!r} are NaN or infinite: set its dtype to float32, or leave it out with "
                "--teachers"
            )
        classes = check_classes(y, data)
        held = torch.from_numpy(stratified(y.numpy(), _HELD, 0))
        fit = logistic_regression(x, y, x[:1], held=held)
        accuracy = max(score for _, score in fit.validation)
        about = {
            "encoder": teachers[name].spec.name, "fingerprint": teachers[name].fingerprint(),
            "images": len(y), "classes": classes, "c": fit.c, "held_out_accuracy": accuracy,
            "data": fingerprint_of(module), "version": multikd.__version__,
        }  # fmt: skip
        files[name].parent.mkdir(parents=True, exist_ok=True)
        write_head(files[name], _head_of(fit, about))
        rows.append({"teacher": name, "file": str(files[name]), **about})
    cells = [("teacher", "classes", "images", "C", "held-out accuracy", "file")]
    cells += [
        (
            r["teacher"], str(r["classes"]), str(r["images"]), f"{r['c']:g}",
            f"{100 * r['held_out_accuracy']:.1f} %", r["file"],
        )
        for r in rows
    ]  # fmt: skip
    first = rows[0]
    use = f"--model.teachers.{first['teacher']}.init_args.head={first['file']}"
    hint = f"to use it: {shlex.quote(use)}"
    return f"{_table(cells)}\n{hint}", {"heads": rows}


def run_calibrate(
    settings: Sequence[str],
    data: str,
    out: Path | None = None,
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Find each teacher's temperature on held-out labels; returns (text, figures).

    Of two classes it is Platt's scaling: a temperature and a bias.

    Args:
        settings: of the run whose teachers they are.
        data: labelled shards that neither teachers nor their classifiers learned from.
        out: YAML of the teachers with their calibration, for ``--model.teachers=FILE``.
        names: of the teachers; none for all that have a classifier.
        overwrite: replace ``out``.

    Raises:
        ValueError: no teacher has a classifier, or too few labels.
    """
    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another --out, or --overwrite")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"the folder of {out} does not exist: make it, or give another --out")
    teachers, module, written = prepare(settings, data, names, None, _CALIBRATION)
    able = {name: teacher for name, teacher in teachers.items() if teacher.num_classes}
    if not able or (names and len(able) < len(teachers)):
        who = next(name for name in teachers if name not in able)
        raise ValueError(
            f"teacher {who!r} has no classifier whose logits could be calibrated: fit one with "
            "`multikd teachers fit-head` and set its head"
        )
    found = run_teachers(able, module, _logits, "logits")
    rows, warnings = [], []
    for name, answers in found.items():
        try:
            result = calibrate(answers.values, answers.labels)
        except ValueError as error:
            raise ValueError(f"teacher {name!r} on {data}: {error}") from error
        rows.append(_row(name, able[name], result, len(answers.labels)))
        settings_of = written[name].setdefault("init_args", {})
        settings_of["temperature"] = result.temperature
        if result.bias is not None:
            settings_of["bias"] = result.bias
        head = able[name].head
        if head is not None and head.about.get("data") == fingerprint_of(module):
            warnings.append(
                f"{name}'s classifier was fitted on these very shards, where it is surer than it "
                "should be: calibrate on others"
            )
    cells = [("teacher", "images", "temperature", "bias", "NLL", "ECE", "accuracy")]
    cells += [
        (
            r["teacher"], str(r["images"]), f"{r['temperature']:.4f}",
            "–" if r["bias"] is None else ", ".join(f"{b:.3f}" for b in r["bias"]),
            f"{r['nll_before']:.4f} → {r['nll']:.4f}", f"{r['ece_before']:.4f} → {r['ece']:.4f}",
            f"{100 * r['accuracy']:.1f} %",
        )
        for r in rows
    ]  # fmt: skip
    lines = [_table(cells), *warnings]
    if out is not None:
        write_text_atomically(out, _fragment(rows, written, data))
        lines.append(f"teachers → {out}; to use them: {shlex.quote(f'--model.teachers={out}')}")
    # A temperature alone is no calibration where a bias belongs to it.
    pairs = [f"{r['teacher']}: {r['temperature']:.4f}" for r in rows if r["bias"] is None]
    if pairs:
        lines.append(f"or in a ResponseTerm: temperatures: {{{', '.join(pairs)}}}")
    return "\n".join(lines), {"teachers": rows, "warnings": warnings}


def prepare(
    settings: Sequence[str],
    data: str,
    names: Sequence[str],
    encoder: str | None,
    without: Sequence[str],
) -> tuple[dict[str, Teacher], ShardDataModule, dict[str, dict[str, Any]]]:
    """The teachers of a config and its data module on the labelled shards, and nothing else.

    Args:
        settings: ``--config`` and others.
        data: labelled shards.
        names: of the teachers; none for all.
        encoder: a teacher by its encoder's name, in place of a config's.
        without: settings of these teachers that are left out.

    Returns:
        Teachers, data module, and the settings of all of the config's teachers: of the chosen ones
        without those.
    """
    given = list(settings)
    if encoder is not None:
        one = {"class_path": "multikd.teachers.Teacher", "init_args": {"encoder": encoder}}
        given += [f"--model.teachers={json.dumps({_short(encoder): one})}"]  # and no others
        given += ["--model.student=StudentEncoder", "--model.student.init_args.name=resnet10t"]
    given += [f"--data.train={data}", f"--data.val={data}", "--data.cache=null"]
    with without_known_noise():
        cli = build_cli(given, run=False, kind=ParsedOnly)
    model = cli.config.model.as_dict().get("init_args", {})
    written = {
        name: _told(value, without if not names or name in names else ())
        for name, value in (model.get("teachers") or {}).items()
    }
    for name in names:
        if name not in written:
            raise unknown_name("teacher", name, written)
    if not written:
        raise ValueError("this config has no teachers: give one with --encoder NAME")
    chosen = names or list(written)
    for name in chosen:
        if written[name]["class_path"].rpartition(".")[2] == TrainableTeacher.__name__:
            encoder_name = written[name]["init_args"].get("encoder")
            raise ValueError(
                f"teacher {name!r} of this config is trained along with its student: give its "
                f"frozen encoder in place of the config, --encoder {encoder_name}"
            )
    with torch.random.fork_rng(devices=[]):
        teachers = {n: _built(Teacher, written[n], f"model.teachers.{n}") for n in chosen}
    values = cli.config.data.as_dict()
    if encoder is not None:
        size = teachers[chosen[0]].spec.image_size[0]
        views = {"class_path": "multikd.data.views.EvalViews", "init_args": {"size": size}}
        values.setdefault("init_args", {})["eval_views"] = views
    module = _built(LightningDataModule, values, "data")
    if not isinstance(module, ShardDataModule):
        raise ValueError("labelled shards are read with multikd's ShardDataModule")
    return teachers, module, written


@torch.no_grad()
def run_teachers(
    teachers: Mapping[str, Teacher],
    module: ShardDataModule,
    read: Callable[[TokenFeatures], Tensor],
    what: str,
) -> dict[str, Labelled]:
    """Every teacher's answers to the labelled images of ``val``, float32 on the CPU."""
    module.setup("validate")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for teacher in teachers.values():
        teacher.to(device)
    parts: dict[str, list[Tensor]] = {name: [] for name in teachers}
    labels: list[Tensor] = []
    loader = module.eval_dataloader("val")
    columns = (
        TextColumn(f"   {what}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for batch in bar.track(loader, total=len(loader)):
            known = (batch.positions >= 0) & (batch.labels >= 0)
            pixels = to_float(batch.views[0].to(device))
            for name, teacher in teachers.items():
                parts[name].append(read(teacher(pixels)).float().cpu()[known])
            labels.append(batch.labels[known])
    y = torch.cat(labels)
    return {name: Labelled(torch.cat(rows), y) for name, rows in parts.items()}


def check_classes(labels: Tensor, data: str) -> int:
    """K, where every class from 0 to K − 1 has images.

    Raises:
        ValueError: no labels, or a class with fewer than two images.
    """
    if not len(labels):
        raise ValueError(
            f"none of the images in {data} has a label: a classifier is fitted on them"
        )
    counts = torch.bincount(labels)
    few = (counts < 2).nonzero().flatten().tolist()
    if len(counts) < 2 or few:
        which = f"class {few[0]} has {int(counts[few[0]])}" if few else "there is one class"
        raise ValueError(
            f"a classifier needs two images or more of each of the classes 0 to "
            f"{max(len(counts) - 1, 1)}, and {which} in {data}: give more shards"
        )
    return len(counts)


def fingerprint_of(module: ShardDataModule) -> str:
    """Of the labelled shards' content."""
    return "/".join(source.fingerprint()[:16] for source in module._open("val").reader.sources)


def _head_of(fit: LogisticFit, about: Mapping[str, Any]) -> ClassifierHead:
    return ClassifierHead(fit.weight.float(), fit.bias.float(), about)


def _logits(features: TokenFeatures) -> Tensor:
    if features.logits is None:
        raise ValueError("a teacher with classes gave no logits: fit it a classifier")
    return features.logits


def _row(name: str, teacher: Teacher, result: Calibrated, images: int) -> dict[str, Any]:
    return {
        "teacher": name, "encoder": teacher.spec.name, "images": images,
        "temperature": result.temperature, "bias": result.bias,
        "nll_before": result.nll_before, "nll": result.nll,
        "ece_before": result.ece_before, "ece": result.ece, "accuracy": result.accuracy,
    }  # fmt: skip


def _fragment(rows: Sequence[Mapping[str, Any]], written: Mapping[str, Any], data: str) -> str:
    lines = [f"# Teachers as calibrated on {data} by multikd {multikd.__version__}"]
    lines += [
        f"#   {r['teacher']}: NLL {r['nll_before']:.4f} → {r['nll']:.4f}, "
        f"ECE {r['ece_before']:.4f} → {r['ece']:.4f} on {r['images']} images"
        for r in rows
    ]
    lines.append("# To use them: --model.teachers=THIS_FILE, or `teachers: THIS_FILE` in a config.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(dict(written), sort_keys=False)


def _told(value: Any, without: Sequence[str]) -> dict[str, Any]:
    """A teacher's settings that are not defaults, as a config has them."""
    content = dict(value) if isinstance(value, Mapping) else value.as_dict()
    defaults = {n: p.default for n, p in inspect.signature(Teacher).parameters.items()}
    arguments = {
        k: v
        for k, v in (content.get("init_args") or {}).items()
        if k not in without and (k not in defaults or v != defaults[k])
    }
    return {"class_path": content["class_path"], "init_args": arguments}


def _built(base: type[Any], settings: Mapping[str, Any], key: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "object")
    with only_allowed():
        try:
            made = parser.parse_object({"object": dict(settings)})
            return parser.instantiate(made, instantiators=[(construct, object, True)]).object
        except Unbuildable as stop:
            raise stop.reason from stop.reason.__cause__
        except ArgumentError as error:  # of jsonargparse: a tree of what did not validate
            raise ValueError(f"{key}: {condense(str(error))}") from error


def _short(encoder: str) -> str:
    scheme, _, name = encoder.rpartition(":")
    if scheme in ("exported", "onnx", "hf"):  # a path: its last part
        name = Path(name).name
    return re.sub(r"\W+", "_", name).strip("_") or "teacher"


def _table(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(c, widths, strict=True)).rstrip() for c in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


__all__ = ["LEAST_IMAGES", "run_calibrate", "run_fit_head"]
