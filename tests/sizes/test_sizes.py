"""Searches over sizes: the rule, the budget as measured, going on, misuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablation.conftest import Place

from multikd.cli import main
from multikd.runs.overrides import get
from multikd.shipped import shipped_searches
from multikd.sizes import commands
from multikd.sizes.commands import SizesSettings, run_sizes
from multikd.sizes.rule import levelled_off, smallest_good
from multikd.sizes.run import SizeRun, size_config
from multikd.sizes.search import Search, read_search

SIZES = {f"w{width}": {"model.student.model_args": {"embed_dim": width}} for width in
         (64, 16, 32, 128)}  # fmt: skip
SCORES = {"w16": 0.50, "w32": 0.60, "w64": 0.603, "w128": 0.70}


def write_search(place: Place, path: Path, **change: Any) -> str:
    content = {
        "base": str(place.root / "base.yaml"),
        "tasks": str(place.root / "tasks.yaml"),
        "score": "knn",
        "sizes": SIZES,
        "seeds": [0, 1],
    }
    path.write_text(yaml.safe_dump({**content, **change}, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "scores, tolerance, patience, end, answer",
    [
        ([0.5], 0.01, 1, False, 0),
        ([0.5, 0.6, 0.605], 0.01, 1, True, 1),
        ([0.5, 0.6, 0.605], 0.01, 2, False, 1),
        ([0.5, 0.6, 0.605, 0.62], 0.01, 2, False, 3),
        ([0.5, 0.6, 0.605, 0.609], 0.01, 2, True, 1),
        # Two gains below the tolerance that together are one.
        ([0.5, 0.6, 0.606, 0.612], 0.01, 2, True, 2),
        ([0.6, 0.5, 0.6], 0.01, 2, True, 0),
        ([-3.0, -2.0], 0.5, 1, False, 1),
    ],
)
def test_the_rule(
    scores: list[float], tolerance: float, patience: int, end: bool, answer: int
) -> None:
    assert levelled_off(scores, tolerance, patience) is end
    assert smallest_good(scores, tolerance) == answer


def test_sizes_go_from_small_up_until_the_score_levels_off(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search, out, ran = write_search(place, tmp_path / "s.yaml"), tmp_path / "out", []

    def made_up(search: Search, run: SizeRun, out: Path) -> dict[str, Any]:
        if len(ran) == 3 and run.name not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(run.name)
        shift = 0.01 if run.seed else -0.01  # the mean of the seeds decides
        return {"scores": {"knn": {"value": SCORES[run.size] + shift}}}

    monkeypatch.setattr(commands, "do_size", made_up)
    settings = SizesSettings(out, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_sizes(search, settings)
    before = json.loads((out / "costs.json").read_text())
    text, figures = run_sizes(search, settings)
    small, middle = ["w16,seed=0", "w16,seed=1"], ["w32,seed=0", "w32,seed=1"]
    assert ran == [*small, middle[0], "stopped", middle[1], "w64,seed=0", "w64,seed=1"]
    assert figures["chosen"] == "w32"
    assert figures["levelled_off"]
    assert "the answer: w32" in text
    assert [entry["size"] for entry in figures["sizes"]] == ["w16", "w32", "w64", "w128"]
    assert figures["sizes"][3]["score"] is None
    # Costs were measured here, once.
    assert json.loads((out / "costs.json").read_text()) == before
    for entry in figures["sizes"]:
        assert entry["latency_ms"] > 0
        assert entry["macs"] > 0
    parameters = [entry["parameters"] for entry in figures["sizes"]]
    assert parameters == sorted(parameters)

    # A cost is kept only while the size's student is the one that was measured.
    kept = json.loads((out / "costs.json").read_text())
    kept["costs"]["w16"]["latency_ms"] = kept["costs"]["w32"]["latency_ms"] = -1.0
    kept["students"]["w16"] = {"name": "another"}
    (out / "costs.json").write_text(json.dumps(kept))
    run_sizes(search, settings)
    now = json.loads((out / "costs.json").read_text())["costs"]
    assert now["w16"]["latency_ms"] > 0
    assert now["w32"]["latency_ms"] == -1.0

    # Tasks that the sizes were not scored on.
    tasks = yaml.safe_load((place.root / "tasks.yaml").read_text())
    tasks["tasks"]["other"] = tasks["tasks"]["knn"]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    other = write_search(
        place, tmp_path / "o.yaml", tasks=str(tmp_path / "tasks.yaml"), score="other"
    )
    with pytest.raises(ValueError, match=r"'w16' was scored on knn, and .* decides by 'other'"):
        run_sizes(other, settings)

    # A budget that the larger ones don't fit; none that fits any.
    monkeypatch.setattr(
        commands, "do_size", lambda s, r, o: {"scores": {"knn": {"value": SCORES[r.size]}}}
    )
    bounded = write_search(place, tmp_path / "b.yaml", budget={"parameters": parameters[1]})
    text, figures = run_sizes(bounded, SizesSettings(tmp_path / "b", progress=False))
    assert [bool(entry["over_budget"]) for entry in figures["sizes"]] == [False, False, True, True]
    assert figures["chosen"] == "w32"
    assert "had not levelled off" in text
    tight = write_search(place, tmp_path / "t.yaml", budget={"latency_ms": 1e-6})
    with pytest.raises(ValueError, match=r"no size .* is within the budget; the smallest, 'w16'"):
        run_sizes(tight, SizesSettings(tmp_path / "t", progress=False))


def test_a_size_may_be_named_by_a_number_and_settings_hold_out_anywhere(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {16: SIZES["w16"], 32: SIZES["w32"]}
    name = write_search(
        place, tmp_path / "s.yaml", sizes=sizes, settings={"data.train": {"a": ["{out}/x", 1]}}
    )
    search = read_search(name)
    config = size_config(search, SizeRun("16", 0), Path("here"))
    assert get(config, "data.train") == {"a": ["here/x", 1]}
    monkeypatch.setattr(
        commands, "do_size", lambda s, r, o: {"scores": {"knn": {"value": SCORES[f"w{r.size}"]}}}
    )
    name = write_search(place, tmp_path / "s.yaml", sizes=sizes)
    text, figures = run_sizes(name, SizesSettings(tmp_path / "out", progress=False))
    assert figures["chosen"] == "32"
    assert "the answer: 32" in text


@pytest.mark.slow
def test_a_size_is_trained_and_scored_for_real(
    place: Place,
    tmp_path: Path,
    here: list[str],
) -> None:
    two = {"w16": SIZES["w16"], "w32": SIZES["w32"]}
    search = write_search(place, tmp_path / "s.yaml", sizes=two, seeds=[3], tolerance=1.0)
    _, figures = run_sizes(search, SizesSettings(tmp_path / "out", progress=False))
    assert here == ["w16,seed=3", "w32,seed=3"]
    assert figures["chosen"] == "w16"
    assert all(0 <= entry["score"] <= 1 for entry in figures["sizes"])
    config = yaml.safe_load((tmp_path / "out" / "runs" / here[0] / "config.yaml").read_text())
    assert config["seed_everything"] == 3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"score": "knnn"}, r"unknown task 'knnn': did you mean 'knn'"),
        ({"sizes": {"one": {"model.student.name": "test_vit"}}}, "must be two or more"),
        ({"sizes": {"a": {"model.student.name": "resnet10t"}, "b": {"model.student.name": "no"}}},
         r"the size 'b' of .*unknown timm model 'no'"),
        ({"sizes": {"a": None, "b": {}}}, "needs dotted keys"),
        ({"tolerance": 0}, "tolerance .* must be above 0"),
        ({"budget": {"latency": 3}}, "s.yaml"),
        ({"budget": {"latency_ms": -1}}, "must be above 0"),
        ({"patience": 0}, "patience 1 or more"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"size": {}}, r"unknown setting 'size': did you mean 'sizes'"),
    ],
)  # fmt: skip
def test_misuse(
    place: Place,
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
) -> None:
    search = write_search(place, tmp_path / "s.yaml", **change)
    with pytest.raises(ValueError, match=said) as error:
        run_sizes(search, SizesSettings(tmp_path / "out", progress=False))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/runs/*"))


def test_of_the_command(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = {"w16": SIZES["w16"], "w32": SIZES["w32"]}
    search = write_search(place, tmp_path / "s.yaml", sizes=two)
    assert main(["sizes", search, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "w32" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for name in shipped_searches():
        assert len(read_search(name).sizes) > 1
