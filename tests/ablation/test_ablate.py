"""Studies: planned, run, interrupted, gone on with, told; and what users get wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ablation.conftest import WORTH, Place, made_up

from multikd.ablation import commands, work
from multikd.ablation.commands import AblateSettings, confirm, run_ablate
from multikd.ablation.execute import Processes
from multikd.ablation.plan import Combination, Planner, Run
from multikd.ablation.present import as_csv, as_latex, as_markdown, terminal
from multikd.ablation.stages import planned_runs
from multikd.ablation.state import StudyFolder
from multikd.ablation.study import read_study
from multikd.ablation.subsets import subsets_of
from multikd.ablation.worker import DiskFullError
from multikd.cli import main
from multikd.fit import parse_config
from multikd.modules.distillation import DistillationModule
from multikd.retention.taskfile import read_task_file
from multikd.runs.overrides import get, put
from multikd.shipped import shipped_studies


def settings(out: Path, **change: Any) -> AblateSettings:
    return AblateSettings(out=out, progress=False, **change)


def table(board: dict[str, Any]) -> Any:
    """What a reader sees, without times of the clock."""
    rows = []
    for row in board["rows"]:
        kept = {k: v for k, v in row.items()
                if k not in ("seconds", "teacher_seconds_per_image", "pareto")}  # fmt: skip
        rows.append(kept)
    return json.loads(json.dumps({"rows": rows, "worth": board["worth"]}))


# --- the whole of it, for real ----------------------------------------------------------------


@pytest.mark.slow
def test_a_study_trains_scores_ranks_and_goes_on(
    place: Place, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = tmp_path / "out", []
    whole = DistillationModule.run_teacher

    def counted(self: DistillationModule, name: str, images: Any) -> Any:
        ran.append(len(images))
        return whole(self, name, images)

    monkeypatch.setattr(DistillationModule, "run_teacher", counted)
    train = work.train_and_score

    def trained(*arguments: Any) -> dict[str, Any]:
        before = len(ran)
        result = train(*arguments)
        assert len(ran) == before, "a run on the cache ran a teacher"
        return result

    monkeypatch.setattr(work, "train_and_score", trained)
    text, board = run_ablate(place.study(seeds=[0]), settings(out))
    assert sum(ran) >= 2 * 24  # the cache was filled by them
    assert [row["rank"] for row in board["rows"] if row["teachers"]] == [1, 2, 3]
    assert board["progress"]["done"] == 4
    assert board["progress"]["failed"] == {}
    assert len({row["scores"]["map"]["mean"] for row in board["rows"]}) == 4
    for measure in ("knn", "retention"):
        found = board["worth"][0]["measures"][measure]
        gain = found["full"] - found["empty"]
        values = math.fsum(v["value"] for v in found["values"].values())
        assert abs(values - gain) < 1e-9
    assert "What each teacher adds" in text
    for form in ("json", "csv", "md", "tex", "html"):
        assert (out / f"leaderboard.{form}").stat().st_size > 200
    page = (out / "leaderboard.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    shares = board["rows"][0]["diagnostics"] or board["rows"][1]["diagnostics"]
    assert any("gradient/" in key for key in shares)
    run = out / "runs" / "vit+cnn,seed=0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    # Again: everything is there, and nothing runs.
    made = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    ran.clear()
    _, again = run_ablate(place.study(seeds=[0]), settings(out))
    assert table(again) == table(board)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("result.json")} == made
    assert not ran
    # A run of it is an ordinary fit: the same config alone gives the same student.
    monkeypatch.undo()
    result = json.loads((run / "result.json").read_text())
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    assert main(["fit", f"--config={run / 'config.yaml'}"]) == 0
    scores = work.score(
        f"student={run / 'checkpoints' / 'last.ckpt'}", str(place.root / "tasks.yaml"), (),
        tmp_path / "e", False,
    )["student"]  # fmt: skip
    assert scores["map"]["value"] == result["scores"]["map"]["value"]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_table(
    place: Place, tmp_path: Path, here: None
) -> None:
    """SIGKILL while it works, four times: at most the run at hand is repeated."""
    study = place.study("killed", subsets=[["vit"], ["vit", "cnn"]], seeds=[0], empty=False)
    _, expected = run_ablate(study, settings(tmp_path / "whole"))
    out = tmp_path / "out"
    planner = Planner(read_study(study), out)
    folder = StudyFolder(out)
    runs = [*planner.shared(), *planner.runs(planner.combinations())]
    folder.write_plan(planner, runs)
    from multikd.ablation.worker import write_job

    write_job(out, planner.study.tasks, planner.study.data, None)
    # A process of its own: what autograd has run in can't be forked. One thread as here, for the
    # same bits; it tells when it begins, so that pauses don't count its imports.
    script = (
        "import pathlib, sys\n"
        "from multikd.fit import run_lightning\n"
        "from multikd.ablation.worker import work_on\n"
        "print('ready', flush=True)\n"
        "work_on(pathlib.Path(sys.argv[1]))\n"
    )
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    for pause in (0.3, 0.9, 1.5, 2.1):
        before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, env=one_thread
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(pause)
        child.kill()
        child.wait()
        child.stdout.close()
        # What was finished is left alone.
        assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    _, board = run_ablate(study, settings(out))
    assert board["progress"]["failed"] == {}
    assert table(board) == table(expected)


@pytest.mark.slow
def test_processes_of_their_own(place: Place, tmp_path: Path) -> None:
    study = place.study("own", subsets=[["vit"]], seeds=[0], cache=None, empty=False)
    _, board = run_ablate(study, settings(tmp_path / "out"))
    assert [row["label"] for row in board["rows"]] == ["vit"]
    log = (tmp_path / "out" / "worker-0.log").read_text(encoding="utf-8")
    assert "Traceback" not in log


# --- with made-up scores ----------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, here: None) -> list[str]:
    """Names of runs in the order in which they were done, with scores that are made up."""
    done: list[str] = []

    def do(run: Run, out: Path, tasks: str, data: tuple[str, ...]) -> dict[str, Any]:
        done.append(run.name)
        return made_up(run, out, tasks, data)

    monkeypatch.setattr(work, "do", do)
    return done


def test_the_figures_are_right(place: Place, tmp_path: Path, scored: list[str]) -> None:
    _, board = run_ablate(place.study(seeds=[0, 1, 2]), settings(tmp_path))
    rows = {row["label"]: row for row in board["rows"]}
    both = rows["vit+cnn"]["scores"]
    assert both["knn"]["mean"] == pytest.approx(0.44 + 0.001)
    assert both["knn"]["deviation"] == pytest.approx(0.001)
    assert both["retention"]["mean"] == pytest.approx(0.441 / 0.6)
    values = board["worth"][0]["measures"]["knn"]["values"]
    # Half of what the pair loses together is each one's.
    assert {n: v["value"] for n, v in values.items()} == pytest.approx(
        {n: w - 0.01 for n, w in WORTH.items()}
    )
    (pair,) = board["worth"][0]["measures"]["knn"]["interactions"]
    assert pair["value"] == pytest.approx(-0.02)
    assert [row["label"] for row in board["rows"] if row["pareto"]] == ["vit+cnn", "vit"]
    gap = rows["vit"]["behind_best"]
    assert gap["difference"] == pytest.approx(-0.04 / 0.6)
    assert gap["says"] == "below 0"
    assert board["progress"]["cache_bytes"] == 1000
    text = terminal(board)
    assert "3 seeds: intervals are wide" in text
    assert as_csv(board).count("\n") == 1 + 4 * 3
    assert as_markdown(board).startswith("| # | teachers |")
    assert r"\toprule" in as_latex(board)
    assert as_latex(board).count(r"\\") == 1 + 4


def test_one_seed_claims_nothing(place: Place, tmp_path: Path, scored: list[str]) -> None:
    _, board = run_ablate(place.study(seeds=[0]), settings(tmp_path))
    assert "one seed: no interval" in terminal(board)
    found = board["worth"][0]["measures"]["knn"]["values"]["vit"]
    assert (found["low"], found["says"]) == (None, "too few seeds")


def test_few_subsets_give_leave_one_out(place: Place, tmp_path: Path, scored: list[str]) -> None:
    _, board = run_ablate(place.study(subsets="leave-one-out", empty=False), settings(tmp_path))
    found = board["worth"][0]["measures"]["knn"]
    assert found["method"] == "leave-one-out"
    assert found["values"]["cnn"]["value"] == pytest.approx(0.04)


def test_axes_and_halving(place: Place, tmp_path: Path, scored: list[str]) -> None:
    axes = {"rate": {"bad": {"model.lr_batch": 32}, "good": {"model.lr_batch": 64}}}
    study = place.study(axes=axes, seeds=[0, 1], empty=False,
                        halving={"budgets": [1, 2], "keep": 0.34})  # fmt: skip
    planner = Planner(read_study(study), tmp_path)
    assert planned_runs(planner) == 2 * (6 + 3)
    _, board = run_ablate(study, settings(tmp_path))
    last = [row["label"] for row in board["rows"] if row["budget"] == 2]
    assert last == ["vit+cnn,rate=good,budget=2", "vit+cnn,rate=bad,budget=2",
                    "vit,rate=good,budget=2"]  # fmt: skip
    assert [row["rank"] for row in board["rows"]][:4] == [1, 2, 3, None]
    config = planner.config(Run("run", Combination(("vit",), (("rate", "good"),), 2), 1))
    assert get(config, "trainer.max_epochs") == 2
    assert get(config, "model.lr_batch") == 64
    assert list(get(config, "model.teachers")) == ["vit"]
    assert (config["seed_everything"], get(config, "data.seed")) == (1, 1)
    assert get(config, "data.recorded_seed") == 0


def test_an_untrained_student_is_one_for_all_settings_that_only_change_training(
    place: Place, tmp_path: Path, scored: list[str]
) -> None:
    axes = {
        "rate": {"bad": {"model.lr_batch": 32}, "good": {"model.lr_batch": 64}},
        "size": {"one": {"model.student.rungs": [-1]}, "two": {"model.student.rungs": [-2, -1]}},
    }
    study = place.study(axes=axes, subsets=[["vit"], ["cnn"], ["vit", "cnn"]], seeds=[0, 1])
    _, board = run_ablate(study, settings(tmp_path))
    untrained = [row["label"] for row in board["rows"] if not row["teachers"]]
    assert sorted(untrained) == ["untrained,size=one", "untrained,size=two"]
    planner = Planner(read_study(study), tmp_path)
    alone = Combination((), (("size", "two"),))
    config = planner.config(Run("run", alone, 0))
    assert get(config, "model.student.rungs") == [-2, -1]
    assert get(config, "model.lr_batch") == 32  # some level of what does not matter
    # It is the empty set of every setting of its size.
    assert [w["setting"] for w in board["worth"]] == [
        f"rate={rate},size={size}" for rate in ("bad", "good") for size in ("one", "two")
    ]
    for entry in board["worth"]:
        found = entry["measures"]["knn"]
        assert found["method"] == "shapley"
        total = math.fsum(v["value"] for v in found["values"].values())
        assert abs(total - (found["full"] - found["empty"])) < 1e-9


def test_a_search_is_the_same_again(place: Place, tmp_path: Path, scored: list[str]) -> None:
    pytest.importorskip("optuna")
    axes = {"rate": {"bad": {}, "good": {"model.lr_batch": 64}}}
    axes["rate"]["bad"] = {"model.lr_batch": 32}
    study = place.study(axes=axes, seeds=[0], empty=False, search={"trials": 4, "seed": 1})
    _, board = run_ablate(study, settings(tmp_path))
    runs = [name for name in scored if not name.startswith("_")]
    assert len(runs) == len(board["rows"]) == 4
    scored.clear()
    _, again = run_ablate(study, settings(tmp_path))
    assert not scored
    assert table(again) == table(board)


def test_a_run_that_fails_is_tried_once_more_and_told(
    place: Place, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: dict[str, int] = {}

    def do(run: Run, out: Path, tasks: str, data: tuple[str, ...]) -> dict[str, Any]:
        tries[run.name] = tries.get(run.name, 0) + 1
        if run.name == "cnn,seed=0" or (run.name == "vit,seed=0" and tries[run.name] == 1):
            raise RuntimeError("the GPU\nfell off")
        return made_up(run, out, tasks, data)

    monkeypatch.setattr(work, "do", do)
    text, board = run_ablate(place.study(), settings(tmp_path))
    assert tries["cnn,seed=0"] == tries["vit,seed=0"] == 2
    assert board["progress"]["failed"] == {"cnn,seed=0": "RuntimeError: the GPU fell off"}
    assert "failed: cnn,seed=0: RuntimeError: the GPU fell off" in text
    assert board["worth"][0]["measures"]["knn"]["seeds"] == [1]  # the seed that is whole
    monkeypatch.setattr(work, "do", made_up)
    _, board = run_ablate(place.study(), settings(tmp_path))  # started anew, it gets a chance
    assert board["progress"]["failed"] == {}


def test_a_full_disk_stops_the_study_and_loses_nothing(
    place: Place, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ["vit+cnn"]

    def until_full(run: Run, out: Path, tasks: str, data: tuple[str, ...]) -> dict[str, Any]:
        if run.kind == "run" and "+".join(run.combination.subset) in full:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise ValueError("a checkpoint could not be written") from error
        return made_up(run, out, tasks, data)

    monkeypatch.setattr(work, "do", until_full)
    out = tmp_path / "out"
    with pytest.raises(DiskFullError, match=r"is full \(at vit\+cnn,seed=0\).*what is finished is"):
        run_ablate(place.study(), settings(out))
    done = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert len(done) == 6  # cache, teachers, ∅ twice, one teacher each; nothing after that
    assert (out / "leaderboard.json").is_file()
    full.clear()
    _, board = run_ablate(place.study(), settings(out))
    assert board["progress"]["failed"] == {}
    assert {p: p.stat().st_mtime_ns for p in done} == done


def test_a_failed_cache_stops_the_study(
    place: Place, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(run: Run, *rest: Any) -> dict[str, Any]:
        if run.kind == "cache":
            raise OSError("No space left on device")
        return made_up(run, *rest)

    monkeypatch.setattr(work, "do", do)
    with pytest.raises(ValueError, match="the study's cache could not be made.*No space left"):
        run_ablate(place.study(), settings(tmp_path))


# submitit's debug executor leaves its log files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_slurm_through_submitit(place: Place, tmp_path: Path, scored: list[str]) -> None:
    """Its debug executor runs the same array here."""
    pytest.importorskip("submitit")
    _, board = run_ablate(
        place.study(seeds=[0]), settings(tmp_path, slurm=("timeout_min=5",), cluster="debug")
    )
    assert board["progress"]["done"] == 4
    with pytest.raises(ValueError, match="submitit can't submit here"):
        run_ablate(place.study(seeds=[0]), settings(tmp_path / "b", slurm=("nonsense=5",)))
    with pytest.raises(ValueError, match="--slurm takes KEY=VALUE"):
        run_ablate(place.study(seeds=[0]), settings(tmp_path / "c", slurm=("nonsense",)))


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subsets": [["vti"]]}, "unknown teacher 'vti': did you mean 'vit'"),
        ({"subsets": []}, "no subset of teachers to run"),
        ({"subsets": "every"}, "unknown subsets 'every'"),
        ({"sizes": [3]}, "sizes are from 1 to 2, received 3"),
        ({"seeds": []}, "must be different numbers"),
        ({"teachers": {}}, "has no teachers"),
        ({"axes": {"rate": {}}}, "axis 'rate' .* needs levels"),
        ({"axes": {"rate": {"a": {"model.dropper.q": 1}}}}, "dropper"),
        ({"axes": {"rate": {"a": {"modle.lr_batch": 1}}}}, "modle"),
        ({"axes": {"../x": {"a": {"model.lr_batch": 1}}}}, "becomes the name of a folder"),
        ({"tasks": "nothing-here"}, "unknown task file 'nothing-here'"),
        ({"base": "nothing-here"}, "unknown config 'nothing-here'"),
        ({"budget": 3}, "unknown setting 'budget'"),
        ({"halving": {"budgets": [3, 1]}}, "ascending budgets"),
        ({"cache": {"dtype": "int4"}}, "dtype"),
        ({"settings": {"data.train_views.recorded": None}}, "needs views that come back"),
    ],
)
def test_a_mistake_is_said_before_work_begins(
    change: dict[str, Any], words: str, place: Place, tmp_path: Path, scored: list[str]
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        run_ablate(place.study("wrong", **change), settings(tmp_path / "out"))
    assert "\n" not in str(error.value).strip()
    assert not scored
    assert not (tmp_path / "out").exists()


def test_many_runs_are_asked_for(place: Place, tmp_path: Path, scored: list[str]) -> None:
    study = place.study("many", seeds=list(range(400)))
    with pytest.raises(ValueError, match="has 1200 runs, more than its limit of 50: add --yes"):
        run_ablate(study, settings(tmp_path))
    confirm(1200, 50, yes=True)
    assert not scored


def test_another_study_in_the_folder_is_refused(
    place: Place, tmp_path: Path, scored: list[str]
) -> None:
    run_ablate(place.study(seeds=[0]), settings(tmp_path))
    with pytest.raises(ValueError, match=r"trainer\.max_epochs = 1, and here it is 2"):
        run_ablate(place.study(seeds=[0]), settings(tmp_path, changes=("trainer.max_epochs=2",)))
    scored.clear()
    run_ablate(place.study(seeds=[0, 5]), settings(tmp_path))  # more of the same is fine
    assert all("seed=5" in name for name in scored)
    assert len(scored) == 4


def test_the_command_says_one_sentence(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["ablate", place.study(), "--out", str(file)]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert main(["ablate", "fashion_mnst", "--out", str(tmp_path / "o")]) == 2
    assert "did you mean 'fashion_mnist'" in capsys.readouterr().err
    assert main(["ablate", place.study(), "--out", str(tmp_path / "o"), "--seeds", "a"]) == 2
    assert "--seeds takes numbers" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_studies())
def test_every_shipped_study_plans_and_parses(name: str, tmp_path: Path) -> None:
    planner = Planner(read_study(name), tmp_path)
    read_task_file(planner.study.tasks, planner.study.data)
    combinations = planner.combinations()
    assert planned_runs(planner) <= planner.study.limits.runs
    for combination in (combinations[0], combinations[-1]):
        parse_config(planner.config(Run("run", combination, 0)))
    if name == "fashion_mnist":
        assert len(combinations) == 7
        assert planner.study.seeds == [0, 1, 2]
        assert planner.study.empty
    if name == "parts":
        assert len(combinations) * len(planner.study.seeds) == 24


# --- parts ------------------------------------------------------------------------------------


def test_subsets() -> None:
    pool = ("a", "b", "c")
    assert len(subsets_of(pool, "all")) == 7
    assert subsets_of(pool, "all", [1, 3]) == [("a",), ("b",), ("c",), pool]
    assert subsets_of(pool, "leave-one-out") == [("a", "b"), ("a", "c"), ("b", "c"), pool]
    assert subsets_of(pool, "add-one") == [("a",), ("b",), ("c",), pool]
    assert subsets_of(pool, [["c", "a"], ["a", "c"], ["b"]]) == [("b",), ("a", "c")]


def test_dotted_keys() -> None:
    config = {"model": {"class_path": "M", "init_args": {"dropper": None, "list": [{"a": 1}]}}}
    put(config, "model.dropper.p", 0.5)
    put(config, "model.list.0.a", 2)
    put(config, "trainer.max_epochs", 3)
    assert config["model"]["init_args"] == {"dropper": {"p": 0.5}, "list": [{"a": 2}]}
    assert get(config, "trainer.max_epochs") == 3
    assert get(config, "model.nothing.at.all") is None
    with pytest.raises(ValueError, match="has no settings"):
        put(config, "trainer.max_epochs.x", 1)
    with pytest.raises(ValueError, match="no place in a list"):
        put(config, "model.list.7.a", 1)


def test_a_process_that_dies_is_blamed_on_its_run(place: Place, tmp_path: Path) -> None:
    planner = Planner(read_study(place.study()), tmp_path)
    folder = StudyFolder(tmp_path)
    runs = planner.runs(planner.combinations())
    folder.write_plan(planner, runs)
    folder.mark(runs[1], True)
    Processes(folder)._blame(runs, -9)
    assert folder.failures(runs[1]) == ["the process that worked on it ended with code -9"]
    assert not any(folder.failures(run) for run in runs if run != runs[1])
    with pytest.raises(ValueError, match="--processes must be 1 or more"):
        Processes(folder, 0)
    with folder.claim(runs[0]) as first:
        assert first
    assert commands.split_seeds("3,1") == (3, 1)
