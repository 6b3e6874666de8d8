"""Pseudo-labels: written, read back, gone on with; soft labels in a mixture; misuse."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from ablation.conftest import Place
from data.shard_maker import make_shards, png

from multikd.cli import main
from multikd.data.decode import SampleFault
from multikd.data.module import ShardDataModule
from multikd.data.soft_labels import decode_soft, encode_soft, stack_soft
from multikd.data.sources import ShardSource
from multikd.data.specs import DatasetSpec
from multikd.data.views import EvalViews, LightViews
from multikd.losses import LabelLoss
from multikd.pseudolabels import write
from multikd.pseudolabels.ensemble import Ensemble, mean_probabilities
from multikd.pseudolabels.tally import Tally
from multikd.types import StudentOutput, TokenFeatures

CLASSES = 5


class Logits:
    """Two made-up teachers: logits that follow from an image's mean colour."""

    def __call__(self, name: str, images: torch.Tensor) -> TokenFeatures:
        colour = images.double().mean((2, 3))
        generator = torch.Generator().manual_seed(len(name))
        weight = 8 * torch.randn(3, CLASSES, generator=generator, dtype=torch.float64)
        return TokenFeatures(logits=colour @ weight)


def label(
    shards: Path, out: Path, threshold: float, seen: list[int] | None = None, stop: int = 10**9
) -> tuple[Any, Tally]:
    count = 0

    def progress(images: int) -> None:
        nonlocal count
        count += images
        if seen is not None:
            seen.append(images)
        if count >= stop:
            raise KeyboardInterrupt

    ensemble = Ensemble(Logits(), {"one": 1.0, "three": 3.0})
    return write.write_pseudolabels(
        ShardSource(str(shards)), out, ensemble, EvalViews(32), threshold=threshold,
        identity={"teachers": "made up"}, classes=[], batch_size=4, progress=progress,
    )  # fmt: skip


def expected(shards: Path) -> dict[str, tuple[np.ndarray[Any, Any], int]]:
    """By hand: key → (probabilities in float64, true label)."""
    data = ShardDataModule(str(shards), val=str(shards), eval_views=EvalViews(32), num_workers=0,
                           train_views=LightViews(32), batch_size=2)  # fmt: skip
    data.setup("fit")
    found = {}
    for batch in data.val_dataloader()[0]:
        z = [Logits()(n, batch.views[0].float() / 255).logits for n in ("one", "three")]
        p = [np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True) for x in z]  # type: ignore[union-attr]
        for i, key in enumerate(batch.keys):
            if batch.positions[i] >= 0:
                found[key] = (0.25 * p[0][i] + 0.75 * p[1][i], int(batch.labels[i]))
    return found


def test_written_shards_hold_the_ensembles_probabilities_and_go_on_after_a_kill(
    tmp_path: Path,
) -> None:
    shards, out = tmp_path / "in", tmp_path / "out"
    make_shards(shards, [7, 6, 5], broken=[3], size=(32, 32))
    truth = expected(shards)
    threshold = float(np.median([p.max() for p, _ in truth.values()]))
    with pytest.raises(KeyboardInterrupt):
        label(shards, out, threshold, stop=8)  # in the second shard
    assert [p.name for p in out.glob("*.tar")] == ["shard-000000.tar"]
    assert not (out / "dataset.json").exists()
    seen: list[int] = []
    report, tally = label(shards, out, threshold, seen)
    assert sum(seen) == 11  # the first shard was not labelled again
    assert (tally.images, tally.unreadable) == (17, 1)
    # Every kept sample: its image's bytes, the probabilities, the class; not its true label.
    source, raw = ShardSource(str(out)), ShardSource(str(shards))
    images = {raw.key(s, i): raw.read_members(s, i)["png"] for s in range(3)
              for i in range(int(raw.lengths[s])) if raw.key(s, i) in truth}  # fmt: skip
    kept = {}
    for s in range(len(source.urls)):
        for i in range(int(source.lengths[s])):
            members = source.read_members(s, i)
            kept[source.key(s, i)] = members
    assert set(kept) == {k for k, (p, _) in truth.items() if p.max() >= threshold}
    assert 0 < len(kept) < 17
    for key, members in kept.items():
        p = truth[key][0]
        soft = decode_soft(members)
        assert soft is not None
        assert np.abs(soft - p).max() < 1e-6
        assert int(members["cls"]) == p.argmax()
        assert abs(json.loads(members["pseudo.json"])["confidence"] - p.max()) < 1e-6
        assert members["png"] == images[key]
    # The report: coverage and accuracy at each threshold.
    for row in tally.rows():
        over = [(p.argmax(), t) for p, t in truth.values() if p.max() >= row["threshold"]]
        assert row["kept"] == len(over)
        right = sum(a == b for a, b in over)
        assert row["accuracy"] == (None if not over else right / len(over))
    # Whole and again: the same bytes, nothing is done twice; another threshold is refused.
    whole = tmp_path / "whole"
    label(shards, whole, threshold)
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert (out / "dataset.json").read_text() == (whole / "dataset.json").read_text().replace(
        str(whole), str(out))  # fmt: skip
    seen.clear()
    assert label(shards, out, threshold, seen)[1] == tally
    assert seen == []
    with pytest.raises(ValueError, match=r"another run \(other threshold\)"):
        label(shards, out, 0.1)
    with pytest.raises(ValueError, match=r"no image reaches a confidence of 1.0 \(of 17\)"):
        label(shards, tmp_path / "none", 1.0)
    with pytest.raises(ValueError, match="no pseudo-labels of ours"):
        label(shards, shards, 0.5)
    assert report.total == len(kept)


def test_samples_of_one_name_in_several_folders_stay_apart(tmp_path: Path) -> None:
    shards, out = tmp_path / "in", tmp_path / "out"
    shards.mkdir()
    long = "folder/" * 14 + "image"
    names = ["a/0", "b/0", long, long.replace("image", "other")]
    with tarfile.open(shards / "s.tar", "w") as tar:
        for number, name in enumerate(names):
            data = png(number, (32, 32))
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    label(shards, out, 0.0)
    source, raw = ShardSource(str(out)), ShardSource(str(shards))
    assert int(source.lengths[0]) == 4
    assert [source.key(0, i) for i in range(2)] == ["a/0", "b/0"]
    for i in range(4):
        assert source.read_members(0, i)["png"] == raw.read_members(0, i)["png"]


def test_images_of_which_none_can_be_read_are_said(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [3], broken=[0, 1, 2], size=(32, 32))
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        label(tmp_path / "in", tmp_path / "out", 0.0)


def test_a_mixture_trains_on_both_kinds_of_label(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", [12], size=(32, 32))
    label(tmp_path / "in", tmp_path / "out", 0.0)
    make_shards(tmp_path / "few", [6], name="few", size=(32, 32))
    # Only classes that the ensemble knows.
    mixed = {"few": DatasetSpec(str(tmp_path / "few")), "many": DatasetSpec(str(tmp_path / "out"))}
    data = ShardDataModule(mixed, train_views=LightViews(32), batch_size=9, num_workers=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"class 5 is mixed with soft labels of 5 classes"):
        list(data.train_dataloader())
    rows = [np.array([0.2, 0.8], np.float32), None, None]
    soft = stack_soft(rows, [1, 0, -1])
    assert soft is not None
    assert torch.equal(soft, torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.0, 0.0]]))
    assert stack_soft([None, None], [0, 1]) is None
    with pytest.raises(ValueError, match="of 2 and of 3 classes|of 3 and of 2 classes"):
        stack_soft([rows[0], np.ones(3, np.float32) / 3], [0, 0])
    # A loader over pseudo-labels alone gives them to the loss.
    alone = ShardDataModule(str(tmp_path / "out"), train_views=LightViews(32), batch_size=4,
                            num_workers=0)  # fmt: skip
    alone.setup("fit")
    batch = next(iter(alone.train_dataloader()))
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    loss = LabelLoss()(StudentOutput((), TokenFeatures(logits=logits)), batch)
    assert torch.allclose(loss, -(batch.soft_labels * F.log_softmax(logits, 1)).sum(1))
    assert torch.equal(batch.soft_labels.argmax(1), batch.labels)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x93NUMPY", encode_soft(np.array([0.5, 0.1])), encode_soft(np.array([-0.5, 1.5])),
     encode_soft(np.array([np.nan, 1.0])), encode_soft(np.ones((1, 1)))],
)  # fmt: skip
def test_a_damaged_row_is_a_fault(data: bytes) -> None:
    with pytest.raises(SampleFault, match=r"bad label.*expected probabilities"):
        decode_soft({"soft.npy": data})


def test_mean_of_probabilities_not_of_logits() -> None:
    a, b = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p = torch.softmax(a, 1) * 0.5 + torch.softmax(b, 1) * 0.5
    assert torch.allclose(mean_probabilities([a, b], [2.0, 2.0]), p)
    with pytest.raises(ValueError, match="of one shape"):
        mean_probabilities([a, torch.zeros(1, 3)], [1.0, 1.0])


def test_of_the_command(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(),
               tmp_path / "classes.pth")  # fmt: skip
    config = yaml.safe_load((place.root / "base.yaml").read_text())
    teachers = config["model"]["init_args"]["teachers"]
    teachers["vit"]["init_args"]["checkpoint"] = str(tmp_path / "classes.pth")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["pseudolabel", f"--config={tmp_path / 'c.yaml'}", "--data", str(place.root / "test")]
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, *out]) == 2
    assert "teacher 'cnn' has no classifier" in capsys.readouterr().err
    for wrong, said in (
        (["--threshold", "1.5"], "must be in [0, 1]"),
        (["--teachers", "vot"], "did you mean 'vit'?"),
    ):
        assert main([*command, *out, *wrong]) == 2
        assert said in capsys.readouterr().err
    config["model"]["init_args"] |= {
        "teachers": {}, "loss": {"class_path": "multikd.losses.NoFeatureLoss"},
        "terms": {"labels": {"class_path": "multikd.losses.LabelLoss"}},
    }  # fmt: skip
    config["model"]["init_args"]["student"]["init_args"]["num_classes"] = 10
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(config))
    none = [command[0], f"--config={tmp_path / 'none.yaml'}", *command[2:]]
    assert main([*none, *out]) == 2
    assert "this config has no teachers" in capsys.readouterr().err
    assert main([*command, "--out", str(place.root / "test")]) == 2
    assert "is the folder of the images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    report = tmp_path / "report.json"
    arguments = ["--teachers", "vit", "--threshold", "0.0", "--json", str(report)]
    assert main([*command, *out, *arguments]) == 0
    figures = json.loads(report.read_text())
    assert (figures["images"], figures["written"]) == (20, 20)
    assert 0 <= figures["thresholds"][0]["accuracy"] <= 1
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 80
