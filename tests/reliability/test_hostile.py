"""Files from strangers run nothing, write nowhere else, and allocate nothing they do not hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from data.shard_maker import make_shards
from torch import nn

from multikd.checkpoints import build_student, read_checkpoint, read_config
from multikd.cli import main
from multikd.config_files import load_config, parse_yaml, refuse_shell
from multikd.config_parser import Unbuildable, construct
from multikd.data.cache import CacheSource, FeatureCache, FeatureCacheWriter
from multikd.data.index import ShardIndex, build_index
from multikd.data.tar import scan_tar, stream_members
from multikd.redaction import redact, redact_values
from multikd.retention.taskfile import read_task_file
from multikd.teachers import load_encoder
from multikd.types import TokenFeatures
from multikd.untrusted import inside, read_bytes, read_json

SECRETS = ("hunter2", "SIGNED", "TOKEN123")


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_nothing(zipped: bool, tmp_path: Path) -> None:
    path, canary = tmp_path / "a.ckpt", tmp_path / "canary"
    torch.save({"a": Hostile(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile(canary)))
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        read_checkpoint(path)
    assert not canary.exists()


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    plain, bomb = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(4_000_000)}}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    assert bomb.stat().st_size < plain.stat().st_size / 100
    read_checkpoint(plain)
    with pytest.raises(ValueError, match="is truncated or is no checkpoint"):
        read_checkpoint(bomb)


@pytest.mark.parametrize(
    "content",
    [[1], {"state_dict": 3}, {"loops": []}, {"epoch": "x"}, {"callbacks": torch.zeros(2)}],
)
def test_values_of_other_types_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "[" * 5000, "model: 3", "- 1", "model: {init_args: 3}", "a: !!int x"]
)
def test_the_config_inside_is_judged(text: str) -> None:
    with pytest.raises(ValueError, match="config inside x"):
        read_config({"multikd": {"config": text}}, "x")


# --- configs ---------------------------------------------------------------------------------


def laughs(levels: int = 30) -> str:
    lines = ["a0: &a0 lol"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(), "write out to more than"),
        ("a: &a {b: *a}", "holds the alias itself"),
        ("[" * 3000, "nests too deeply"),
        ("a: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
        ("a: " + "9" * 10_000, "is no valid YAML"),
    ],
)
def test_yaml_bombs_and_tags(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_config(str(path))
    assert sorted(os.listdir(tmp_path)) == ["c.yaml"]


def test_aliases_in_reason_still_work() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "t")["c"] == {"x": 1, "y": 2}


class Mine(nn.Module):
    """A loss of a user's own that is not one."""


class Place:
    def __init__(self, root: Path) -> None:
        self.root, self.canary = root, root / "canary"
        make_shards(root / "shards", [8, 8], size=(32, 32))
        import timm

        torch.save(
            timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(),
            root / "t.pth",
        )

    def config(self) -> dict[str, Any]:
        teacher = {"encoder": "timm:test_vit", "checkpoint": str(self.root / "t.pth")}
        return {
            "trainer": {
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "accelerator": "cpu",
                "devices": 1,
                "enable_progress_bar": False,
                "default_root_dir": str(self.root / "run"),
                "callbacks": [{"class_path": "multikd.callbacks.DataFaults"}],
            },
            "model": {
                "teachers": {
                    "vit": {
                        "class_path": "multikd.teachers.Teacher",
                        "init_args": teacher | {"image_size": 32},
                    }
                },
                "student": {
                    "class_path": "multikd.students.StudentEncoder",
                    "init_args": {"name": "test_resnet", "image_size": 32, "rungs": "last"},
                },
                "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
            },
            "data": {
                "train": str(self.root / "shards"),
                "train_views": {
                    "class_path": "multikd.data.views.LightViews",
                    "init_args": {"size": 32},
                },
                "batch_size": 8,
                "num_workers": 0,
            },
        }

    def run(self, config: dict[str, Any], *args: str) -> int:
        path = self.root / "c.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return main(["fit", f"--config={path}", *args])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def popen(place: Place) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", str(place.canary)]}}


FIELDS = {
    "loss": lambda c, h: c["model"].update(loss=h),
    "optimizer": lambda c, h: c["model"].update(optimizer=h),
    "student": lambda c, h: c["model"].update(student=h),
    "model": lambda c, h: c.update(model=h),
    "data": lambda c, h: c.update(data=h),
    "callback": lambda c, h: c["trainer"].update(callbacks=[h]),
    "logger": lambda c, h: c["trainer"].update(logger=h),
    "strategy": lambda c, h: c["trainer"].update(strategy=h),
    "encoder": lambda c, h: c["model"]["teachers"]["vit"]["init_args"].update(encoder=h),
    "views": lambda c, h: c["data"].update(train_views=h),
    "callable": lambda c, h: c["trainer"].update(
        callbacks=[
            {
                "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                "init_args": {"on_fit_start": h},
            }
        ]
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_class_path_is_of_the_annotated_type_or_is_not_made(
    field: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config()
    FIELDS[field](config, popen(place))
    assert place.run(config) == 2
    assert "multikd: " in capsys.readouterr().err
    assert not place.canary.exists()
    assert not (place.root / "run").exists()


@pytest.mark.parametrize("name", ["os.abort", "builtins.breakpoint", "sys.exit", "os.getcwd"])
def test_an_encoder_s_path_is_not_called_to_find_out(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config()
    config["model"]["teachers"]["vit"]["init_args"] = {"encoder": name}
    assert place.run(config) == 2
    said = capsys.readouterr().err
    assert f"{name} is of Python's standard library, which no config may name" in said
    with pytest.raises(ValueError, match="it is not called"):  # nor from code
        load_encoder(name)


STRANGER = """
from pathlib import Path
Path({canary!r}).mkdir()
import lightning.pytorch as pl
from multikd.students import StudentEncoder
class Callback(pl.Callback): ...
class Student(StudentEncoder): ...
"""


@pytest.fixture
def stranger(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a module of its own, as ``multikd`` is run inside it."""
    code = STRANGER.format(canary=str(place.canary))
    (place.root / "their_code.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(place.root)
    yield place
    sys.modules.pop("their_code", None)


def test_a_module_that_a_config_names_is_not_imported(
    stranger: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for field, value in (
        ("callback", {"class_path": "their_code.Callback"}),
        ("callable", "their_code.Callback"),
        ("student", {"class_path": "their_code.Student", "init_args": {"name": "test_resnet"}}),
        ("encoder", "their_code.Student"),
    ):
        config = stranger.config()
        FIELDS[field](config, value)
        assert stranger.run(config) == 2
        said = capsys.readouterr().err
        assert f"{value if isinstance(value, str) else value['class_path']} is not imported" in said
        assert "add --allow_code=their_code to the command" in said
    assert stranger.run(stranger.config(), "--allow_code=os") == 2
    assert "a package or module of your own" in capsys.readouterr().err
    settings = {"class_path": "their_code.Student", "init_args": {"name": "test_resnet"}}
    with pytest.raises(ValueError, match="their_code.Student is not imported"):
        build_student(settings)
    tasks = "data: {a: {}}\ntasks: {a: {protocol: their_code.Student, data: a}}\n"
    (stranger.root / "t.yaml").write_text(tasks, encoding="utf-8")
    with pytest.raises(ValueError, match="their_code.Student is not imported"):
        read_task_file(stranger.root / "t.yaml")
    assert not stranger.canary.exists()
    assert "their_code" not in sys.modules


@pytest.mark.parametrize(
    "trusted", [["--allow_code=their_code"], ["--trainer.callbacks+=their_code.Callback"]]
)
def test_one_that_the_user_names_is(stranger: Place, trusted: list[str]) -> None:
    """By flag for what is in the config, or typed itself."""
    config = stranger.config()
    if "--allow_code" in trusted[0]:
        FIELDS["callback"](config, {"class_path": "their_code.Callback"})
    assert stranger.run(config, *trusted, "--trainer.limit_train_batches=1") == 0
    assert stranger.canary.exists()


@pytest.mark.parametrize("name", ["shutil.rmtree", "os.abort"])
def test_a_function_of_the_standard_library_is_no_callback(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config()
    FIELDS["callable"](config, name)
    assert place.run(config) == 2
    assert "on_fit_start" in capsys.readouterr().err
    module, _, function = name.rpartition(".")
    with pytest.raises(Unbuildable, match="standard library, which no config may have called"):
        construct(dict, hook=getattr(sys.modules[module], function))
    assert construct(dict, hook=make_shards, kind=int) == {"hook": make_shards, "kind": int}


def test_null_where_a_number_belongs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    config["data"]["num_workers"] = None
    assert place.run(config) == 2
    assert "num_workers is null, expected a value of type int" in capsys.readouterr().err
    with pytest.raises(Unbuildable, match="takes no such|unexpected keyword"):
        construct(Mine, no_such=3)  # a TypeError in a sentence, too


def test_a_config_cannot_start_a_shell(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    pipe = f"pipe:mkdir {place.canary}; cat {place.root}/shards/*.tar"
    config["data"] |= {"train": pipe, "sequential": True, "epoch_batches": 1}
    config["data"]["allow_pipe"] = True
    assert place.run(config) == 2
    assert "add --data.allow_pipe=true to the command" in capsys.readouterr().err
    # Hidden in text that jsonargparse would parse later, it is found all the same.
    hidden = {"class_path": "multikd.data.module.ShardDataModule", "init_args": config["data"]}
    assert place.run(config | {"data": json.dumps(hidden)}) == 2
    assert "allow_pipe" in capsys.readouterr().err
    assert not place.canary.exists()
    del config["data"]["allow_pipe"]
    assert place.run(config) == 2
    assert "runs a shell command" in capsys.readouterr().err
    assert not place.canary.exists()


def test_the_command_line_may_allow_it() -> None:
    config = {"fit": {"data": {"init_args": {"allow_pipe": True}}}}
    for args in (["fit", "--data.allow_pipe=true"], ["fit", "--data.allow_pipe", "true"]):
        refuse_shell(config, args)
    for args in (["fit"], ["fit", "--data.allow_pipe=false"], ["--config={allow_pipe: true}"]):
        with pytest.raises(ValueError, match="shell"):
            refuse_shell(config, args)


def test_no_unsafe_loader_is_called_anywhere() -> None:
    import ast

    import multikd

    for path in Path(multikd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}: {name}"
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), where
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", where
            if name == "np.load":
                assert keywords.get("allow_pickle") == "False", where
            if name.startswith("subprocess."):
                assert "shell" not in keywords, where
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), where


# --- shards and indexes ----------------------------------------------------------------------


def header(kind: bytes, size: int) -> bytes:
    raw = bytearray(tarfile.TarInfo("x.jpg").tobuf())
    raw[156:157] = kind
    raw[124:136] = b"\x80" + size.to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_that_promises_terabytes(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(kind, 1 << 42) + b"\0" * 2048)
    with path.open("rb") as file, pytest.raises(ValueError, match="not a tar archive"):
        scan_tar(file, path, path.stat().st_size)
    with path.open("rb") as file, pytest.raises(ValueError, match="promises"):
        list(stream_members(file))
    path.write_bytes(header(kind, 0) * 3000 + b"\0" * 1024)
    with path.open("rb") as file, pytest.raises(ValueError, match="not a tar archive"):
        scan_tar(file, path, path.stat().st_size)


def test_a_size_of_thirty_digits_is_not_read_up_to(tmp_path: Path) -> None:
    """In a pax record, which counts after the header itself was judged."""
    path, info = tmp_path / "a.tar", tarfile.TarInfo("a.jpg")
    info.pax_headers, info.size = {"size": "9" * 30}, 3
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"abc"))
    with path.open("rb") as file, pytest.raises(ValueError, match="promises 9{30} bytes"):
        list(stream_members(file))
    with path.open("rb") as file, pytest.raises(ValueError, match="is not a tar archive"):
        scan_tar(file, path, path.stat().st_size)


def test_a_stream_passes_over_links_devices_and_names_that_lead_away(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("../up.jpg", tarfile.REGTYPE),
            ("/abs.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("dev.jpg", tarfile.CHRTYPE),
            ("good.jpg", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    buffer.seek(0)
    assert [name for name, _ in stream_members(buffer)] == ["good.jpg"]


def packed(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_an_index_that_promises_more_than_it_holds(tmp_path: Path) -> None:
    (shard,) = make_shards(tmp_path, [4])
    data = build_index(shard).to_bytes()
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert len(ShardIndex.from_bytes(packed(arrays))) == 4
    # 1 GB of zeros, a megabyte when packed.
    bomb = packed(arrays | {"member_offset": np.zeros(1 << 27, dtype=np.int64)})
    assert len(bomb) < 2e6
    with pytest.raises(ValueError, match="not a usable shard index: it unpacks to more than"):
        ShardIndex.from_bytes(bomb)
    # A sum that overflows would pass for an end inside the shard.
    huge = arrays["member_offset"].copy()
    huge[0] = (1 << 63) - 1
    for name, value in (
        ("member_offset", huge),
        ("member_size", huge),
        ("key_bytes", np.full_like(arrays["key_bytes"], 0xFF)),
        ("header", np.frombuffer(b"[" * 100_000, dtype=np.uint8)),
        ("header", np.frombuffer(b"[]", dtype=np.uint8)),
        ("key_ends", arrays["key_ends"].astype(object)),
    ):
        with pytest.raises(ValueError, match="not a usable shard index"):
            ShardIndex.from_bytes(packed(arrays | {name: value}))


# --- caches, JSON, folders -------------------------------------------------------------------


SOURCE = CacheSource("abc", (3,), 1, {"name": "EvalViews"}, 0)
EXAMPLE = TokenFeatures(summary=torch.zeros(1, 4))


def test_a_cache_does_not_write_through_links(tmp_path: Path) -> None:
    folder, precious = tmp_path / "cache", tmp_path / "precious"
    FeatureCacheWriter(folder, SOURCE, {"vit": ("f", EXAMPLE)}).finish()
    precious.write_text("precious", encoding="utf-8")
    for name in ("vit.summary.bin", "vit.done"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
        with pytest.raises(ValueError, match="leads out of its folder"):
            FeatureCacheWriter(folder, SOURCE, {"vit": ("f", EXAMPLE)})
        with pytest.raises(ValueError, match="leads out of its folder"):
            FeatureCache(folder, SOURCE)._map("vit", name.split(".")[1])
        (folder / name).unlink()
    assert precious.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    "change",
    [
        {"summary": [1 << 40]},
        {"summary": [-1]},
        {"summary": 3},
        {"dtype": "object"},
        {"dtype": None},
        {"patches": [1, 2, 3]},
        {"summary": [5]},
    ],
)
def test_a_cache_of_other_shapes_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    FeatureCacheWriter(tmp_path, SOURCE, {"vit": ("f", EXAMPLE)}).finish()
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    meta["teachers"]["vit"] |= change
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(ValueError, match="of a feature cache is damaged"):
        FeatureCache(tmp_path, SOURCE)._map("vit", "summary")


def test_files_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(ValueError, match="more than the"):
        read_json(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes(path, 100)
    path.unlink()
    path.write_bytes(b"[" * 300_000)
    with pytest.raises(ValueError, match="is no valid JSON"):
        read_json(path)
    for name in ("../x", "/etc/passwd", "..", "", "a/b", "a\x00"):
        with pytest.raises(ValueError, match="no plain file name"):
            inside(tmp_path, name)


# --- secrets ---------------------------------------------------------------------------------


def test_redaction() -> None:
    text = (
        "https://me:hunter2@h.org/a-{0..9}.tar?X-Amz-Signature=SIGNED&x=1 s3://k:hunter2@b/x "
        "pipe:curl -u me:hunter2 -H 'Authorization: Bearer TOKEN123' 'http://h/x?token=TOKEN123' "
        "--password=hunter2 aws_secret_access_key=SIGNED"
    )
    clean = redact(text)
    assert not any(secret in clean for secret in SECRETS), clean
    assert "https://***@h.org/a-{0..9}.tar?***" in clean
    assert redact("did you mean https://h/x? key: 3, see a@b") == (
        "did you mean https://h/x? key: 3, see a@b"
    )
    nested = {"a": [{"b": "https://u:hunter2@h"}], "n": 3}
    assert redact_values(nested) == {"a": [{"b": "https://***@h"}], "n": 3}


def test_no_secret_is_in_what_a_run_leaves_behind(
    place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed addresses, one shard of which goes away: logs, config, checkpoint, faults."""
    import threading

    from data.shard_server import Handler, Server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.root, server.requests, server.failures = place.root / "shards", [], {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        for shard in sorted(server.root.glob("*.tar")):
            index = server.root / f"{shard.name}.index.npz"
            index.write_bytes(build_index(shard).to_bytes())
        server.failures["/s-001.tar"] = [404] * 99
        config = place.config()
        host = f"127.0.0.1:{server.server_port}"
        config["data"]["train"] = (
            f"http://me:hunter2@{host}/s-00{{0..1}}.tar?X-Amz-Signature=SIGNED&token=TOKEN123"
        )
        config["data"] |= {
            "shard_cache": str(place.root / "cache"),
            "index_dir": str(place.root / "indexes"),
            "max_fault_rate": 1.0,
        }
        saver = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "last", "save_on_train_epoch_end": True},
        }
        config["trainer"]["callbacks"].append(saver)
        assert place.run(config) == 0
        said = capfd.readouterr()
        left = b"".join(p.read_bytes() for p in (place.root / "run").rglob("*") if p.is_file())
        left += (said.out + said.err).encode()
        names = " ".join(str(p) for p in place.root.rglob("*"))
        for secret in SECRETS:
            assert secret.encode() not in left, secret
            assert secret not in names
        (faults,) = (place.root / "run").rglob("faults.jsonl")
        lines = [json.loads(line) for line in faults.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == 8
        assert {line["cause"] for line in lines} == {"unreachable"}
        assert {line["shard"] for line in lines} == {f"http://{host}/s-001.tar"}
        kept = read_config(read_checkpoint(place.root / "run" / "last.ckpt"), "x")
        train = kept["data"]["init_args"]["train"]
        assert train == f"http://***@{host}/s-00{{0..1}}.tar?***"
        # Going on from the checkpoint alone, the address is asked for again.
        args = ["fit", f"--ckpt_path={place.root / 'run' / 'last.ckpt'}", "--trainer.max_epochs=2"]
        assert main(args) == 2
        assert "secret parts" in capfd.readouterr().err
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- exports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    place = Place(root)
    config = place.config()
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "last", "save_on_train_epoch_end": True},
    }
    config["trainer"]["callbacks"].append(saver)
    config["model"]["student"]["init_args"] = {"name": "test_vit2", "image_size": 32}
    assert place.run(config) == 0
    out = root / "out"
    command = ["export", str(root / "run" / "last.ckpt"), str(out), "--heads=vit", "--no-cost"]
    assert main(command) == 0
    return out


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_code_in_an_export_is_not_run(exported: Path, tmp_path: Path) -> None:
    import multikd
    from multikd.teachers import load_encoder

    folder, canary = copy_of(exported, tmp_path / "x"), tmp_path / "canary"
    for name in ("student_heads.py", "timm.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(canary)!r})", encoding="utf-8")
    torch.save(Hostile(canary), folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= {
        "file": str(folder / "pytorch_model.bin"),
        "url": f"file://{folder}/pytorch_model.bin",
        "custom_load": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    before = list(sys.path)
    loaded = multikd.load(folder)  # the weights are the folder's own, whatever else is named
    assert loaded.heads == ("vit",)
    load_encoder(f"exported:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        multikd.load(folder)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_encoder(f"exported:{folder}")
    assert not canary.exists()
    assert sys.path == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**9},
        {"embed_dim": 1 << 40},
        {"embed_dim": 1 << 16, "num_heads": 1},
        {"depth": -1},
    ],
)
def test_a_gigantic_model_is_not_built(
    arguments: dict[str, Any], exported: Path, tmp_path: Path
) -> None:
    import multikd

    folder = copy_of(exported, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_args"] = config.get("model_args", {}) | arguments
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="can't be loaded"):
        multikd.load(folder)


@pytest.mark.parametrize(
    "mean", [1e308, [[0.5], 0.5, 0.5], [0.5, 0.5], ["a", 1, 2], [float("nan"), 1, 2], {"a": 1}]
)
def test_a_mean_of_other_types_is_refused(mean: Any, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"]["mean"] = mean
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="mean must be three numbers"):
        load_encoder(f"exported:{folder}")


def test_a_gigantic_head_and_links_are_refused(exported: Path, tmp_path: Path) -> None:
    import multikd

    folder = copy_of(exported, tmp_path / "x")
    text = (folder / "heads.json").read_text(encoding="utf-8")
    about = json.loads(text)
    ladder = next(iter(about["heads"]["vit"]["rungs"].values()))
    layer = next(one for one in ladder["summary"] if one["kind"] == "linear")
    layer |= {"in_features": 1 << 20, "out_features": 1 << 20}  # 4 TB
    (folder / "heads.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match="the model needs"):
        multikd.load(folder)
    (folder / "heads.json").write_text(text, encoding="utf-8")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="leads out of its folder"):
        multikd.load(folder)
    weights.unlink()
    weights.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(ValueError, match="can't be loaded"):
        multikd.load(folder)
