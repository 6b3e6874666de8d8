"""Files that are not what they should be: one sentence each, nothing run, nothing written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import layouts

from multikd.backbones.unpickle import Inert, read_torch_file
from multikd.backbones.weights import read_state_dict
from multikd.cli import main
from multikd.published.commands import ImportSettings, run_import
from multikd.published.vit import Asked
from multikd.students import StudentEncoder

QUIET = ImportSettings(cost=False)


class Harmful:
    """Pickled as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says; one line, exit code 2."""
    assert main(["import", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("place", ["beside", "inside args", "as the weights"])
def test_code_in_a_file_never_runs(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, _ = layouts.unic_file()
    trace = tmp_path / "trace"
    if place == "beside":
        content["extra"] = Harmful(trace)
    elif place == "inside args":
        content["args"].extra = Harmful(trace)
    else:
        content["model"] = Harmful(trace)
    torch.save(content, tmp_path / "bad.pth")
    message = refused(capsys, tmp_path / "bad.pth", "--out", tmp_path / "out")
    assert "without executing pickled code" in message
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_a_namespace_and_its_arrays_are_read_as_values(tmp_path: Path) -> None:
    """NumPy is not called: a stored dtype could be made up so that it follows pointers."""
    arrays = {"array": np.arange(4.0), "scalar": np.float64(2), "objects": np.array([{}], object)}
    content = {
        "args": argparse.Namespace(size=32, names=["a"], **arrays),
        "model": {"w": torch.ones(2)},
    }
    torch.save(content, tmp_path / "file.pth")
    found = read_torch_file(tmp_path / "file.pth")
    assert found["args"].size == 32
    assert found["args"].names == ["a"]
    assert all(isinstance(getattr(found["args"], name), Inert) for name in arrays)
    assert list(read_state_dict(tmp_path / "file.pth")) == ["w"]


def test_a_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "unic.pth"
    torch.save(layouts.unic_file()[0], file)
    whole = file.read_bytes()
    for share in (0.0, 0.3, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        message = refused(capsys, file, "--out", tmp_path / "out")
        assert str(file) in message
    assert not (tmp_path / "out").exists()
    assert "no file at" in refused(capsys, tmp_path / "absent", "--out", tmp_path / "out")


def test_other_layouts_say_what_was_expected_and_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "other.pth", tmp_path / "out"
    torch.save({"model": {"conv1.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}}, file)
    message = refused(capsys, file, "--out", out)
    assert "expected one of (unic: " in message
    assert "found conv1.weight, fc.bias" in message
    for kind in ("unic", "dune", "theia", "radio", "eupe"):
        message = refused(capsys, file, "--out", out, "--kind", kind)
        assert "expected" in message
        assert "found conv1.weight" in message
    assert "did you mean 'radio'" in refused(capsys, file, "--out", out, "--kind", "radoi")
    torch.save({"model": {"epochs": 3}}, file)
    assert "holds no tensors" in refused(capsys, file, "--out", out)
    assert not out.exists()


def test_one_publishers_file_is_not_anothers(tmp_path: Path) -> None:
    files = {
        "unic": layouts.unic_file()[0],
        "dune": layouts.dune_file()[0],
        "theia": layouts.theia_file()[0],
        "radio": layouts.radio_file()[0],
        "eupe": layouts.eupe_file(),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        for kind in set(files) - {name}:
            with pytest.raises(ValueError, match="expected"):
                run_import(tmp_path / f"{name}.pth", tmp_path / "out", ImportSettings(kind=kind))


@pytest.mark.parametrize("change", ["missing", "left over", "shape", "second chunk", "not square"])
def test_a_damaged_unic_file(change: str, tmp_path: Path) -> None:
    content, _ = layouts.unic_file()
    model, at = content["model"], "module.encoder."
    if change == "missing":
        del model[f"{at}blocks.0.1.mlp.fc2.bias"]
    elif change == "left over":
        model[f"{at}blocks.0.1.attn.q_norm.weight"] = torch.ones(64)
    elif change == "shape":
        model[f"{at}norm.weight"] = torch.ones(5)
    elif change == "second chunk":
        model[f"{at}blocks.1.1.mlp.fc2.bias"] = model.pop(f"{at}blocks.0.1.mlp.fc2.bias")
    else:
        model[f"{at}pos_embed"] = torch.ones(1, 6, 128)
    torch.save(content, tmp_path / "unic.pth")
    with pytest.raises(ValueError, match="does not fit|expected") as raised:
        run_import(tmp_path / "unic.pth", tmp_path / "out", QUIET)
    assert "unic.pth" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    content, _ = layouts.unic_file()
    content["model"]["module.encoder.norm.bias"][3] = torch.nan
    torch.save(content, tmp_path / "unic.pth")
    with pytest.raises(ValueError, match="finite"):
        run_import(tmp_path / "unic.pth", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "blocks.0.attn.qkv.parametrizations.weight.original"}, "spectral"),
        ({"normaliser": "_feature_normalizer.mean"}, "radio_v2.5-h-norm"),
        ({"scaled_ln": True}, "'scaled_ln'"),
        ({"model": "vit_odd_patch16_224", "num_heads": None}, "--num-heads"),
    ],
)
def test_radios_that_a_timm_folder_cannot_hold(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content, _ = layouts.radio_file()
    state, arguments = content["state_dict"], content["args"]
    if "name" in change:
        state[f"base_model.{change['name']}"] = torch.ones(2)
    elif "normaliser" in change:
        state[change["normaliser"]] = torch.ones(2)
    elif "model" in change:
        arguments.model = change["model"]
        del arguments.model_kwargs["num_heads"]
    else:
        arguments.model_kwargs |= change
    torch.save(content, tmp_path / "radio.tar")
    with pytest.raises(ValueError, match=message):
        run_import(tmp_path / "radio.tar", tmp_path / "out", QUIET)


def test_questions_that_a_file_cannot_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    radio, unic, out = tmp_path / "radio.tar", tmp_path / "unic.pth", tmp_path / "out"
    torch.save(layouts.radio_file()[0], radio)
    torch.save(layouts.unic_file()[0], unic)
    asked = (radio, "--out", out)
    assert "did you mean 'clip'" in refused(capsys, *asked, "--image-size=64", "--summary=clop")
    assert "up to 128" in refused(capsys, *asked, "--image-size=256")
    assert "multiple of the patch of 16" in refused(capsys, *asked, "--image-size=70")
    assert "does not apply" in refused(capsys, unic, "--out", out, "--image-size=64")
    assert "does not apply" in refused(capsys, unic, "--out", out, "--summary=dino")
    assert "7 heads do not divide" in refused(capsys, unic, "--out", out, "--num-heads=7")
    assert "1 or more" in refused(capsys, unic, "--out", out, "--num-heads=0")
    out.mkdir()
    assert "exists already" in refused(capsys, unic, "--out", out)
    assert "not an earlier export" in refused(capsys, unic, "--out", out, "--overwrite")
    assert not list(out.iterdir())


def test_dinov3s_own_files_are_not_taken_for_eupe(tmp_path: Path) -> None:
    found = layouts.eupe_file()
    torch.save(found, tmp_path / "vitb16_pretrain.pth")
    with pytest.raises(ValueError, match="--kind eupe"):
        run_import(tmp_path / "vitb16_pretrain.pth", tmp_path / "out", QUIET)
    del found["blocks.0.attn.qkv.bias_mask"]
    torch.save(found, tmp_path / "eupe.pth")
    with pytest.raises(ValueError, match="keys' bias"):
        run_import(tmp_path / "eupe.pth", tmp_path / "out", QUIET)
    found = layouts.eupe_file()
    found["rope_embed.periods"] = found["rope_embed.periods"] * 2
    torch.save(found, tmp_path / "eupe.pth")
    with pytest.raises(ValueError, match="rotary periods"):
        run_import(tmp_path / "eupe.pth", tmp_path / "out", QUIET)


def test_a_killed_import_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(layouts.unic_file()[0], tmp_path / "unic.pth")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("multikd.published.commands.write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        run_import(tmp_path / "unic.pth", tmp_path / "out", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["unic.pth"]


def test_a_students_checkpoint_may_hold_arrays_beside_its_weights(tmp_path: Path) -> None:
    """A released file as it is, as a student's start: its names do not fit, and it says so."""
    content, _ = layouts.unic_file()
    torch.save(content, tmp_path / "unic.pth")
    with pytest.raises(ValueError, match="does not fit"):
        StudentEncoder("vit_tiny_patch16_224", checkpoint=str(tmp_path / "unic.pth"))
    asked = ImportSettings(cost=False, asked=Asked(num_heads=4))
    _, figures = run_import(tmp_path / "unic.pth", tmp_path / "out", asked)
    assert figures["model_args"]["num_heads"] == 4
