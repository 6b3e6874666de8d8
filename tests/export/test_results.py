"""``--results``: what `multikd evaluate` writes becomes the card's tables, of this student only."""

from __future__ import annotations

import copy
import json

import pytest

from multikd.backbones.digest import fingerprint
from multikd.checkpoints import load_student
from multikd.cli import main
from multikd.export.card import Written
from multikd.export.commands import card_facts
from multikd.export.readme import readme
from multikd.export.results import card_results, read_results


def group(value, count, **more):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": count, **more}


def content(mark: str) -> dict:
    """Format 1 by hand: two tasks, a student with a head, two teachers."""
    cost = {
        "parameters": 4_900_000,
        "macs": 245_000_000,
        "device": "cpu",
        "peak_memory_mb": 61.5,
        "latency_ms": {"1": {"p50": 1.8, "p95": 2.52}, "32": {"p50": 19.0, "p95": 21.0}},
        "images_per_second": {"1": 555.6, "32": 1666.7},
        "deployed": [{"format": "onnx", "parameters": None, "latency_ms": {"1": {"p50": 0.9}}}],
    }

    def encoder(name, role, mark, cost=None, source="runs/x/last.ckpt"):
        return {"name": name, "role": role, "source": source, "fingerprint": mark, "cost": cost}

    def task(name, metric, unit, higher):
        return {"name": name, "metric": metric, "unit": unit, "higher_is_better": higher}

    def cell(task, encoder, value, **details):
        low, high = (None, None) if value is None else (value - 0.02, value + 0.02)
        return {
            "task": task,
            "encoder": encoder,
            "value": value,
            "low": low,
            "high": high,
            "metrics": {},
            "details": details,
            "seconds": 1.0,
            "error": None,
        }

    by_light = {
        "groups": {
            "dark": group(0.6, 50),
            "bright": group(0.9, 60),
            "odd": group(0.1, 2, small=True),
        },
        "worst": "dark",
        "best": "bright",
        "gap": 0.3,
        "gap_low": 0.21,
        "gap_high": 0.38,
    }
    return {
        "format": 1,
        "multikd": "0.9",
        "command": "multikd evaluate runs/x/last.ckpt --tasks demo",
        "encoders": [
            encoder("mine", "student", mark, cost),
            encoder("mine+vit", "head", "h"),
            encoder("other", "student", "o", source="runs/y/last.ckpt"),
            encoder("vit", "teacher", "t", {"parameters": 6_000_000, "device": "cpu"}),
            encoder("next", "teacher", "u"),
        ],
        "tasks": [
            task("pets", "top1", "%", True),
            task("depth", "RMSE", "m", False),
            task("alone", "top1", "%", True),
        ],
        "cells": [
            cell("pets", "mine", 0.856, groups={"light": by_light}),
            cell("pets", "mine+vit", 0.8),
            cell("pets", "other", 0.111),
            cell("depth", "mine", 0.52),
            cell("depth", "mine+vit", None),
            cell("alone", "mine", 0.25),
        ],
        "matrix": [
            {
                "task": "pets",
                "best_teacher": "next",
                "best_value": 0.84,
                "kept": {"mine": {"share": 1.019, "low": 0.98, "high": 1.05}},
            },
            {
                "task": "depth",
                "best_teacher": "vit",
                "best_value": 0.5,
                "kept": {"mine": {"share": 0.96, "low": None, "high": None}},
            },
            {"task": "alone", "best_teacher": None, "best_value": None, "kept": {}},
        ],
        "mean": {"mine": {"share": 0.9903, "low": 0.95, "high": 1.02, "tasks": 2}},
        "scores": {"pets (mine)": 0.856, "pets (other)": 0.111},
        "retention": [],
        "groups": [],
    }


@pytest.fixture(scope="module")
def trained(run):
    return load_student(run.checkpoint)


@pytest.fixture
def measured(trained):
    return content(fingerprint([trained.student], trained.student.spec))


def test_the_card_has_retention_cost_and_gaps_with_intervals(trained, measured, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(measured))
    found = card_results(read_results(path), trained.student, path)
    text = readme(
        trained.student.spec, card_facts(trained, results=found), Written("test_vit", 1000, 0)
    )
    retention = text.partition("## Retention")[2].partition("\n## ")[0]
    assert (
        "| pets (mine) | top1 | 85.6 % [83.6, 87.6] | next, 84.0 % | 101.9 % [98.0, 105.0] |"
    ) in retention
    assert "| pets (mine+vit) | top1 | 80.0 % [78.0, 82.0] | next, 84.0 % |  |" in retention
    assert (
        "| depth (mine) | RMSE (less is better) | 0.52 m [0.5, 0.54] | vit, 0.5 m | 96.0 % |"
    ) in retention
    assert "mean of 2 tasks" in retention
    assert "99.0 % [95.0, 102.0]" in retention
    assert "multikd evaluate runs/x/last.ckpt" in retention
    assert "other" not in retention
    scores = text.partition("## Scores")[2].partition("\n## ")[0]
    assert "| alone (mine) | 25.0 % |" in scores
    cost = text.partition("## Cost")[2].partition("\n## ")[0]
    assert "| mine | 4.9 M | 245 M | 1.80 | 2.52 | 1,667 | 62 MB | cpu |" in cost
    assert "| mine, onnx |  |  | 0.90 |" in cost
    assert "| vit | 6.0 M |" in cost
    limits = text.partition("## Bias and limits")[2]
    assert (
        "| pets (mine) | light | dark: 60.0 % [50.0, 70.0] | bright: 90.0 % [80.0, 100.0] | "
        "30.0 % [21.0, 38.0] |"
    ) in limits
    assert "| pets (mine) | light | odd (few images) | 10.0 % [0.0, 20.0] | 2 |" in limits
    assert "No scores by group" not in limits


def test_results_of_another_student_are_refused(run, trained, tmp_path, capsys):
    path, out = tmp_path / "results.json", tmp_path / "out"
    path.write_text(json.dumps(content("f" * 64)))
    command = ["export", str(run.checkpoint), str(out), "--no-cost", f"--results={path}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    own = fingerprint([trained.student], trained.student.spec)[:12]
    assert f"this student is {own}" in error
    assert "mine (runs/x/last.ckpt, ffffffffffff)" in error
    assert "evaluate this checkpoint" in error
    # The raw weights of the same checkpoint are another student, too.
    raw = load_student(run.checkpoint, "raw").student
    path.write_text(json.dumps(content(fingerprint([raw], raw.spec))))
    assert main(command) == 2
    assert not out.exists()
    assert main([*command, "--weights=raw"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["retention"][0]["kept of the best teacher"] == "101.9 % [98.0, 105.0]"
    assert manifest["gaps"][0]["worst group"].startswith("dark")


def test_damaged_results_and_other_formats(trained, measured, tmp_path):
    path = tmp_path / "results.json"

    def refused(change):
        wrong = copy.deepcopy(measured)
        change(wrong)
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError) as info:
            card_results(read_results(path), trained.student, path)
        return str(info.value)

    assert "have the format 2, expected 1" in refused(lambda c: c.update(format=2))
    assert "holds no results" in refused(lambda c: c.update(cells="x"))
    assert "damaged" in refused(lambda c: c["tasks"][0].pop("unit"))
    assert "damaged" in refused(lambda c: c["cells"][0].update(value="much"))
    path.write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        read_results(path)
