"""Chains: run, killed, gone on with, refused before anything trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from ablation.conftest import Place
from safetensors.torch import load_file
from stages.conftest import teacher, write_chain

from multikd.cli import main
from multikd.fit import run_lightning
from multikd.shipped import shipped_chains
from multikd.stages.chain import read_chain
from multikd.stages.check import check_chain
from multikd.stages.commands import StagesSettings, run_stages, split_changes


def settings(out: Path, **change: Any) -> StagesSettings:
    return StagesSettings(out, progress=False, **change)


@pytest.mark.slow
def test_a_chain_trains_every_stage_on_what_the_earlier_ones_exported(
    place: Place, tmp_path: Path, here: list[str]
) -> None:
    chain, out = write_chain(place, tmp_path / "chain.yaml"), tmp_path / "out"
    text, figures = run_stages(chain, settings(out))
    assert here == ["first", "second", "larger"]
    assert [entry["stage"] for entry in figures["stages"]] == here
    assert all(set(entry["scores"]) == {"knn", "map"} for entry in figures["stages"])
    assert "knn" in text
    # The exports are plain timm models; the last one began with the second's weights, resampled.
    assert timm.create_model(f"local-dir:{out / 'larger' / 'export'}", pretrained=True)
    config = yaml.safe_load((out / "larger" / "config.yaml").read_text())
    student = config["model"]["init_args"]["student"]["init_args"]
    assert student["checkpoint"] == str(out / "second" / "export")
    before = load_file(out / "second" / "export" / "model.safetensors")
    after = load_file(out / "larger" / "export" / "model.safetensors")
    assert after["pos_embed"].shape[1] > before["pos_embed"].shape[1]
    # Three steps of 1e-3 and less away, not a new random start.
    weight = "blocks.0.attn.qkv.weight"
    assert (after[weight] - before[weight]).abs().max() < 0.02 < before[weight].std() * 2
    # A teacher's features are those of the export.
    log = (out / "second" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "first" in log.splitlines()[0]
    # Again: nothing is trained. With another setting: it says which.
    here.clear()
    assert run_stages(chain, settings(out))[1] == figures
    assert here == []
    (out / "second" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"stage 'second' has trainer.max_epochs = 1, and here"):
        run_stages(chain, settings(out, changes=("trainer.max_epochs=2",)))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(
    place: Place, tmp_path: Path, here: list[str]
) -> None:
    """By real processes: the whole tree is killed in each stage; weights are as of one run."""
    two = {"first": None, "second": {"settings": {"model.teachers": teacher("first")}}}
    chain = write_chain(place, tmp_path / "chain.yaml", stages=two, tasks=None,
                        settings={"trainer.max_epochs": 3})  # fmt: skip
    run_stages(chain, settings(tmp_path / "whole"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "multikd", "stages", chain, "--out", str(out)]
    for stage in ("first", "second"):
        last = out / stage / "checkpoints" / "last.ckpt"
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and not last.exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert last.exists(), stage
    here.clear()
    _, figures = run_stages(chain, settings(out))
    assert here[-1] == "second"
    assert all(entry["done"] for entry in figures["stages"])
    for stage in ("first", "second"):
        one, other = (load_file(tmp_path / r / stage / "export" / "model.safetensors")
                      for r in ("whole", "out"))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), stage


def test_interrupted_between_training_and_export(
    place: Place, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = write_chain(place, tmp_path / "chain.yaml", stages={"first": None}, tasks=None)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multikd.stages.run.run_export", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stages(chain, settings(tmp_path / "out"))
    assert not (tmp_path / "out" / "first" / "result.json").exists()
    _, figures = run_stages(chain, settings(tmp_path / "out"))
    assert figures["stages"][0]["done"]


def test_a_stage_that_fails_is_told_with_its_own_words(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the process of its own: its sentence comes back, and what is done stays."""
    chain = write_chain(place, tmp_path / "chain.yaml", stages={"first": None}, tasks=None)
    out = tmp_path / "out"
    folder = out / "first"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint")
    assert main(["stages", chain, "--out", str(out)]) == 2
    said = capfd.readouterr().err
    assert "the stage 'first' failed: none of the 1 checkpoints of this run is whole" in said
    assert "Traceback" not in (folder / "fit.log").read_text()


# --- refused before anything trains -----------------------------------------------------------


STAGES: list[tuple[dict[str, Any], str]] = [
    ({"a": {"settings": {"model.student.checkpoint": "{stage:b}"}},
      "b": {"settings": {"model.teachers": teacher("a")}}}, r"in a circle: a → b → a|b → a → b"),
    ({"a": {"settings": {"model.teachers": teacher("asistant")}}, "assistant": None},
     r"unknown stage 'asistant': did you mean 'assistant'\?"),
    ({"a": None, "b": {"settings": {"model.student.checkpoint": "{stage:a:weights}"}}},
     r"unknown kind 'weights'"),
    ({"a": None, "b": {"settings": {"model.student.checkpoint": "{stage:a}",
                                    "model.student.model_args": {"embed_dim": 32}}}},
     r"'b'.*begins with that of the stage 'a', whose features are 64 wide and its own 32"),
    ({"a": None, "b": {"settings": {"model.student.checkpoint": "{stage:a}",
                                    "model.student.model_args": {"depth": 7}}}},
     r"the stage 'a' does not fit VisionTransformer: it lacks 'blocks.6"),
    ({"a": {"settings": {"model.teachers.vit.encoder": "exported:/nowhere",
                         "model.teachers.vit.checkpoint": None}}},
     r"'a'.*model.teachers.vit.encoder names the export '/nowhere', which is not there"),
    ({"a": {"settings": {"model.student.checkpoint": "lost.pth"}}},
     r"model.student.checkpoint names 'lost.pth', which is not there"),
    ({"a": {"export": {"classifier": True}}}, r"export.classifier is set, and its student has none"),
    ({"a": {"settings": {"model.dropper.q": 1}}}, r"stage 'a'"),
    ({"a": {"settings": {"model.student.name.size": 1}}}, r"stage 'a'.*has no settings"),
    ({"a": {"setting": {}}}, r"unknown setting 'setting': did you mean 'settings'\?"),
    ({"a/b": None}, r"becomes the name of a folder"),
    ({}, r"has no stages"),
    ({"a": {"base": "no_such"}}, r"stage 'a'.*unknown config 'no_such'"),
    ({"a": {"settings": {"data.train": "nowhere/"}}}, r"stage 'a'"),
]  # fmt: skip


@pytest.mark.parametrize("stages, said", STAGES)
def test_what_can_be_known_is_said_before_anything_trains(
    place: Place, tmp_path: Path, here: list[str], stages: dict[str, Any], said: str
) -> None:
    chain = write_chain(place, tmp_path / "chain.yaml", stages=stages)
    with pytest.raises(ValueError, match=said) as error:
        run_stages(chain, settings(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert here == []
    assert not (tmp_path / "out").exists()


def test_of_the_command(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = write_chain(place, tmp_path / "chain.yaml")
    assert main(["stages", chain, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert re.search(r"larger .* first, second", " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.touch()
    for arguments, said in (
        (["--out", str(file)], "is a file"),
        (["--out", "x", "--set", "trainer"], "--set takes KEY=VALUE"),
        (["--out", "x", "--set", "firts:trainer.max_epochs=1"], "did you mean 'first'?"),
    ):
        assert main(["stages", chain, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert split_changes(["a:b=[1]", "c=x"]) == {"a:b": [1], "c": "x"}


@pytest.mark.parametrize("name", shipped_chains())
def test_shipped_chains_build(name: str, tmp_path: Path) -> None:
    shapes = check_chain(read_chain(name), tmp_path / "out", data=False)
    assert all(shape.parameters > 0 for shape in shapes.values())
    json.dumps([shape.to_json() for shape in shapes.values()])
    assert not (tmp_path / "out").exists()


def test_the_fit_of_a_stage_is_an_ordinary_one(
    place: Place, tmp_path: Path, here: list[str]
) -> None:
    """The config in its folder alone gives the same student."""
    chain = write_chain(place, tmp_path / "chain.yaml", stages={"first": None}, tasks=None)
    run_stages(chain, settings(tmp_path / "out"))
    folder = tmp_path / "out" / "first"
    last = folder / "checkpoints" / "last.ckpt"
    expected = torch.load(last, weights_only=True)["state_dict"]
    last.unlink()
    run_lightning(["fit", f"--config={folder / 'config.yaml'}"])
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(expected[key], again[key]) for key in expected)
