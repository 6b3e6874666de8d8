"""What quantisation or pruning costs a real student, and what a short further distillation regains.

    python tools/bench/recovery.py quantize --out /tmp/recovery [--student NAME] [--format F]
    python tools/bench/recovery.py prune --out /tmp/recovery [--student NAME] [--ratio 0.3]

On the demo's own shards and teachers (Fashion-MNIST, three EfficientNet-Lites), through the same
`multikd fit` and `multikd export`. For each seed a student is trained; then

- ``quantize``: it is distilled a few more epochs twice from the same checkpoint, in the same order
  of images and with the same learning rate, once as it is and once with
  ``multikd.callbacks.QuantizationAware``; each of the three is quantised and compared with its own
  float form on the held-out images;
- ``prune``: it is pruned by ``multikd export --prune``, scored, distilled a few more epochs as a
  ``PrunedStudent``, and scored again, beside the unpruned student after the same epochs.

k-NN votes with the train images, and asks the 1,000 held-out ones. Run it again after Ctrl-C: what
is finished is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from multikd.callbacks import QuantizationAware
from multikd.checkpoints import load_student
from multikd.console import take_over_lightning
from multikd.demo.embedded import unpack_shards
from multikd.demo.run import DemoSettings, fit_arguments
from multikd.evaluation import knn_predict
from multikd.export.calibration import CalibrationSet, calibration_set
from multikd.export.commands import ExportSettings, run_export
from multikd.export.deployed import DeployedEncoder
from multikd.export.onnx import export_onnx, onnx_runner
from multikd.export.quality import QualityLimits, compare_features, features_of
from multikd.export.quantize import quantize_onnx
from multikd.export.weight_only import load_weight_only, quantize_weights
from multikd.fit import run_lightning
from multikd.students import StudentEncoder

# The figures are to be reported whatever they are.
_NO_LIMITS = QualityLimits(cosine_loss=2.0, agreement_loss=1.0)
FORMATS = ("onnx-int8-static", "onnx-int8-dynamic", "torchao-int8", "torchao-int4")


class WithoutRounding(QuantizationAware):
    """The control: goes on from the same checkpoint in the same way, and rounds nothing."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load ``start`` alone."""
        if stage == "fit" and self.start is not None:
            self._load(pl_module, self.start)


class Bench:
    """Students trained on the demo's shards, in folders below ``out``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        unpack_shards(self.out / "shards")
        size = (64, 64)
        train, test = self.out / "shards" / "train", self.out / "shards" / "test"
        shards = [str(path) for path in sorted(train.glob("*.tar"))[:2]]
        self.bank = calibration_set(shards, size, limit=100_000)
        self.queries = calibration_set(str(test), size, limit=100_000)

    def fit(self, name: str, seed: int, epochs: int, *extra: str) -> Path:
        """The checkpoint of a run of the demo's config; trained unless it is there."""
        folder = self.out / name
        checkpoint = folder / "checkpoints" / "last.ckpt"
        done = folder / "done"
        if done.exists():
            return checkpoint
        checkpoint.unlink(missing_ok=True)
        settings = DemoSettings(out=self.out, epochs=epochs, quick=True)
        student = self.options.student
        if student == "vit":
            settings.student = "vit"
        # Images and views of one seed: the cached features serve every run.
        arguments = [
            *(a for a in fit_arguments(settings, folder) if "--seed_everything" not in a),
            f"--seed_everything={seed}",
            *([] if student == "vit" else [f"--model.student.name={student}"]),
            *extra,
        ]
        run_lightning([a for a in arguments if not a.startswith("--ckpt_path")])
        done.touch()
        return checkpoint

    def knn(self, bank: Tensor, queries: Tensor) -> float:
        """Accuracy of k-NN with these features."""
        answers = knn_predict(bank, self.bank.labels, queries)
        return float((answers == self.queries.labels).double().mean())

    def features(self, run: Any, student: StudentEncoder) -> tuple[Tensor, Tensor]:
        """Of bank and queries, through a callable that takes normalised images."""
        encoder = DeployedEncoder.from_student(student)
        first, second = (
            features_of(run, s.images, encoder.inputs) for s in (self.bank, self.queries)
        )
        return first, second

    def quantised(self, checkpoint: Path, folder: Path) -> dict[str, float]:
        """Float and quantised form of a checkpoint's student, compared on held-out images."""
        student = load_student(checkpoint).student
        chosen: str = self.options.format
        calibration = CalibrationSet(self.bank.images[:512], self.bank.labels[:512])
        folder.mkdir(parents=True, exist_ok=True)
        run: Any
        if chosen.startswith("onnx"):
            whole = export_onnx(student, folder / "float.onnx", overwrite=True).path
            report = quantize_onnx(
                whole,
                folder / "int8.onnx",
                mode="static" if chosen.endswith("static") else "dynamic",
                data=calibration,
                spec=student.spec,
                limits=_NO_LIMITS,
                overwrite=True,
            )
            run = onnx_runner(report.path)
        else:
            report = quantize_weights(
                student,
                folder / "weights.safetensors",
                bits=4 if chosen.endswith("4") else 8,
                data=calibration,
                limits=_NO_LIMITS,
                overwrite=True,
            )
            run = load_weight_only(report.path)
        original = self.features(student.export_model(), student)
        small = self.features(run, student)
        labels = (self.bank.labels, self.queries.labels)
        quality = compare_features(original, small, labels)
        return {
            "cosine": float(torch.cosine_similarity(original[1], small[1], dim=1).mean()),
            "agreement": quality["knn_agreement"],
            "neighbours": quality["neighbour_overlap"],
            "knn_float": quality["knn_float"],
            "knn_quantised": quality["knn_quantized"],
        }

    def scored(self, model: nn.Module, student: StudentEncoder) -> dict[str, float]:
        """k-NN accuracy and parameters of a float student."""
        return {
            "knn": self.knn(*self.features(model, student)),
            "parameters": float(sum(p.numel() for p in model.parameters())),
        }


def _callback(name: str, **settings: Any) -> str:
    return "--trainer.callbacks+=" + json.dumps({"class_path": name, "init_args": settings})


def quantize(bench: Bench) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Arm → its figures, one a seed."""
    options = bench.options
    bits = 4 if options.format.endswith("4") else 8
    activations = options.format.startswith("onnx")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        root = f"{options.student}-{seed}"
        start = bench.fit(f"{root}/base", seed, options.epochs)
        arms = {f"after {options.epochs} epochs": start}
        again = [f"--model.optimizer.init_args.lr={options.lr}"]
        for arm, name in (
            ("without", "recovery.WithoutRounding"),
            ("with", "multikd.callbacks.QuantizationAware"),
        ):
            callback = _callback(name, bits=bits, activations=activations, start=str(start))
            place = f"{root}/{options.format}-{arm}-{options.more}-{options.lr:g}"
            arms[f"+{options.more} {arm} QAT"] = bench.fit(
                place, seed, options.more, *again, callback
            )
        for arm, checkpoint in arms.items():
            figures = bench.quantised(checkpoint, bench.out / root / "files")
            found.setdefault(arm, []).append(figures)
            print(f"seed {seed}, {arm}: {figures}", flush=True)
    return {options.format: found}


def prune(bench: Bench) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Arm → its figures, one a seed."""
    options = bench.options
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        root = f"{options.student}-{seed}"
        start = bench.fit(f"{root}/base", seed, options.epochs)
        folder = bench.out / root / f"pruned-{options.ratio:g}"
        settings = ExportSettings(prune=options.ratio, cost=False, overwrite=True)
        run_export(start, folder, settings)
        again = f"--model.optimizer.init_args.lr={options.lr}"
        longer = bench.fit(
            f"{root}/longer-{options.more}-{options.lr:g}",
            seed,
            options.more,
            again,
            _callback("recovery.WithoutRounding", start=str(start)),
        )
        recovered = bench.fit(
            f"{root}/recovered-{options.ratio:g}-{options.more}-{options.lr:g}",
            seed,
            options.more,
            again,
            "--model.student=multikd.export.prune.PrunedStudent",
            f"--model.student.pruning={folder}",
        )
        from multikd.backbones.shrink import load

        whole = load_student(start).student
        arms: dict[str, tuple[nn.Module, StudentEncoder]] = {
            f"whole, {options.epochs} epochs": (whole.export_model(), whole),
            "pruned, not trained since": (load(folder), whole),
        }
        for name, checkpoint in (
            (f"pruned, +{options.more} epochs", recovered),
            (f"whole, +{options.more} epochs", longer),
        ):
            student = load_student(checkpoint).student
            arms[name] = (student.export_model(), student)
        for arm, (model, student) in arms.items():
            figures = bench.scored(model, student)
            found.setdefault(arm, []).append(figures)
            print(f"seed {seed}, {arm}: {figures}", flush=True)
    return {f"pruned by {options.ratio:g}": found}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A line an arm: mean over seeds, and the range where there are several."""
    lines = []
    for arm, runs in found.items():
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            if key == "parameters":
                cells.append(f"{key} {mean(values) / 1e6:.2f} M")
                continue
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{key} {mean(values):.3f}{spread}")
        lines.append(f"{arm:28} " + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("quantize", "prune"))
    parser.add_argument("--out", type=Path, required=True, help="for shards, features and runs")
    parser.add_argument("--student", default=None, help="timm name, or vit for the demo's")
    parser.add_argument("--format", choices=FORMATS, default="torchao-int4")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels to prune")
    parser.add_argument("--epochs", type=int, default=8, help="before (default: 8)")
    parser.add_argument("--more", type=int, default=4, help="epochs after it (default: 4)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the further epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.student is None:
        options.student = "vit" if options.what == "quantize" else "resnet10t"
    take_over_lightning()
    (found,) = (quantize if options.what == "quantize" else prune)(Bench(options)).items()
    print(f"\n{options.student}, {found[0]}, seeds {options.seeds}, 1,000 held-out images")
    print(table(found[1]))
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        text = json.dumps({"settings": settings, "arms": found[1]}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
