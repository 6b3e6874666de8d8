"""The page of an evaluation: whole, offline, accessible, and safe whatever names are in it."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pages import Page
from PIL import Image
from retention.results_maker import HOSTILE, SCRIPT, content, with_pictures

from multikd.pages import charts
from multikd.pages.charts import Bar, BarGroup
from multikd.retention.curves import curves_of
from multikd.retention.page import render, write_page
from multikd.retention.reading import read_results, results_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, Path]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "results.json").write_text(json.dumps(with_pictures(folder)), encoding="utf-8")
    path = write_page(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)
    assert path == folder / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source), folder


def test_it_is_one_whole_page_that_needs_nothing(made: Any) -> None:
    source, parsed, _ = made
    assert parsed.open == []
    assert len(source) < 1_000_000
    for tag in ("script", "iframe", "object", "b x"):
        assert tag not in parsed.tags
    assert not re.search(r"""(src|href)=["']?(?!["']?(data:|#))""", source)
    assert "url(" not in source
    assert "onerror" not in source
    assert 'name="viewport"' in source
    assert 'lang="en"' in source


def test_hostile_names_are_text(made: Any) -> None:
    source, parsed, _ = made
    assert HOSTILE not in source
    assert SCRIPT not in source
    assert SCRIPT in parsed.text
    assert "linear <b>x" in parsed.text
    assert "student@lite1: no <i>such</i> head" in parsed.text


def test_links_lead_somewhere_and_tables_have_headers(made: Any) -> None:
    source, parsed, _ = made
    for target in re.findall(r'href="#([^"]+)"', source):
        assert source.count(f'id="{target}"') == 1
    for table in re.findall(r"<table.*?</table>", source, flags=re.S):
        rows = re.findall(r"<tr.*?</tr>", table, flags=re.S)
        widths = {len(re.findall(r"<t[hd][ >]", row)) for row in rows}
        assert len(widths) == 1, table[:300]
        assert all('scope="' in row for row in rows)
    assert parsed.images
    assert all(image["alt"] for image in parsed.images)


def test_the_headline_claims_no_more_than_the_intervals(made: Any) -> None:
    text = made[1].text
    assert (
        "student 98.3 % of the best teacher’s score is kept: mean over 4 tasks, 95 % interval "
        "96.0 % to 100.4 %. above the best teacher on linear <b>x; level with it on fashion-knn, "
        "corruptions; below it on depth." in text
    )
    assert "mean over 1 task" not in text, "a head has its column, and no headline"


def test_the_matrix_has_every_score(made: Any) -> None:
    source, parsed, _ = made
    for words in (
        "task student student student@lite1 student through a head <b>x teacher lite1 teacher",
        "fashion-knn top1 % 85.6 [83.6, 87.6] kept 101.5 % [99.5, 103.5] 84.0 [82.0, 86.1] kept "
        "99.7 % [97.7, 101.7] 84.3 [82.3, 86.3] 84.2 [82.2, 86.2]",
        "depth rmse m, lower is better 0.55 [0.53, 0.57] kept 85.5 % [80.5, 90.5] – 0.512",
        "mean share kept of the best teacher’s 98.3 % [96.0, 100.4] 99.7 % [97.7, 101.7]",
    ):
        assert words in parsed.text, words
    best = re.findall(r'<td class="(?:student )?best">([\d.]+)', source)
    # Of each task; where lower is better it is the lowest. Then the best of each class.
    assert best[:4] == ["85.6", "89.3", "0.47", "63.0"]
    assert best[4:] == ["82.0", "95.0", "97.0", "75.0"]


def test_tasks_say_what_was_measured(made: Any) -> None:
    text = made[1].text
    for words in (
        "KNN (Wu et al. 2018); top1 in %; data fashion with 4,000 train, 1,000 test images. k 20, "
        "temperature 0.07",
        "mean_per_class 0.8551",
        "By class class student <b>x shirt 80.0 82.0 boot <left> 95.0 90.0",
        "night 400 images 70.0 [60.0, 80.0] 74.0 [64.0, 84.0] dusk 3 images – –",
        "worst group night night gap best group minus worst 20.0 [10.0, 30.0]",
        'What student confuses Hardest: "><script>alert(1)</script> (70 %), shirt (80 %)',
        "student cpu 4.90 0.24 62 1.80 / 2.52 1,667",
        "command multikd evaluate runs/'a <b>'/last.ckpt --with-teachers",
        "packaged:student MIT 64 × 64 px 0123456789abcdef",
        "On the front, where nothing cheaper is as good: student, <b>x.",
    ):
        assert words in text, words


def pixels(image: dict[str, str]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))


def test_charts_are_drawn_and_described(made: Any) -> None:
    plots = [image for image in made[1].images if image.get("class") == "plot"]
    assert [image["alt"] for image in plots] == [
        "Bars of the relative gain by task: fashion-knn +1.5 % against <b>x; linear <b>x +2.8 % "
        "against <b>x; depth −14.5 % against lite1; corruptions +3.3 % against lite1",
        "Score against latency, ms of each encoder",
        "risk-coverage of student, <b>x",
        "Confusion matrix of student",
        "Confusion matrix of <b>x",
        "noise of student, lite1",
        f"fog {SCRIPT} of student, lite1",
    ]
    for image in plots:
        assert pixels(image).shape[1] == 900
        assert len(np.unique(pixels(image)[..., 0])) > 10


def test_neighbours_and_components_come_from_the_folder_alone(made: Any) -> None:
    source, parsed, folder = made
    small = [image for image in parsed.images if "class" not in image]
    stored = {path.read_bytes() for path in (folder / "pictures").iterdir()}
    shown = [base64.b64decode(image["src"].partition(",")[2]) for image in small]
    assert set(shown) <= stored
    # 4 × 7 of the student; of the other one row is stolen and one picture missing; 4 × (1 + 3).
    assert len(shown) == 28 + (3 * 7 - 1) + 16
    assert source.count('<figure class="unlike">') == 9 + 7
    assert "root:" not in source
    assert "student 41 %, 20 %, 10 %; <b>x 41 %, 20 %, 10 %" in parsed.text
    assert source.count("<details open>") == 1


def test_what_is_missing_is_left_out() -> None:
    bare = content()
    for key in ("matrix", "mean", "pareto"):
        del bare[key]
    for entry in bare["encoders"]:
        entry["cost"] = None
        entry["role"] = "encoder"
    for cell in bare["cells"]:
        cell["details"], cell["low"] = {}, None
    parsed = Page(render(results_of(bare)))
    headings = ("Gain over", "Score against", "neighbours", "Patch tokens", "kept", "By class")
    for words in (*headings, "best teacher"):
        assert words not in parsed.text
    assert parsed.images == []
    assert parsed.text.count("How it was made") == 2  # in the list of links, and above itself


DAMAGE: dict[str, Any] = {
    "per_class": [["a", 1], {"a": "x"}, 3, {"a": None}],
    "confusion": [[[1]], [[1, 2], [3]], "x", [["a", "b"], ["c", "d"]], [[0, 0], [0, 0]]],
    "groups": [{"g": 1}, {"g": {"groups": []}}, {"g": {"groups": {"a": 1}, "gap": "x"}}, [1]],
    "curves": [
        {"x": [1]}, [1], [{"x": [1], "y": []}], [{"x": [{}], "y": [1]}], [{"x": [1], "y": [None]}],
        [{"x": ["clean", "fog"], "y": [0.1, None]}], [{"name": 3, "x": [1, 2], "y": [0.5, 0.6]}],
    ],
    "curve": [{"x": 1}, {"x": [1]}, {"x": [1], "y": [2, 3]}, [1], {"x": [None], "y": [1]}],
    "reliability": [[1], [{"images": 1}], {"a": 1}],
    "errors": [{"fog": 3}, 4],
    "neighbours": [{"queries": [1]}, {"queries": [{"picture": 4, "neighbours": 3}]}, 5],
    "pca": [{"images": [{}]}, {"images": {}, "explained": "x"}, []],
}  # fmt: skip


def test_curves_as_the_protocols_note_them() -> None:
    details = {
        "curves": [{"name": "a", "x": ["1e-3", "1"], "y": [0.1, None], "y_label": "score"}],
        "curve": {"size": [32, 64], "top1": [0.5, 0.6], "cosine": [1.0, 0.9]},
        "reliability": [
            {"low": 0.0, "high": 0.5, "images": 0, "confidence": 0, "accuracy": 0},
            {"low": 0.5, "high": 1.0, "images": 4, "confidence": 0.7, "accuracy": 0.75},
        ],
        "errors": {"fog": [0.2, 0.4], "blur": [0.4, 0.5]},
        "severities": [1, 5],
    }
    a, top1, cosine, reliability, corrupted = curves_of(details)
    assert (a.x, a.y, a.y_label) == (["1e-3", "1"], [0.1, None], "score")
    assert (top1.name, top1.x, top1.y) == ("top1 by size", [32, 64], [0.5, 0.6])
    assert cosine.name == "cosine by size"
    assert (reliability.x, reliability.y) == ([0.7], [0.75])
    assert corrupted.name == "top-1 by severity, mean of 2 corruptions"
    assert corrupted.y == pytest.approx([0.7, 0.55])
    (risk,) = curves_of({"curve": {"coverage": [0.5, 1], "risk": [0, 0.1], "threshold": [1, 0.2]}})
    assert (risk.name, risk.x_label, risk.y_label) == ("risk-coverage", "coverage", "errors")
    assert (risk.x, risk.y) == ([0.5, 1], [0, 0.1])


@pytest.mark.parametrize("key", DAMAGE)
def test_details_of_an_unknown_shape_are_not_shown(key: str, tmp_path: Path) -> None:
    for damage in DAMAGE[key]:
        strange = copy.deepcopy(content())
        for cell in strange["cells"]:
            cell["details"] = {key: damage}
        strange["matrix"] = [{"task": t["name"]} for t in strange["tasks"]]
        strange["pareto"] = strange["mean"] = None
        assert Page(render(results_of(strange, tmp_path))).open == []


def test_many_classes_are_cut_to_those_where_most_is_lost() -> None:
    many = content()
    names = [f"class {i:03d}" for i in range(100)]
    by = {(c["task"], c["encoder"]): c for c in many["cells"]}
    by["fashion-knn", HOSTILE]["details"] = {"per_class": dict.fromkeys(names, 0.9)}
    by["fashion-knn", "student"]["details"] = {
        "per_class": {name: 0.5 if i in (3, 97) else 0.95 for i, name in enumerate(names)}
    }
    text = Page(render(results_of(many))).text
    assert "By class: the 20 of 100 where most is lost class student <b>x class 003 50.0" in text
    assert text.index("class 003") < text.index("class 097") < text.index("class 000")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(format=2), r"is of format 2, and this version reads format 1"),
        (lambda c: c.pop("format"), "holds no evaluation"),
        (lambda c: c.update(cells={}), "'cells' must be a list of objects, found dict"),
        (lambda c: c.pop("encoders"), "'encoders' must be a list of objects, found nothing"),
        (lambda c: c["tasks"][0].pop("name"), "an entry of 'tasks' needs a text 'name'"),
        (lambda c: c["encoders"].append(c["encoders"][0]), "'encoders' names '<b>x' twice"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, change: Any, words: str) -> None:
    made = content()
    change(made)
    (tmp_path / "results.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as raised:
        read_results(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_json_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json is no JSON"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="can't be read"):
        read_results(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is no JSON"):
        read_results(tmp_path / "latin.json")


def test_numbers_that_are_none_become_missing() -> None:
    strange = content()
    strange["cells"][0].update(value=True, low="0.3", high=float("nan"))
    strange["cells"][1].update(value=10**400)
    found = results_of(strange)
    first = found.cells["fashion-knn", HOSTILE]
    assert (first.value, first.low, first.high) == (None, None, None)
    assert found.cells["fashion-knn", "lite1"].value is None


def test_the_same_results_give_the_same_bytes() -> None:
    assert render(results_of(content())) == render(results_of(content()))


def test_bars_of_gains_point_the_right_way() -> None:
    """A gain is drawn to the right of the zero line in green, a loss to the left in red."""
    drawn = charts.gains(
        [BarGroup("up", [Bar("s", 0.1)]), BarGroup("down", [Bar("s", -0.1)])], "gain"
    )
    image = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).astype(int)

    def columns(colour: tuple[int, int, int]) -> Any:
        return np.where((abs(image - np.array(colour)) < 8).all(axis=2).any(axis=0))[0]

    green, red = columns((0x2E, 0x7D, 0x32)), columns((0xC6, 0x28, 0x28))
    assert len(green) > 50
    assert len(red) > 50
    assert green.min() > red.max()
