"""Runs side by side: what is matched, what is refused, and how sure a difference is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import Page
from retention.results_maker import HOSTILE, content

from multikd.cli import main
from multikd.retention.compare import compare, difference, run_names
from multikd.retention.reading import Cell


def write(folder: Path, made: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def changed(by: float = 0.05) -> dict[str, Any]:
    """Another run: its student has another name and other scores, and no depth was measured."""
    made = copy.deepcopy(content())
    made["tasks"] = [task for task in made["tasks"] if task["name"] != "depth"]
    made["cells"] = [cell for cell in made["cells"] if cell["task"] != "depth"]
    for entry in made["encoders"]:
        if entry["name"] == "student":
            entry["name"] = "mine"
    for cell in made["cells"]:
        if cell["encoder"] == "student":
            cell["encoder"] = "mine"
            for key in ("value", "low", "high"):
                cell[key] += by
    made["mean"]["mine"] = made["mean"].pop("student")
    return made


def test_students_are_matched_whatever_their_names(tmp_path: Path) -> None:
    text, figures = compare([write(tmp_path / "a", content()), write(tmp_path / "b", changed())])
    rows = {(row["task"], row["encoder"]): row for row in figures["rows"]}
    row = rows["fashion-knn", "student"]
    assert [value["value"] for value in row["values"]] == [0.856, pytest.approx(0.906)]
    assert row["differences"][0] is None
    change = row["differences"][1]
    assert change["difference"] == pytest.approx(0.05)
    # Both intervals are ±0.02: ±0.02·√2.
    assert change["low"] == pytest.approx(0.05 - 0.02 * 2**0.5)
    assert change["high"] == pytest.approx(0.05 + 0.02 * 2**0.5)
    assert ("fashion-knn", "student, head lite1") in rows
    assert rows["depth", "student"]["values"][1] is None
    assert figures["alone"] == {"depth": ["a"]}
    line = next(line for line in text.splitlines() if line.startswith("fashion-knn (top1 %)  stud"))
    assert "85.6  90.6 (+5.0 [+2.2, +7.8]*)" in line
    assert "only in a: depth" in text
    assert "note: the mean shares kept are over different tasks" in text
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_against_newcombe_with_wilson_intervals() -> None:
    """Newcombe 1998, table II, example (a): 56/70 and 48/80 give 0.0524 to 0.3339."""

    def wilson(hits: int, count: int) -> Cell:
        p, z = hits / count, 1.959964
        centre = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count**2)) ** 0.5
        return Cell(p, centre - half, centre + half, {}, {}, None, None)

    found = difference(wilson(48, 80), wilson(56, 70))
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)
    assert found.resolved


def test_what_makes_runs_hard_to_compare_is_said(tmp_path: Path) -> None:
    other = changed()
    other["tasks"][0]["settings"]["k"] = 10
    other["tasks"][1]["metric"] = "top5"
    other["encoders"][0]["fingerprint"] = "another"
    text, figures = compare([write(tmp_path / "a", content()), write(tmp_path / "b", other)])
    assert "fashion-knn is not the same in a and b (k 20 and 10)" in text
    assert "metric 'top1' and 'top5'), so no difference is given" in text
    assert f"{HOSTILE} has other weights or another input in a and b" in text
    rows = {(row["task"], row["encoder"]): row for row in figures["rows"]}
    assert rows["fashion-knn", "student"]["differences"][1] is not None
    assert rows[f"linear {HOSTILE}", "student"]["differences"] == [None, None]


def test_another_test_set_gives_no_difference(tmp_path: Path) -> None:
    other = changed()
    other["tasks"][0]["images"]["test"] = 500
    _, figures = compare([write(tmp_path / "a", content()), write(tmp_path / "b", other)])
    row = next(r for r in figures["rows"] if r["task"] == "fashion-knn")
    assert row["differences"] == [None, None]


def test_without_intervals_there_is_a_difference_alone(tmp_path: Path) -> None:
    other = changed()
    for cell in other["cells"]:
        cell["low"] = cell["high"] = None
    text, figures = compare([write(tmp_path / "a", content()), write(tmp_path / "b", other)])
    change = figures["rows"][0]["differences"][1]
    assert change["low"] is change["high"] is None
    assert "90.6 (+5.0)" in text


def test_three_runs_and_a_page(tmp_path: Path) -> None:
    paths = [write(tmp_path / n, c) for n, c in (("a", content()), ("b", changed(-0.1)))]
    paths.append(write(tmp_path / f"c {HOSTILE}", changed(0.0)).parent)
    text, figures = compare(paths, tmp_path / "out")
    assert [run["name"] for run in figures["runs"]] == ["a", "b", f"c {HOSTILE}"]
    assert figures["page"] == str(tmp_path / "out" / "comparison.html")
    assert text.endswith(figures["page"])
    source = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    parsed = Page(source)
    assert parsed.open == []
    assert HOSTILE not in source
    assert "script" not in parsed.tags
    assert (
        "fashion-knn student; top1 % 85.6 [83.6, 87.6] 75.6 [73.6, 77.6] −10.0 [−12.8, −7.2]*"
        in (parsed.text)
    )
    assert "depth: only in a" in parsed.text
    assert [image["alt"] for image in parsed.images] == [
        "Change from a to b by task, in points",
        f"Change from a to c {HOSTILE} by task, in points",
    ]


def test_a_name_does_not_move_the_cursor(tmp_path: Path) -> None:
    evil = json.loads(json.dumps(content()).replace("lite1", "l\\u001b[2Jite"))
    text, _ = compare([write(tmp_path / "a", evil), write(tmp_path / "b", evil)])
    assert "\x1b" not in text
    assert "l\N{REPLACEMENT CHARACTER}[2Jite" in text


def test_names_of_runs(tmp_path: Path) -> None:
    assert run_names([Path("/x/a/eval/r.json"), Path("/x/b/eval/r.json")]) == ["a/eval", "b/eval"]
    assert run_names([Path("/x/a/one.json"), Path("/x/a/one.json")]) == [
        "/x/a/one.json 1", "/x/a/one.json 2"
    ]  # fmt: skip
    assert run_names([Path("/x/a/one.json"), Path("/x/a/two.json")]) == [
        "/x/a/one.json", "/x/a/two.json"
    ]  # fmt: skip


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a", content())
    with pytest.raises(ValueError, match=r"needs two or more results\.json files, received 1"):
        compare([a])
    foreign = content()
    for task in foreign["tasks"]:
        task["name"] += " elsewhere"
    with pytest.raises(ValueError, match="have no task in common"):
        compare([a, write(tmp_path / "b", foreign)])
    with pytest.raises(ValueError, match="is of format '9'"):
        compare([a, write(tmp_path / "c", {"format": "9"})])
    (tmp_path / "d.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"d\.json is no JSON"):
        compare([a, tmp_path / "d.json"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", content()), write(tmp_path / "b", changed())
    figures = tmp_path / "figures.json"
    command = ["evaluate", "--compare", str(a), str(b)]
    assert main([*command, "--out", str(tmp_path / "out"), "--json", str(figures)]) == 0
    assert "90.6 (+5.0 [+2.2, +7.8]*)" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert json.loads(figures.read_text(encoding="utf-8"))["alone"] == {"depth": ["a"]}
    a.write_text("{}")
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"{a} holds no evaluation" in said.err
