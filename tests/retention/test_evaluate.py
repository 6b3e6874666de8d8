"""``multikd evaluate`` through the command line: what it writes, and every mistake's sentence."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.fitting import Run
from PIL import Image
from retention.conftest import write_folder
from torch import Tensor, nn

from multikd.cli import main
from multikd.evaluation.knn_task import KNN
from multikd.evaluation.task import Subject, TaskResult
from multikd.retention.taskfile import read_task_file
from multikd.shipped import shipped_tasks
from multikd.types import EncoderSpec, TokenFeatures, Widths

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def tasks(photos: Path, tmp_path: Path) -> Callable[..., str]:
    """A task file, with changes."""

    def write(change: Change = lambda content: None) -> str:
        content = {
            "data": {
                "photos": {
                    "train": str(photos / "train"),
                    "test": str(photos / "test"),
                    "size": 32,
                }
            },
            "tasks": {"knn": {"protocol": "KNN", "data": "photos", "ks": [5]}},
        }
        change(content)
        path = tmp_path / "tasks.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def evaluate(*args: object, out: Path) -> int:
    return main(
        [
            "evaluate",
            *map(str, args),
            f"--out={out / 'out'}",
            f"--cache={out / 'cache'}",
            "--device=cpu",
            "--no-cost",
        ]
    )


def test_a_checkpoint_against_its_teachers(run: Run, tasks, tmp_path: Path, capsys) -> None:
    given = [run.checkpoint, "--tasks", tasks(), "--with-teachers", "--json", tmp_path / "x.json"]
    assert evaluate(*given, out=tmp_path) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [encoder["name"] for encoder in results["encoders"]]
    assert names == ["student", "student+net", "student+vit", "net", "vit"]
    assert {cell["encoder"] for cell in results["cells"]} == set(names)
    assert all(cell["error"] is None for cell in results["cells"])
    assert results["matrix"][0]["best_teacher"] in ("vit", "net")
    assert json.loads((tmp_path / "x.json").read_text()) == results
    # One pass of the student for it and its heads, and one of each teacher, over 42 + 21 images.
    for word in ("knn", "student", "results.json", "report.html", f"{3 * 63} images run"):
        assert word in text, word
    with (tmp_path / "out" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    # Again: nothing is replaced unasked, and then nothing is extracted.
    assert evaluate(*given[:-2], out=tmp_path) == 2
    assert "holds earlier results" in capsys.readouterr().err
    assert evaluate(*given[:-2], "--overwrite", out=tmp_path) == 0
    said = capsys.readouterr().out
    assert "all features from the cache; 5 of 5 cells from an earlier run" in said
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    for cell in (*again["cells"], *results["cells"]):
        del cell["seconds"]
    for part in ("cells", "matrix", "mean", "tasks"):
        assert again[part] == results[part], part


def test_an_unreadable_image_is_counted_and_named(run: Run, tasks, tmp_path: Path, capsys) -> None:
    root = write_folder(tmp_path / "test", {"ash": 4, "elm": 4, "oak": 4})
    (root / "elm" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    given = [run.checkpoint, "--heads=none", "--no-pictures", "--tasks", tasks()]
    assert evaluate(*given, f"--data=photos.test={root}", out=tmp_path) == 0
    assert "1 unreadable of photos/test, left out for every encoder: elm/001.png" in (
        capsys.readouterr().out
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["unreadable"] == {"photos/test": ["elm/001.png"]}
    assert results["tasks"][0]["images"]["test"] == 11


def masks(tmp_path: Path, width: int, value: int = 1) -> str:
    for folder, pixels in (
        ("i", np.zeros((32, 32, 3), np.uint8)),
        ("m", np.full((32, width), value, np.uint8)),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / folder / "x.png")
    return f"masks:{tmp_path / 'i'}:{tmp_path / 'm'}"


def renamed(root: Path, target: Path, pairs: dict[str, str | None]) -> str:
    """A copy of an image folder with classes renamed, or left out."""
    shutil.copytree(root, target)
    for old, new in pairs.items():
        if new is None:
            shutil.rmtree(target / old)
        else:
            (target / old).rename(target / new)
    return str(target)


def photo(**changes: object) -> Change:
    return lambda content: content["data"]["photos"].update(changes)


def task(**changes: object) -> Change:
    return lambda content: content["tasks"]["knn"].update(changes)


MISTAKES: dict[str, tuple[Callable[[Path, Path], Change], list[str], str]] = {
    "labels outside the list": (
        lambda photos, tmp: photo(classes=["ash", "elm"]),
        [],
        "unknown class 'oak'",
    ),
    "one image of a class": (
        lambda photos, tmp: (
            lambda content: (
                content["tasks"]["knn"].clear(),
                content["tasks"]["knn"].update(protocol="LinearProbe", data="photos"),
                content["data"]["photos"].update(
                    train=str(write_folder(tmp / "few", {"ash": 5, "elm": 5, "oak": 1}))
                ),
            )
        ),
        [],
        "oak",
    ),
    "test class missing in train": (
        lambda photos, tmp: photo(
            train=renamed(photos / "train", tmp / "t", {"oak": None}), classes=["ash", "elm", "oak"]
        ),
        [],
        "oak.* has no image in photos/train",
    ),
    "test class nobody knows": (
        lambda photos, tmp: photo(test=renamed(photos / "test", tmp / "t", {"oak": "yew"})),
        [],
        "unknown class 'yew'",
    ),
    "empty split": (
        lambda photos, tmp: ((tmp / "none").mkdir(), photo(test=str(tmp / "none")))[1],
        [],
        "photos/test: the folder .* holds no images",
    ),
    "no test split": (lambda photos, tmp: photo(test=None), [], "needs a test split"),
    "wrong mask size": (
        lambda photos, tmp: (
            lambda content: content.update(
                data={"photos": {"train": masks(tmp, 20), "test": masks(tmp, 20), "size": 32}},
                tasks={"s": {"protocol": "LinearSegmentation", "data": "photos"}},
            )
        ),
        [],
        "mask of x is 20×32 and its image 32×32",
    ),
    "no patch tokens": (
        lambda photos, tmp: (
            lambda content: content.update(
                data={"photos": {"train": masks(tmp, 32), "test": masks(tmp, 32), "size": 32}},
                tasks={"s": {"protocol": "LinearSegmentation", "data": "photos"}},
            )
        ),
        [],
        "reads patch tokens, which the encoder 'pooled' does not have",
    ),
    "head that is not there": (
        lambda photos, tmp: lambda content: None,
        ["--heads=nett"],
        "unknown head 'nett': did you mean 'net'",
    ),
    "metadata column that is not there": (
        lambda photos, tmp: task(groups=["camera"]),
        [],
        "camera",
    ),
    "metadata table that is not there": (
        lambda photos, tmp: photo(metadata=str(tmp / "none.csv")),
        [],
        "there is no table",
    ),
    "unknown protocol": (lambda photos, tmp: task(protocol="KNM"), [], "did you mean 'KNN'"),
    "unknown setting": (
        lambda photos, tmp: task(temperature=1),
        [],
        "KNN has no setting 'temperature'.*did you mean temperatures",
    ),
    "unknown data set": (lambda photos, tmp: task(data="photo"), [], "did you mean 'photos'"),
    "wrong type": (lambda photos, tmp: photo(size="large"), [], "size"),
    "unknown section": (lambda photos, tmp: lambda c: c.update(probes={}), [], "no task file"),
    "unknown setting of data": (lambda photos, tmp: photo(tset="x"), [], "tset"),
    "no such file": (lambda photos, tmp: lambda c: None, ["--tasks=deno"], "did you mean 'demo'"),
    "no such device": (lambda photos, tmp: lambda c: None, ["--device=cuda"], "no CUDA device"),
    "size that is not taken": (lambda photos, tmp: photo(size=0), [], "at least 1 pixel"),
    "data change without a set": (
        lambda photos, tmp: lambda c: None,
        ["--data=pho.test=x"],
        "unknown data set 'pho'",
    ),
    "compare with encoders": (
        lambda photos, tmp: lambda c: None,
        ["--compare", "a.json", "b.json"],
        "leave out encoders",
    ),
    "not writable": (
        lambda photos, tmp: ((tmp / "file").write_text(""), lambda c: None)[1],
        ["--cache={tmp}/file/x"],
        "can't be written to",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_before_anything_is_extracted(
    name: str, run: Run, photos: Path, tasks, tmp_path: Path, capsys, monkeypatch
) -> None:
    change, extra, words = MISTAKES[name]
    path = tasks(change(photos, tmp_path))
    # The quickest encoder there is; only for heads it takes a checkpoint.
    encoder = run.checkpoint if "head" in name else "pooled=retention.test_evaluate.Pooled"
    given = [encoder, "--tasks", path, *(arg.format(tmp=tmp_path) for arg in extra)]
    if "--device=cuda" in extra:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "multikd.retention.run.extract_all", lambda *_: pytest.fail("extraction began")
    )
    code = main(
        ["evaluate", f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}", *map(str, given)]
    )
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("multikd: ")]
    assert code == 2, captured.err
    assert len(said) == 1
    assert "Traceback" not in captured.err
    assert re.search(words, said[0]), said[0]
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_one_line_and_the_next_run_goes_on(
    run: Run, tasks, tmp_path: Path, capsys, monkeypatch
) -> None:
    from multikd.retention import store as store_module
    from multikd.retention.encoders import CheckpointNetwork

    monkeypatch.setattr(store_module, "SHARD_ROWS", 8)
    forward, seen = CheckpointNetwork.forward, []

    def stop(self, images):
        seen.append(len(images))
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, images)

    given = [run.checkpoint, "--heads=none", "--no-pictures", "--tasks", tasks(), "--batch-size=8"]
    monkeypatch.setattr(CheckpointNetwork, "forward", stop)
    assert evaluate(*given, out=tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "multikd: interrupted; run the same command again to go on"
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(CheckpointNetwork, "forward", forward)
    assert evaluate(*given, out=tmp_path) == 0
    # 42 + 21 images; three batches of eight were kept.
    assert f"{42 + 21 - 24} images run" in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_tasks())
def test_shipped_task_files_are_whole(name: str) -> None:
    found = read_task_file(name)
    assert found.tasks
    assert found.path.read_text(encoding="utf-8").startswith("# ")


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--with-teachers", "--tasks demo", "--compare", "--drift", "goes on where"):
        assert word in text


class Pooled(nn.Module):
    """Made by ``retention.test_evaluate.Pooled``: an encoder of one vector an image."""

    spec = EncoderSpec("mean", Widths(3, None), (32, 32), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def forward(self, images: Tensor) -> TokenFeatures:
        return TokenFeatures(images.mean(dim=(2, 3)))


class Broken(KNN):
    """A task that fails where it scores."""

    def score(self, subject: Subject) -> TaskResult:
        raise ValueError("no luck today")


def test_a_task_that_fails_costs_its_cell_and_the_exit_code(tasks, tmp_path: Path, capsys) -> None:
    """The others are scored and written all the same."""
    broken = {"protocol": f"{__name__}.Broken", "data": "photos", "ks": [5]}
    file = tasks(lambda content: content["tasks"].update(broken=broken))
    code = evaluate("packaged:efficientnet_lite0", "--tasks", file, "--no-cost", out=tmp_path)
    assert code == 1
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert {cell["task"]: cell["error"] for cell in cells} == {
        "knn": None,
        "broken": "no luck today",
    }
    assert "no luck today" in capsys.readouterr().out
