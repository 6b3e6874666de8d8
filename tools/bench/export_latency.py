"""Size, k-NN accuracy and latency of a student in float and int8 ONNX, side by side in one run.

    python tools/bench/export_latency.py CHECKPOINT --bank SHARDS --queries SHARDS [--json FILE]

Latency is the p50 of single images on one thread. The models take turns, round by round, so that a
busy moment of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from multikd.checkpoints import load_student
from multikd.evaluation import knn_predict
from multikd.export.calibration import CalibrationSet, calibration_set
from multikd.export.deployed import DeployedEncoder
from multikd.export.onnx import export_onnx, onnx_runner
from multikd.export.quality import QualityLimits, features_of
from multikd.export.quantize import quantize_onnx

# The figures are to be reported whatever they are.
_NO_LIMITS = QualityLimits(cosine_loss=2.0, agreement_loss=1.0)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """p50, p10 and p90 in milliseconds of callables that take turns."""
    for run in runs.values():
        for _ in range(10):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"p50": median(t), "p10": quantiles(t, n=10)[0], "p90": quantiles(t, n=10)[-1]}
        for name, t in times.items()
    }


def accuracy(
    run: Callable[[Tensor], Tensor],
    encoder: DeployedEncoder,
    bank: CalibrationSet,
    queries: CalibrationSet,
) -> float:
    """k-NN (k = 20) accuracy with the model's own bank."""
    voters = features_of(run, bank.images, encoder.inputs)
    asked = features_of(run, queries.images, encoder.inputs)
    return float((knn_predict(voters, bank.labels, asked) == queries.labels).double().mean())


def measure(checkpoint: str, bank: str, queries: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Export, quantise, score and time."""
    torch.set_num_threads(1)
    student = load_student(checkpoint).student
    size = student.spec.image_size
    voters, asked = (calibration_set(urls, size, limit=100_000) for urls in (bank, queries))
    encoder = DeployedEncoder.from_student(student)
    original = export_onnx(encoder, folder / "float.onnx", images=asked.images[:5])
    reports = {"onnx": original}
    calibration = CalibrationSet(voters.images[:1000], voters.labels[:1000])
    for mode in ("static", "dynamic"):
        reports[f"onnx-int8-{mode}"] = quantize_onnx(
            original.path,
            folder / f"{mode}.onnx",
            mode=mode,
            data=calibration,
            spec=student.spec,
            limits=_NO_LIMITS,
        )
    runners: dict[str, Callable[[Tensor], Tensor]] = {"torch": encoder}
    runners |= {name: onnx_runner(report.path, threads=1) for name, report in reports.items()}
    one = encoder.inputs(asked.images[:1]).contiguous()
    with torch.inference_mode():
        latency = interleaved(
            {name: lambda run=run: run(one) for name, run in runners.items()},  # type: ignore[misc]
            rounds,
        )
        rows = {
            name: {
                "bytes": reports[name].bytes if name in reports else None,
                "knn": accuracy(run, encoder, voters, asked),
                "latency_ms": latency[name],
                "report": reports[name].as_dict() if name in reports else None,
            }
            for name, run in runners.items()
        }
    return {
        "checkpoint": checkpoint,
        "student": student.spec.name,
        "bank": len(voters),
        "queries": len(asked),
        "rounds": rounds,
        "processor": platform.processor() or platform.machine(),
        "formats": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument("--bank", required=True, help="labelled shards that vote and calibrate")
    parser.add_argument("--queries", required=True, help="labelled shards that are scored")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            options.checkpoint, options.bank, options.queries, options.rounds, Path(folder)
        )
    whole = found["formats"]["onnx"]["bytes"]
    print(f"{found['student']}, {found['queries']} images, one thread, {found['rounds']} rounds")
    for name, row in found["formats"].items():
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:6.2f} MB"
        share = "" if row["bytes"] is None else f"{100 * row['bytes'] / whole:5.1f} %"
        print(
            f"{name:18} {size:>10} {share:>8}  k-NN {100 * row['knn']:.1f} %  "
            f"p50 {row['latency_ms']['p50']:.2f} ms (p10 {row['latency_ms']['p10']:.2f}, "
            f"p90 {row['latency_ms']['p90']:.2f})"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
