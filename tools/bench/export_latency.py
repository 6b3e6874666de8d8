"""Every figure that an export promises, of one checkpoint, in one run: parity, size, k-NN, latency.

    python tools/bench/export_latency.py CHECKPOINT --bank SHARDS --queries SHARDS [--json FILE]

The checkpoint is exported by `multikd export` with its heads, as timm folder, ONNX, `.pt2` and
int8 ONNX, calibrated on images of the bank. k-NN votes with the whole bank and asks all queries,
each format with its own features. Latency is that of single images on one thread: the formats take
turns, image by image, so that a busy moment of the machine meets all of them alike; the p50 of each
repeat is a figure of its own, and their median and range are what is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from multikd.checkpoints import load_student
from multikd.evaluation import knn_predict
from multikd.evaluation.cost import processor
from multikd.export.calibration import CalibrationSet, calibration_set
from multikd.export.commands import ExportSettings, run_export
from multikd.export.deployed import DeployedEncoder
from multikd.export.onnx import onnx_runner
from multikd.export.parity import relative_error
from multikd.export.quality import features_of
from multikd.export.timm_folder import read_model

Run = Callable[[Tensor], Tensor]
_GRAPHS = {
    "onnx": "model.onnx",
    "onnx-int8-static": "model.int8-static.onnx",
    "onnx-int8-dynamic": "model.int8-dynamic.onnx",
}


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """p50 in milliseconds of callables that take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def accuracy(
    run: Run, encoder: DeployedEncoder, bank: CalibrationSet, queries: CalibrationSet
) -> float:
    """k-NN (k = 20) accuracy with the model's own bank."""
    voters = features_of(run, bank.images, encoder.inputs)
    asked = features_of(run, queries.images, encoder.inputs)
    return float((knn_predict(voters, bank.labels, asked) == queries.labels).double().mean())


def exported(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of ``multikd export`` itself."""
    heads = tuple(load_student(options.checkpoint).teachers) if options.heads else ()
    settings = ExportSettings(
        formats=("onnx", "pt2"),
        quantize=("onnx-static", "onnx-dynamic"),
        heads=heads,
        data=options.bank,
        images=1000,
        cost=False,
        # The figures are to be reported whatever they are.
        max_cosine_loss=2.0,
        max_agreement_loss=1.0,
    )
    return run_export(Path(options.checkpoint), folder, settings)[1]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export, compare, score and time."""
    torch.set_num_threads(1)
    figures = exported(options, folder / "out")
    reports = {report["format"]: report for report in figures["formats"]}
    student = load_student(options.checkpoint).student
    size = student.spec.image_size
    bank = calibration_set(options.bank, size, limit=100_000)
    queries = calibration_set(options.queries, size, limit=100_000)
    encoder = DeployedEncoder.from_student(student)
    about = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    loaded = read_model(folder / "out", bool(about["pruned"]))
    runs: dict[str, Run] = {"torch": encoder.model}
    runs |= {n: onnx_runner(folder / "out" / f, threads=1) for n, f in _GRAPHS.items()}
    one = encoder.inputs(queries.images[:1]).contiguous()
    with torch.inference_mode():
        # The student itself, not the copy that was written; in the layout that files have.
        student.channels_last = False
        student.model.to(memory_format=torch.contiguous_format)
        images = queries.images[:64].float() / 255
        own = student.features(images).summary
        if own is None:
            raise ValueError(f"{student.spec.name} has no summary to compare")
        difference = relative_error(loaded(student.normalize(images)), own)
        score = {name: accuracy(run, encoder, bank, queries) for name, run in runs.items()}
        turns: dict[str, Callable[[], object]] = {n: partial(r, one) for n, r in runs.items()}
        interleaved(turns, 10)
        repeats = [interleaved(turns, options.rounds) for _ in range(options.repeats)]
    whole = reports["onnx"]["bytes"]
    formats = {
        name: {
            "bytes": reports[name]["bytes"] if name in reports else None,
            "share_of_float": reports[name]["bytes"] / whole if name in reports else None,
            "knn": score[name],
            "knn_minus_float": score[name] - score["onnx"],
            "p50_ms": [repeat[name] for repeat in repeats],
        }
        for name in runs
    }
    return {
        "checkpoint": str(options.checkpoint),
        "student": student.spec.name,
        "bank": len(bank),
        "queries": len(queries),
        "rounds": options.rounds,
        "repeats": options.repeats,
        "processor": processor(),
        "parity": {
            "timm folder": difference,
            "onnx": reports["onnx"]["parity"],
            "pt2": reports["pt2"]["parity"],
            "heads": figures["heads"],
        },
        "formats": formats,
        "quality": {n: r["quality"] for n, r in reports.items() if r["quality"]},
    }


def text_of(found: dict[str, Any]) -> str:
    """The figures beside what they should reach."""
    parity, formats = found["parity"], found["formats"]
    heads = max(parity["heads"].values(), default=None)
    lines = [
        f"{found['student']}, k-NN of {found['queries']} images by {found['bank']}; "
        f"{found['repeats']} × {found['rounds']} single images in turns, one thread, "
        f"{found['processor']}",
        _line("timm folder to checkpoint", parity["timm folder"], 0.0),
        _line("onnx to torch", parity["onnx"]["max_relative_error"], 1e-4),
        _line("pt2 to torch", parity["pt2"]["max_relative_error"], 1e-5),
        _line("heads, folded to unfolded", heads, 1e-4),
        f"{'format':18} {'MB':>6} {'size':>7} {'k-NN':>7} {'to float':>9}  p50 ms: median [range]",
    ]
    for name, row in formats.items():
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        share = "" if row["bytes"] is None else f"{100 * row['share_of_float']:.1f} %"
        times = row["p50_ms"]
        lines.append(
            f"{name:18} {size:>6} {share:>7} {100 * row['knn']:>5.1f} % "
            f"{100 * row['knn_minus_float']:>+8.1f}   "
            f"{median(times):.2f} [{min(times):.2f}, {max(times):.2f}]"
        )
    static = formats["onnx-int8-static"]
    pairs = zip(static["p50_ms"], formats["onnx"]["p50_ms"], strict=True)
    ratios = [small / whole for small, whole in pairs]
    lines += [
        _line("int8 static, share of float size", static["share_of_float"], 0.30),
        _line("int8 static, k-NN lost", max(0.0, -static["knn_minus_float"]), 0.01),
        f"int8 static takes {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of the "
        "float ONNX's time, repeat by repeat",
    ]
    return "\n".join(lines)


def _line(what: str, value: float | None, limit: float) -> str:
    if value is None:
        return f"{what:34} not measured"
    verdict = "met" if value <= limit else "MISSED"
    return f"{what:34} {value:8.2g}  (at most {limit:g}: {verdict})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument("--bank", required=True, help="labelled shards that vote and calibrate")
    parser.add_argument("--queries", required=True, help="labelled shards that are scored")
    parser.add_argument("--rounds", type=int, default=100, help="images a repeat (default: 100)")
    parser.add_argument("--repeats", type=int, default=9, help="default: 9")
    parser.add_argument("--no-heads", dest="heads", action="store_false", help="without heads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(text_of(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
