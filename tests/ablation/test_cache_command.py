"""``multikd cache`` and ``fit`` on what it kept, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ablation.conftest import Place

from multikd.cache_command import run_cache, size_on_disk
from multikd.cli import main
from multikd.data.cache import FeatureCache
from multikd.fit import build_cli, run_lightning, without_known_noise
from multikd.teachers import base
from multikd.teachers.kept import KeptTeacher


def config(place: Place, folder: Path, **data: Any) -> str:
    content = yaml.safe_load((place.root / "base.yaml").read_text(encoding="utf-8"))
    content["data"]["init_args"] |= data
    content["trainer"] |= {"default_root_dir": str(folder), "logger": False,
                           "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_the_dry_run_writes_nothing_and_is_right(place: Place, tmp_path: Path) -> None:
    path, out = config(place, tmp_path), tmp_path / "cache"
    text, dry = run_cache([f"--config={path}"], out, dry_run=True) or ("", {})
    assert "nothing was written" in text
    assert not out.exists()
    _, made = run_cache([f"--config={path}"], out, progress=False) or ("", {})
    assert dry["bytes"] == pytest.approx(made["bytes_on_disk"], rel=0.05)
    with without_known_noise():
        data = build_cli([f"--config={path}", f"--data.cache={out}"], run=False).datamodule
    data.setup("fit")
    assert size_on_disk(out, data, ["vit", "cnn"]) == made["bytes_on_disk"]


@pytest.mark.slow
def test_a_fit_on_a_cache_loads_no_teacher(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = config(place, tmp_path), tmp_path / "cache"
    main_args = ["cache", f"--config={path}", "--out", str(out), "--storage", "float32"]
    assert main([*main_args, "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["computed"] == 24
    live = run(path, "live", tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(base, "load_encoder", refuse)
        kept = run(path, "kept", tmp_path, f"--data.cache={out}")
    teacher = kept.teacher("vit")
    assert isinstance(teacher, KeptTeacher)
    assert not teacher.loaded
    for name, tensor in live.student.state_dict().items():
        torch.testing.assert_close(kept.student.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    # Asked for after all, it is the teacher itself.
    images = torch.rand(2, 3, 32, 32)
    expected = live.run_teacher("vit", images)
    assert torch.equal(kept.run_teacher("vit", images).summary, expected.summary)  # type: ignore[arg-type]
    assert teacher.loaded
    assert teacher.num_parameters == live.teacher("vit").num_parameters

    # A chunk that was changed on disk is noticed when it is read, and computed again by the next.
    file = out / "cnn.summary.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 0x40
    file.write_bytes(content)
    cached = [f"--data.cache={out}", "--data.cache_dtype=float32"]
    with pytest.raises(ValueError, match=r"of teacher 'cnn'.* do not fit their checksum"):
        run(path, "damaged", tmp_path, *cached)
    again = run(path, "again", tmp_path, *cached)
    for name, tensor in live.student.state_dict().items():
        torch.testing.assert_close(again.student.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not FeatureCache(out, again._trainer.datamodule.cache_source()).damaged_chunks(["cnn"])  # type: ignore[union-attr]


def run(path: str, name: str, folder: Path, *more: str) -> Any:
    arguments = ["fit", f"--config={path}", f"--trainer.default_root_dir={folder / name}", *more]
    # Adam would make steps of a whole rate out of gradients that are rounding.
    arguments += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.05"]
    return run_lightning([*arguments, "--trainer.enable_checkpointing=false"]).model


def test_other_weights_are_refused_by_name(place: Place, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    shutil.copy(place.root / "test_vit.pth", weights)
    content = yaml.safe_load((place.root / "base.yaml").read_text(encoding="utf-8"))
    teachers = content["model"]["init_args"]["teachers"]
    teachers["vit"]["init_args"]["checkpoint"] = str(weights)
    del teachers["cnn"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    out = tmp_path / "cache"
    run_cache([f"--config={path}"], out, progress=False)
    state = torch.load(weights, weights_only=True)
    state["cls_token"] += 1.0
    torch.save(state, weights)
    with pytest.raises(ValueError, match="the fingerprint of teacher 'vit'"):
        run_cache([f"--config={path}"], out, progress=False)
    views = "--data.train_views.flip=0.25"
    with pytest.raises(ValueError, match="'policy'"):
        run_cache([f"--config={path}", views], out, progress=False)


def test_mistakes_of_the_command(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "--out", str(tmp_path / "c")]) == 2
    assert "cache needs the run" in capsys.readouterr().err
    path = config(place, tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert main(["cache", f"--config={path}", "--out", str(file)]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    views = "--data.train_views.recorded=null"
    assert main(["cache", f"--config={path}", "--out", str(tmp_path / "c"), views]) == 2
    assert "set recorded" in capsys.readouterr().err
