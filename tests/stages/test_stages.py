"""Chains: run, killed, gone on with, refused before anything trains."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
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
from multikd.config_files import load_config
from multikd.runs.folder import CONFIG
from multikd.runs.overrides import get
from multikd.runs.process import fit_in_process
from multikd.runs.trainer import own_folder
from multikd.shipped import find_chain, shipped_chains
from multikd.stages import run
from multikd.stages.chain import read_chain
from multikd.stages.check import check_chain
from multikd.stages.commands import StagesSettings, run_stages, split_changes
from multikd.stages.plan import stage_config


def settings(out: Path, **change: Any) -> StagesSettings:
    return StagesSettings(out, progress=False, **change)


@pytest.mark.slow
def test_a_chain_trains_every_stage_on_what_the_earlier_ones_exported_however_often_it_is_stopped(
    place: Place, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = str(place.root / "tasks.yaml")
    chain, out = write_chain(place, tmp_path / "chain.yaml", tasks=tasks), tmp_path / "whole"
    text, figures = run_stages(chain, settings(out))
    assert here == ["first", "larger"] == [entry["stage"] for entry in figures["stages"]]
    assert all(set(entry["scores"]) == {"knn", "map"} for entry in figures["stages"])
    assert "knn" in text
    # The exports are plain timm models; the last one began with the first's weights, resampled.
    assert timm.create_model(f"local-dir:{out / 'larger' / 'export'}", pretrained=True)
    config = yaml.safe_load((out / "larger" / "config.yaml").read_text())
    student = config["model"]["init_args"]["student"]["init_args"]
    assert student["checkpoint"] == str(out / "first" / "export")
    before = load_file(out / "first" / "export" / "model.safetensors")
    after = load_file(out / "larger" / "export" / "model.safetensors")
    assert after["pos_embed"].shape[1] > before["pos_embed"].shape[1]
    # A few small steps away, not a new random start.
    weight = "blocks.0.attn.qkv.weight"
    assert (after[weight] - before[weight]).abs().max() < 0.02 < before[weight].std() * 2
    # Again: nothing is trained. With another setting: it says which.
    here.clear()
    assert run_stages(chain, settings(out))[1] == figures
    assert here == []
    (out / "larger" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"stage 'first' has trainer.max_epochs = 2, and here"):
        run_stages(chain, settings(out, changes=("trainer.max_epochs=3",)))

    # Killed while the first trains, and stopped between the last one's training and export.
    chain, out = write_chain(place, tmp_path / "chain.yaml"), tmp_path / "stopped"
    last = out / "first" / "checkpoints" / "last.ckpt"
    # Not by fork: autograd's threads, once a test has started them, do not survive it.
    script = (
        "import sys, pathlib\n"
        "from multikd.fit import run_lightning\n"
        "from multikd.runs.folder import CONFIG\n"
        "from multikd.stages import run\n"
        "from multikd.stages.commands import StagesSettings, run_stages\n"
        "run.fit_in_process = lambda folder, packages=(): run_lightning(\n"
        "    ['fit', f'--config={folder / CONFIG}', '--resume', 'auto'])\n"
        "run_stages(sys.argv[1], StagesSettings(pathlib.Path(sys.argv[2]), progress=False))\n"
    )
    # One thread as here, for the same bits.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script, chain, str(out)], env=one_thread)
    while child.poll() is None and not last.exists():
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert last.exists()
    assert not (out / "first" / "result.json").exists()
    export = run.run_export

    def stop(checkpoint: Path, *rest: Any) -> Any:
        if checkpoint.parts[-3] == "larger":
            raise KeyboardInterrupt
        return export(checkpoint, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_export", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stages(chain, settings(out))
    assert (out / "first" / "result.json").exists()
    here.clear()
    _, figures = run_stages(chain, settings(out))
    assert here == ["larger"]
    assert all(entry["done"] for entry in figures["stages"])
    for stage in ("first", "larger"):
        one, other = (load_file(tmp_path / r / stage / "export" / "model.safetensors")
                      for r in ("whole", "stopped"))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), stage


def test_a_fit_that_fails_in_its_process_is_told_with_its_own_words(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint")
    config = load_config(str(place.root / "base.yaml"))
    own_folder(config, tmp_path)
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(
        ValueError, match=r"^none of the 1 checkpoints of this run is whole.*fit.log"
    ):
        fit_in_process(tmp_path)
    assert "Traceback" not in (tmp_path / "fit.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_once_and_the_run_saves_first(
    place: Place, tmp_path: Path, number: int, code: int
) -> None:
    config = load_config(str(place.root / "base.yaml"))
    own_folder(config, tmp_path)
    config["trainer"].update(max_epochs=100000, max_steps=-1)
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config))
    told = (
        "import signal, sys, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from multikd.runs.process import fit_in_process\n"
        "try: fit_in_process(pathlib.Path(sys.argv[1]))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
        "except Exception as error: print(error); sys.exit(getattr(error, 'exit_code', 2))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", told, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    last = tmp_path / "checkpoints" / "last.ckpt"
    while parent.poll() is None and not last.exists():
        time.sleep(0.05)
    parent.send_signal(number)
    said, _ = parent.communicate(timeout=60)
    log = (tmp_path / "fit.log").read_text()
    assert parent.returncode == code, (said, log[-2000:])
    assert "Traceback" not in log
    if number == signal.SIGTERM:
        assert (tmp_path / "checkpoints" / "preempted.ckpt").exists()
        assert "run the same command again" in said


def test_a_run_that_fails_upon_a_signal_has_failed(tmp_path: Path) -> None:
    told = (
        "import os, pathlib, signal, subprocess, sys, threading, time\n"
        "from multikd.runs import process\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "fails = 'import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: '\n"
        "fails += 'sys.exit(\"multikd: no room for the checkpoint\")); '\n"
        "fails += 'pathlib.Path(sys.argv[1], \"up\").touch(); time.sleep(60)'\n"
        "real = subprocess.Popen\n"
        "subprocess.Popen = lambda command, **more: real(\n"
        "    [sys.executable, '-c', fails, str(folder)], **more)\n"
        "def ask():\n"
        "    while not (folder / 'up').exists(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "try: process.fit_in_process(folder)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", told, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.startswith("ValueError no room for the checkpoint (code 1"), ended


@pytest.mark.slow
def test_a_chain_goes_on_however_out_is_spelt_and_only_with_what_it_was_built_on(
    place: Place, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"trainer.max_epochs": 1}
    chain, out = write_chain(place, tmp_path / "chain.yaml", settings=short), tmp_path / "o ut"
    monkeypatch.chdir(tmp_path)
    run_stages(chain, settings(Path("o ut")))
    here.clear()
    for spelling in (out, Path("./o ut"), out / ".." / "o ut"):
        run_stages(chain, settings(spelling))
    assert here == []
    # Made by a version that kept the spelling, and moved since.
    for stage in ("first", "larger"):
        config = out / stage / CONFIG
        content = json.dumps(yaml.safe_load(config.read_text()))
        config.write_text(content.replace(str(out), "before/o ut"))
    _, figures = run_stages(chain, settings(out))
    assert here == []
    assert figures["stages"][1]["export"] == str(out / "larger" / "export")
    assert "before/o ut" not in (out / "larger" / CONFIG).read_text()
    # The first stage is gone: it is made again, and is what it was, to the bit.
    shutil.rmtree(out / "first")
    text, figures = run_stages(chain, settings(out, dry_run=True))
    assert "built on another first" in " ".join(text.split())
    assert figures["stages"][1]["built_on_another"] == "first"
    run_stages(chain, settings(out))
    assert here == ["first"]
    # Another one: what was built on the former one is not of this chain.
    shutil.rmtree(out / "first")
    other = settings(out, changes=("first:seed_everything=7",))
    with pytest.raises(ValueError, match="'larger'.*built on another 'first'.*remove .*larger"):
        run_stages(chain, other)
    shutil.rmtree(out / "larger")
    here.clear()
    assert all(entry["done"] for entry in run_stages(chain, other)[1]["stages"])
    assert here == ["larger"]
    # An export that is to be another is no longer done, either.
    stages = yaml.safe_load(Path(chain).read_text())["stages"]
    stages["larger"]["export"] = {"heads": ["first"]}
    chain = write_chain(place, tmp_path / "chain.yaml", settings=short, stages=stages)
    with pytest.raises(ValueError, match="'larger'.*was exported with .*result.json"):
        run_stages(chain, other)
    (out / "larger" / "result.json").unlink()
    run_stages(chain, other)
    assert (out / "larger" / "export" / "heads.json").is_file()


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
    ({"a": {"settings": {"model.teachers.vit.encoder": "exported:/nowhere"}}},
     r"'a'.*model.teachers.vit.encoder names the export '/nowhere', which is not there"),
    ({"a": {"export": {"classifier": True}}},
     r"export.classifier is set, and its student has none"),
    ({"a": {"settings": {"model.student.name.size": 1}}}, r"stage 'a'.*has no settings"),
    ({"a": {"setting": {}}}, r"unknown setting 'setting': did you mean 'settings'\?"),
    ({"a/b": None}, r"becomes the name of a folder"),
    ({"lock": None}, r"can't be called 'lock'"),
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
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"larger .* first ", text)
    assert "2 epochs" in text
    bound = ["--set", "trainer.max_steps=-1", "--dry-run"]
    assert main(["stages", chain, "--out", str(tmp_path / "out"), *bound]) == 0
    assert "2 epochs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.touch()
    for arguments, said in (
        (["--out", str(file)], "is a file"),
        (["--out", "x", "--set", "trainer"], "or STAGE:KEY="),
        (["--out", "x", "--set", "firts:trainer.max_epochs=1"], "did you mean 'first'?"),
    ):
        assert main(["stages", chain, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert split_changes(["a:b=[1]", "c=x"]) == {"a:b": [1], "c": "x"}


def test_the_command_in_dune_s_header_names_what_a_user_must_bring(tmp_path: Path) -> None:
    header = [line[1:].strip() for line in find_chain("dune_vitb14").read_text().splitlines()
              if line.startswith("#")]  # fmt: skip
    begin = next(i for i, line in enumerate(header) if line.startswith("multikd stages"))
    words = shlex.split(
        " ".join(line.rstrip("\\") for line in header[begin : header.index("", begin)])
    )
    changes = split_changes([words[i + 1] for i, word in enumerate(words) if word == "--set"])
    chain = read_chain("dune_vitb14", changes)
    for stage in chain.stages:
        config = stage_config(chain, stage, tmp_path)
        assert get(config, "model.teachers.mast3r.encoder") == "onnx:mast3r_encoder.onnx"
        assert get(config, "model.teachers.multihmr.encoder.checkpoint") == "multihmr_672_L.pt"
        assert get(config, "data.train.multihmr.urls") == "HUMANS/{0000..0399}.tar"


@pytest.mark.parametrize("name", [n for n in shipped_chains() if n.endswith("_tiny")])
def test_shipped_chains_build(name: str, tmp_path: Path) -> None:
    shapes = check_chain(read_chain(name), tmp_path / "out", data=False)
    assert all(shape.parameters > 0 for shape in shapes.values())
    json.dumps([shape.to_json() for shape in shapes.values()])
    assert not (tmp_path / "out").exists()
