"""``multikd export``: a checkpoint in, a whole folder out, or one sentence and nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from multikd.backbones import Normalize
from multikd.checkpoints import load_student
from multikd.cli import main


def export(*arguments: object) -> int:
    return main(["export", "--no-cost", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    """The one sentence of a refused export that left nothing behind."""
    before = sorted(out.parent.rglob("*"))
    assert export(*arguments, out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("multikd: ")
    assert sorted(out.parent.rglob("*")) == before
    return error


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_features_equal_the_checkpoint_s_bit_for_bit(run, tmp_path, weights):
    out = tmp_path / "out"
    assert export(run.checkpoint, out, "--weights", weights) == 0
    student = load_student(run.checkpoint, weights).student
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    with torch.inference_mode():
        received = model(Normalize(config["mean"], config["std"])(images))
        assert torch.equal(received, student(images).features.summary)
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    prefix = "average.student.model." if weights == "ema" else "student.model."
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[prefix + key]), key


def test_manifest_is_enough_to_audit(run, tmp_path):
    out = tmp_path / "out"
    assert export(run.checkpoint, out, "--heads", "vit", "--data-licence", "CC-BY-4.0") == 0
    about = json.loads((out / "manifest.json").read_text())
    for name, entry in about["files"].items():
        content = (out / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
        assert len(content) == entry["bytes"]
    present = {path.name for path in out.iterdir()}
    assert present == set(about["files"]) | {"manifest.json"}
    assert about["licence"] == "cc-by-nc-4.0"
    assert {t["called"]: t["licence"] for t in about["teachers"]} == {
        "vit": "cc-by-nc-4.0",
        "next": "mit",
    }
    assert all(len(t["revision"]) == 64 for t in about["teachers"])
    assert about["seeds"]["seed_everything"] == 3
    assert about["recipe"]["epochs"] == 1
    assert about["recipe"]["steps"] == 4
    (data,) = about["data_sets"]
    assert data["samples"] == 64
    assert len(data["index_sha256"]) == 64
    checkpoint = hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()
    assert about["checkpoint"] == {"name": "last.ckpt", "sha256": checkpoint}
    assert {"torch", "timm", "python"} <= set(about["versions"])
    assert "name: test_vit\n" in about["config"]
    assert "commit" in about
    assert 0 < about["heads"]["vit"]["max_relative_error"] < 1e-4
    mode = (out / "model.safetensors").stat().st_mode & 0o777
    assert mode == (out / "config.json").stat().st_mode & 0o777


def test_data_hash_tells_the_samples_and_not_the_place(run, tmp_path):
    from multikd.export.provenance import data_facts

    def digest(folder: Path) -> str:
        return data_facts({"data": {"init_args": {"train": str(folder)}}})[0]["index_sha256"]

    shutil.copytree(run.shards, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(run.shards)
    (sorted((tmp_path / "copy").glob("*.tar"))[0]).unlink()
    assert digest(tmp_path / "copy") != digest(run.shards)
    assert digest(tmp_path / "none") is None


def test_classifier_and_tokens(run, tmp_path):
    whole, tokens, bare = tmp_path / "whole", tmp_path / "tokens", tmp_path / "bare"
    images = torch.rand(2, 3, 32, 32)
    trained = load_student(run.checkpoint).student
    pixels = trained.normalize(images)
    assert export(run.checkpoint, whole, "--classifier") == 0
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    assert torch.equal(model(pixels), trained(images).features.logits)
    assert export(run.checkpoint, tokens, "--output", "tokens") == 0
    model = timm.create_model(f"local-dir:{tokens}", pretrained=True).eval()
    with torch.inference_mode():
        expected = trained.model.forward_features(pixels)
        assert model(pixels).shape == expected.shape
        assert torch.equal(model(pixels), expected)
    assert export(run.checkpoint, bare, "--no-final-norm") == 0
    model = timm.create_model(f"local-dir:{bare}", pretrained=True).eval()
    with torch.inference_mode():
        last = trained(images).rungs[-1]
        assert torch.allclose(model(pixels), last.summary, atol=1e-6)


def test_list_names_every_format(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--list"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("timm", "onnx", "pt2", "onnx-int8-static", "torchao-int4"):
        assert name in text


def test_json_and_text_tell_what_was_written(run, tmp_path, capsys):
    target, out = tmp_path / "figures.json", tmp_path / "out"
    assert main(["export", str(run.checkpoint), str(out), "--heads=next", f"--json={target}"]) == 0
    text = capsys.readouterr().out
    figures = json.loads(target.read_text())
    assert figures["licence"] == "cc-by-nc-4.0"
    assert "cc-by-nc-4.0" in text
    assert figures["heads"]["next"] < 1e-4
    assert figures["cost"]["milliseconds"] > 0
    assert figures["cost"]["macs"] > 0
    assert figures["files"]["heads.safetensors"] > 0


@pytest.mark.slow
def test_quantised_files_are_scored_or_refused(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    arguments = (run.checkpoint, "--quantize", "onnx-dynamic", "--images", "64")
    assert export(*arguments, "--max-cosine-loss", "0.5", "--max-agreement-loss", "1", out) == 0
    reports = {r["format"]: r for r in json.loads((out / "manifest.json").read_text())["formats"]}
    assert set(reports) == {"timm", "onnx", "onnx-int8-dynamic"}
    timm_parity = reports["timm"]["parity"]
    assert timm_parity["max_relative_error"] == 0.0
    assert timm_parity["images"] == "real"
    sizes = {(case["batch"], case["height"], case["width"]) for case in timm_parity["cases"]}
    assert len({batch for batch, _, _ in sizes}) >= 3
    assert len({size[1:] for size in sizes}) == 3
    assert reports["onnx"]["parity"]["max_relative_error"] < 1e-4
    cosine = reports["onnx-int8-dynamic"]["quality"]["cosine_mean"]
    assert 0.5 < cosine <= 1
    assert f"| {cosine:.4f} |" in (out / "README.md").read_text()
    assert all((out / report["path"]).is_file() for report in reports.values())
    error = refused(capsys, tmp_path / "o" / "two", *arguments, "--max-cosine-loss", "1e-9")
    assert "cosine" in error


def test_quantising_needs_images(run, tmp_path, capsys, monkeypatch):
    def gone(*_args: object, **_kwargs: object) -> None:
        raise ValueError("no shards there")

    monkeypatch.setattr("multikd.export.deliver.calibration_set", gone)
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--quantize", "onnx-static")
    assert "give --data SHARDS" in error


# ---------------------------------------------------------------------- bad input


def test_something_else_than_a_checkpoint(run, tmp_path, capsys):
    other, text = tmp_path / "other.ckpt", tmp_path / "text.ckpt"
    torch.save({"state_dict": {}}, other)
    text.write_text("hello")
    assert "no checkpoint of multikd" in refused(capsys, tmp_path / "o" / "out", other)
    assert "not a checkpoint" in refused(capsys, tmp_path / "o" / "out", text)


def test_a_truncated_checkpoint(run, tmp_path, capsys):
    cut = tmp_path / "cut.ckpt"
    content = run.checkpoint.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    assert not zipfile.is_zipfile(cut)
    assert "truncated" in refused(capsys, tmp_path / "out", cut)


def test_an_older_version_is_named(run, tmp_path, capsys):
    old = tmp_path / "old.ckpt"
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    entry = checkpoint["multikd"]
    entry["version"] = "0.0.3"
    entry["config"] = entry["config"].replace("drop_path:", "path_drop:")
    torch.save(checkpoint, old)
    error = refused(capsys, tmp_path / "out", old)
    assert "written by multikd 0.0.3" in error
    assert "multikd==0.0.3" in error


def test_a_head_that_is_not_there(run, tmp_path, capsys):
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--heads", "vjt")
    assert "'vit'" in error


def test_weights_and_formats_that_are_not_there(run, tmp_path, capsys):
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--formats", "onxx")
    assert "'onnx'" in error
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--quantize", "int5")
    assert "'int4'" in error or "'int8'" in error


def test_an_existing_folder_is_kept_unless_overwritten(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(run.checkpoint, out, "--heads", "vit") == 0
    assert "exists already" in refused(capsys, out, run.checkpoint)
    assert export(run.checkpoint, out, "--overwrite") == 0
    assert not (out / "heads.json").exists()  # replaced whole, not mixed


@pytest.mark.parametrize("place", ["save_file", "fsync"])
def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch, place):
    def full(*_args: object, **_kwargs: object) -> None:
        if place == "save_file":
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = "multikd.export.timm_folder.save_file" if place == "save_file" else "os.fsync"
    monkeypatch.setattr(target, full)
    error = refused(capsys, tmp_path / "deep" / "out", run.checkpoint)
    assert "disk is full" in error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds 600 kB; the exported tiny student takes 1.5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(run, small_disk, capsys):
    error = refused(capsys, small_disk / "out", run.checkpoint)
    assert "disk is full" in error
    assert list(small_disk.iterdir()) == []


def test_interrupted_it_leaves_nothing(run, tmp_path):
    """Ctrl-C while the files are being written: no folder, no temporary one, exit code 130."""
    out = tmp_path / "out"
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "from multikd.cli import main\n"
        "import multikd.export.commands as commands\n"
        "write = commands.write_timm\n"
        "def slow(*args):\n"
        "    written = write(*args)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(120)\n"
        "    return written\n"
        "commands.write_timm = slow\n"
        f"raise SystemExit(main(['export', {str(run.checkpoint)!r}, {str(out)!r}]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
    child.send_signal(signal.SIGINT)
    try:
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert error.strip().splitlines()[-1].startswith("multikd: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_a_format_lacks(run, tmp_path, capsys, monkeypatch):
    def lacks(*_args: object, **_kwargs: object) -> None:
        raise ValueError("test_vit can't be written as ONNX (no operator): use another format")

    monkeypatch.setattr("multikd.export.deliver.export_onnx", lacks)
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--formats", "onnx")
    assert "use another format" in error


def test_heads_and_tokens_exclude_one_another(run, tmp_path, capsys):
    out, flags = tmp_path / "out", ("--heads", "vit", "--output", "tokens")
    assert "leave out --heads" in refused(capsys, out, run.checkpoint, *flags)


def test_results_of_another_kind(run, tmp_path, capsys):
    wrong = tmp_path / "results.json"
    wrong.write_text("[1]")
    error = refused(capsys, tmp_path / "out", run.checkpoint, "--results", wrong)
    assert "'retention'" in error
