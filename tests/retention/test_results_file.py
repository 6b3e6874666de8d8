import csv
import io
import json

import numpy as np
import pytest
import torch

from multikd.evaluation.confidence import Calibration
from multikd.evaluation.knn_task import KNN
from multikd.evaluation.linear_task import LinearProbe
from multikd.evaluation.task import TaskResult
from multikd.export.commands import read_results as read_for_the_card
from multikd.export.readme import _records
from multikd.retention.reading import read_results
from multikd.retention.results import (
    build_results,
    encoder_entry,
    jsonable,
    results_csv,
    task_entry,
    write_results,
)
from multikd.retention.run import Cell
from multikd.retention.terminal import results_table
from multikd.types import EncoderSpec, Widths

SPEC = EncoderSpec("net", Widths(8, None), (64, 64), 16, (0.5,) * 3, (0.5,) * 3, licence="MIT")
RATES = {"student": 0.8, "clip": 0.7, "lite0": 0.85, "lite1": 0.6}
ROLES = {"student": "student", "clip": "head", "lite0": "teacher", "lite1": "teacher"}


def cost(milliseconds):
    return {"parameters": 10, "macs": None, "latency_ms": {"1": {"p50": milliseconds, "p95": 9.0}}}


def result(rate, seed, **changes):
    rows = (np.random.default_rng(seed).random(200) < rate).astype(float)
    return TaskResult(**({"value": float(rows.mean()), "per_sample": rows} | changes))


def scored():
    encoders = [
        encoder_entry(
            n,
            ROLES[n],
            SPEC,
            fingerprint="f" + n,
            head=n if n == "clip" else None,
            cost=cost(i + 1),
        )
        for i, n in enumerate(RATES)
    ]
    tasks = [
        task_entry("shoes-knn", KNN("shoes", ks=(20, 5)), {"train": 800, "test": 200}),
        task_entry("shoes-linear", LinearProbe("shoes"), {"train": 800, "test": 200}),
    ]
    groups = {"site": {"groups": {"a": {"value": 0.5, "low": None, "high": 0.6, "count": 7}}}}
    cells = [
        Cell("shoes-knn", n, result(r, i, details={"groups": groups}), seconds=0.5)
        for i, (n, r) in enumerate(RATES.items())
    ]
    cells += [
        Cell("shoes-linear", n, result(r, 10 + i, metrics={"ece": float("nan")}))
        for i, (n, r) in enumerate(RATES.items())
        if n != "clip"
    ]
    cells.append(Cell("shoes-linear", "clip", None, error="it's no classifier"))
    return encoders, tasks, cells


@pytest.fixture
def results():
    return build_results(*scored(), command="multikd evaluate x", resamples=200)


def test_it_is_read_back_by_the_page_and_by_the_card(results, tmp_path):
    json_path, csv_path = write_results(tmp_path, results)
    text = json_path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text) == results
    read = read_results(tmp_path)
    assert [t.protocol for t in read.tasks] == ["KNN", "LinearProbe"]
    assert read.tasks[0].settings["ks"] == [20, 5]
    assert "data" not in read.tasks[0].settings
    cell = read.cells["shoes-knn", "student"]
    assert cell.low < cell.value < cell.high
    assert read.matrix["shoes-knn"].best_teacher == "lite0"
    card = read_for_the_card(json_path)
    assert set(card["scores"]) == {
        "shoes-knn (student)",
        "shoes-knn (clip)",
        "shoes-linear (student)",
    }
    row = card["retention"][0]
    assert row["best teacher"] == "lite0"
    assert row["student"] == cell.value
    assert row["student kept"].count("%") == 1
    assert "lite0" in _records(card["retention"])
    assert card["groups"][0] == {
        "task": "shoes-knn", "encoder": "student", "column": "site", "group": "a",
        "value": 0.5, "low": None, "high": 0.6, "images": 7,
    }  # fmt: skip
    assert csv_path.name == "results.csv"


def test_calibration_is_in_the_matrix_but_not_in_the_mean():
    encoders, tasks, cells = scored()
    tasks.append(task_entry("shoes-sure", Calibration("shoes"), {"train": 800, "test": 200}))
    cells += [Cell("shoes-sure", n, result(r, i)) for i, (n, r) in enumerate(RATES.items())]
    assert [t["in_mean"] for t in tasks] == [True, True, False]
    found = build_results(encoders, tasks, cells, resamples=20)
    plain = build_results(encoders, tasks[:2], cells[: -len(RATES)], resamples=20)
    assert found["matrix"][2]["kept"]["student"]["share"] is not None
    assert (found["mean"], found["pareto"]) == (plain["mean"], plain["pareto"])


def test_missing_is_null(results):
    cells = {(c["task"], c["encoder"]): c for c in results["cells"]}
    failed = cells["shoes-linear", "clip"]
    assert (failed["value"], failed["low"], failed["error"]) == (None, None, "it's no classifier")
    assert cells["shoes-linear", "student"]["metrics"] == {"ece": None}
    assert results["mean"]["clip"]["tasks"] == 1
    assert results["mean"]["student"]["tasks"] == 2
    assert set(results["mean"]) == {"student", "clip"}
    encoders, tasks, cells = scored()
    cells[0] = Cell("shoes-knn", "student", result(0.5, 0, value=float("nan")))
    found = build_results(encoders, tasks, cells, resamples=20)
    assert found["cells"][0]["value"] is None
    assert found["cells"][0]["error"] == "the score is not a finite number"
    assert "student" not in found["matrix"][0]["kept"]
    json.dumps(found, allow_nan=False)


def test_pareto_compares_on_common_tasks_alone(results):
    # Without the head, which failed on one task, two tasks count; with it one does.
    points = {p["encoder"]: p for p in results["pareto"]}
    assert set(points) == set(RATES)
    knn = {c["encoder"]: c["value"] for c in results["cells"] if c["task"] == "shoes-knn"}
    for name, point in points.items():
        assert point["score"] == pytest.approx(knn[name] / knn["lite0"])
    assert points["lite0"]["on_front"]
    assert not points["lite1"]["on_front"]
    assert results["pareto_cost"] == "latency of one image, ms (p50)"
    encoders, tasks, cells = scored()
    for encoder in encoders:
        encoder["cost"]["latency_ms"] = {}
    assert build_results(encoders, tasks, cells, resamples=5)["pareto_cost"] == "parameters"
    for encoder in encoders:
        encoder["cost"] = None
    found = build_results(encoders, tasks, cells, resamples=5)
    assert (found["pareto"], found["pareto_cost"]) == ([], None)


def test_without_teachers_there_is_no_share():
    encoders, tasks, cells = scored()
    mine = [e | {"role": "encoder"} for e in encoders if e["role"] != "teacher"]
    cells = [c for c in cells if ROLES[c.encoder] != "teacher"]
    found = build_results(mine, tasks, cells, resamples=20)
    assert found["mean"] == {}
    assert found["retention"] == []
    assert found["matrix"][0]["best_teacher"] is None
    assert found["scores"]["shoes-knn (student)"] == found["cells"][0]["value"]
    assert "shoes-knn" in results_table(found, width=80)


def test_csv_has_every_cell(results):
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert len(rows) == 8
    first = rows[0]
    kept = results["matrix"][0]["kept"]["student"]
    assert float(first["value"]) == results["cells"][0]["value"]
    assert float(first["low"]) == results["cells"][0]["low"]
    assert float(first["share_low"]) == kept["low"]
    assert float(first["difference_high"]) == kept["difference_high"]
    assert (first["role"], first["best_teacher"], first["error"]) == ("student", "lite0", "")
    teacher = next(r for r in rows if r["encoder"] == "lite1")
    assert teacher["share"] == ""
    failed = next(r for r in rows if r["error"])
    assert (failed["encoder"], failed["value"]) == ("clip", "")


def test_the_terminal_table_is_readable_at_80_columns(results):
    value = next(c["value"] for c in results["cells"] if c["encoder"] == "lite1")
    kept = results["matrix"][0]["kept"]["student"]
    interval = f"({100 * kept['low']:.1f} … {100 * kept['high']:.1f})"
    # Side by side where they fit; and below each other where they don't.
    for extra, heads in ((0, 1), (6, 0)):
        more = [
            results["encoders"][1] | {"name": f"head[{i}]-of-a-long-name"} for i in range(extra)
        ]
        wide = results | {"encoders": [*results["encoders"], *more]}
        lines = results_table(wide, width=80).splitlines()
        assert max(map(len, lines)) <= 80
        assert len([line for line in lines if "student" in line and "lite0" in line]) == heads
        text = "\n".join(lines)
        for words in ("clip", "lite1", "shoes-knn (top1 %)", f"{100 * value:.1f}", interval,
                      "failed", *(e["name"] for e in more)):  # fmt: skip
            assert words in text


def test_places_must_fit():
    encoders, tasks, cells = scored()
    with pytest.raises(ValueError, match="twice"):
        build_results(encoders, tasks, [*cells, cells[0]])
    with pytest.raises(ValueError, match="not listed"):
        build_results(encoders, tasks, [Cell("other", "student", None)])
    with pytest.raises(ValueError, match="must each be unique"):
        build_results([*encoders, encoders[0]], tasks, cells)


def test_everything_becomes_plain_json():
    value = {
        1: np.float32(0.5), "nan": float("inf"), "array": np.array([[1, 2]]), "flag": np.bool_(1),
        "tensor": torch.tensor([1.0, float("nan")]), "tuple": (1, None), "spec": SPEC.widths,
        "set": {"b", "a"},
    }  # fmt: skip
    assert jsonable(value) == {
        "1": 0.5, "nan": None, "array": [[1, 2]], "flag": True, "tensor": [1.0, None],
        "tuple": [1, None], "spec": [8, None], "set": ["a", "b"],
    }  # fmt: skip
