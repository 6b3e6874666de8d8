"""A results.json made by hand: every part of the schema, with names that try to be markup."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from multikd.retention.gallery import Gallery

HOSTILE = "<b>x"
SCRIPT = '"><script>alert(1)</script>'
CLASSES = ["shirt", "boot <left>", "bag", SCRIPT]


def encoder(name: str, role: str, parameters: float, latency: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "role": role, "head": None, "source": f"packaged:{name}", "licence": "MIT",
        "fingerprint": "0123456789abcdef0123", "image_size": [64, 64], "patch_size": 16,
        "widths": {"summary": 512, "patches": None},
        "cost": {
            "parameters": parameters, "macs": 50 * parameters, "device": "cpu",
            "peak_memory_mb": 61.5,
            "latency_ms": {"1": {"p50": latency, "p95": 1.4 * latency}, "32": {"p50": 9}},
            "images_per_second": {"1": 1000 / latency, "32": 3000 / latency},
            "deployed": [],
        },
        **more,
    }  # fmt: skip


def cell(task: str, encoder: str, value: float | None, **more: Any) -> dict[str, Any]:
    half = 0.02
    return {
        "task": task, "encoder": encoder, "value": value,
        "low": None if value is None else value - half,
        "high": None if value is None else value + half,
        "metrics": {}, "details": {}, "seconds": 1.5, "error": None, **more,
    }  # fmt: skip


def kept(share: float, half: float, best: float) -> dict[str, float]:
    return {
        "share": share, "low": share - half, "high": share + half,
        "difference": (share - 1) * best, "difference_low": (share - half - 1) * best,
        "difference_high": (share + half - 1) * best,
    }  # fmt: skip


def groups(shift: float) -> dict[str, Any]:
    scores = {
        HOSTILE: {"value": 0.9 + shift, "low": 0.85 + shift, "high": 0.95 + shift, "count": 600},
        "night": {"value": 0.7 + shift, "low": 0.6 + shift, "high": 0.8 + shift, "count": 400},
        "dusk": {"value": None, "low": None, "high": None, "count": 3},
    }
    return {
        "light": {"groups": scores, "worst": "night", "gap": 0.2, "gap_low": 0.1, "gap_high": 0.3}
    }


def content() -> dict[str, Any]:
    """Two students (one through a head), two teachers, four tasks."""
    risk = [0.01, 0.03, 0.06, 0.14]
    details = {
        "student": {
            "classes": CLASSES,
            "per_class": dict(zip(CLASSES, [0.8, 0.95, 0.97, 0.7], strict=True)),
            "confusion": [[80, 5, 5, 10], [2, 95, 1, 2], [1, 1, 97, 1], [20, 5, 5, 70]],
            "groups": groups(0.0),
            "curves": [
                {"name": "risk-coverage", "x": [0.25, 0.5, 0.75, 1.0], "y": risk,
                 "x_label": "coverage", "y_label": "errors"},
            ],
        },
        HOSTILE: {
            "classes": CLASSES,
            "per_class": dict(zip(CLASSES, [0.82, 0.9, 0.96, 0.75], strict=True)),
            "confusion": [[82, 4, 4, 10], [5, 90, 3, 2], [1, 2, 96, 1], [15, 5, 5, 75]],
            "groups": groups(0.04),
            "curves": [
                {"name": "risk-coverage", "x": [0.25, 0.5, 0.75, 1.0], "y": [2 * r for r in risk],
                 "x_label": "coverage", "y_label": "errors"},
            ],
        },
    }  # fmt: skip
    corruption = {
        name: {
            "curves": [
                {"name": f"{kind} {SCRIPT if kind == 'fog' else ''}".strip(),
                 "x": [0, 1, 2, 3, 4, 5], "y": [top - 0.05 * s for s in range(6)],
                 "x_label": "severity", "y_label": "top-1"}
                for kind in ("noise", "fog")
            ]
        }
        for name, top in (("student", 0.88), ("lite1", 0.86))
    }  # fmt: skip
    return {
        "format": 1, "multikd": "0.1.0", "created": "2026-11-24T19:00:00+00:00",
        "command": "multikd evaluate runs/'a <b>'/last.ckpt --with-teachers",
        "encoders": [
            encoder(HOSTILE, "teacher", 3.4e6, 4.1),
            encoder("lite1", "teacher", 4.1e6, 5.5),
            encoder("student", "student", 4.9e6, 1.8),
            encoder("student@lite1", "head", 5.3e6, 2.0, head="lite1"),
        ],
        "tasks": [
            {"name": "fashion-knn", "protocol": "KNN", "source": "Wu et al. 2018",
             "metric": "top1", "unit": "%", "higher_is_better": True, "data": "fashion",
             "images": {"train": 4000, "test": 1000}, "settings": {"k": 20, "temperature": 0.07}},
            {"name": f"linear {HOSTILE}", "protocol": "LinearProbe", "source": "",
             "metric": "top1", "unit": "%", "higher_is_better": True, "data": "fashion",
             "images": {"train": 4000, "test": 1000}, "settings": {}},
            {"name": "depth", "protocol": "Depth", "source": "NYUd", "metric": "rmse", "unit": "m",
             "higher_is_better": False, "data": "rooms", "images": {"test": 10}, "settings": {}},
            {"name": "corruptions", "protocol": "Corruptions", "source": "Hendrycks 2019",
             "metric": "top1", "unit": "%", "higher_is_better": True, "data": "fashion",
             "images": {"test": 1000}, "settings": {"severities": [1, 2, 3, 4, 5]}},
        ],
        "cells": [
            cell("fashion-knn", HOSTILE, 0.843, details=details[HOSTILE]),
            cell("fashion-knn", "lite1", 0.842),
            cell("fashion-knn", "student", 0.856, details=details["student"],
                 metrics={"top5": 0.991, "mean_per_class": 0.8551}),
            cell("fashion-knn", "student@lite1", 0.8405),
            cell(f"linear {HOSTILE}", HOSTILE, 0.869),
            cell(f"linear {HOSTILE}", "lite1", 0.859),
            cell(f"linear {HOSTILE}", "student", 0.893),
            cell(f"linear {HOSTILE}", "student@lite1", None, error="no <i>such</i> head"),
            cell("depth", HOSTILE, 0.512), cell("depth", "lite1", 0.47),
            cell("depth", "student", 0.55),
            cell("corruptions", "lite1", 0.61, details=corruption["lite1"]),
            cell("corruptions", "student", 0.63, details=corruption["student"]),
        ],
        "matrix": [
            {"task": "fashion-knn", "best_teacher": HOSTILE, "best_value": 0.843,
             "kept": {"student": kept(1.0154, 0.02, 0.843),
                      "student@lite1": kept(0.997, 0.02, 0.843)}},
            {"task": f"linear {HOSTILE}", "best_teacher": HOSTILE, "best_value": 0.869,
             "kept": {"student": kept(1.0276, 0.015, 0.869)}},
            {"task": "depth", "best_teacher": "lite1", "best_value": 0.47,
             "kept": {"student": kept(0.8545, 0.05, 0.47)}},
            {"task": "corruptions", "best_teacher": "lite1", "best_value": 0.61,
             "kept": {"student": kept(1.0328, 0.04, 0.61)}},
        ],
        "mean": {"student": {"share": 0.9826, "low": 0.96, "high": 1.004, "tasks": 4},
                 "student@lite1": {"share": 0.997, "low": 0.977, "high": 1.017, "tasks": 1}},
        "pareto": [
            {"encoder": "student", "score": 0.79, "cost": 1.8, "on_front": True},
            {"encoder": HOSTILE, "score": 0.856, "cost": 4.1, "on_front": True},
            {"encoder": "lite1", "score": 0.77, "cost": 5.5, "on_front": False},
        ],
        "pareto_cost": "latency, ms",
        "scores": {"fashion-knn (student)": 0.856}, "retention": [], "groups": [],
    }  # fmt: skip


def with_pictures(folder: Path) -> dict[str, Any]:
    """The same with neighbours and patch components, whose PNGs are in ``folder``."""
    made = content()
    gallery = Gallery(folder)
    generator = np.random.default_rng(0)

    def drawn(size: int) -> str:
        small = generator.integers(0, 256, (size // 4 or 1, size // 4 or 1, 3), dtype=np.uint8)
        return gallery.add(small.repeat(4, 0).repeat(4, 1))

    queries = [
        {
            "picture": drawn(64), "class": name,
            "neighbours": [
                {"picture": drawn(64), "class": other, "similarity": 0.9}
                for other in (name, CLASSES[0], CLASSES[1], name, name, "bag")
            ],
        }
        for name in CLASSES
    ]  # fmt: skip
    stolen = copy.deepcopy(queries)
    stolen[0]["picture"] = "../../../../etc/passwd"
    stolen[1]["neighbours"][0]["picture"] = "0123456789abcdef.png"  # not there
    by = {(c["task"], c["encoder"]): c for c in made["cells"]}
    by["fashion-knn", "student"]["details"]["neighbours"] = {"queries": queries}
    by["fashion-knn", HOSTILE]["details"]["neighbours"] = {"queries": stolen}
    for name in ("student", HOSTILE, "lite1"):
        by["fashion-knn", name]["details"]["pca"] = {
            "grid": [4, 4], "explained": [0.41, 0.2, 0.1],
            "images": [{"picture": q["picture"], "map": drawn(16), "class": q["class"]}
                       for q in queries],
        }  # fmt: skip
    return made
