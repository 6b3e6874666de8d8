"""``multikd evaluate ENCODER --drift NEW --reference OLD``, from folders to a recommendation."""

import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from multikd.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    digits = (load_digits().images * 15.9).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(digits))

    def write(name, rows, change=lambda image: image):
        (folder / name).mkdir()
        for i in rows:
            Image.fromarray(change(digits[i])).save(folder / name / f"{i}.png")

    write("old", order[:60])
    write("alike", order[60:110])
    write("inverted", order[110:160], lambda image: 255 - image)
    write("few", order[:5])
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    safetensors.torch.save_file(model.state_dict(), folder / "vit.safetensors")
    return folder


def run(place, new, reference="old", *more):
    return main(
        [
            *("evaluate", f"vit=timm:test_vit@{place / 'vit.safetensors'}"),
            *("--drift", str(place / new), "--reference", str(place / reference)),
            *("--cache", str(place / "cache"), "--workers", "0", "--device", "cpu", *more),
        ]
    )


def test_images_alike_are_fine_and_inverted_ones_are_not(place, capsys):
    assert run(place, "alike", "old", "--json", str(place / "alike.json")) == 0
    assert "FINE" in capsys.readouterr().out
    report = json.loads((place / "alike.json").read_text())["encoders"]["vit"]
    assert report["images"] == {"new": 50, "reference": 60, "compared": 50}
    assert report["mmd"]["p_value"] > 0.01
    assert run(place, "inverted", "old", "--json", str(place / "inverted.json")) == 0
    assert "DISTIL AGAIN" in capsys.readouterr().out
    report = json.loads((place / "inverted.json").read_text())["encoders"]["vit"]
    assert report["verdict"] == "distil again"
    assert report["neighbours"]["far"] > 0.9
    assert report["reasons"]


@pytest.mark.parametrize(
    "new, words",
    [("few", "at least 12 images in both sets"), ("none", "does not exist")],
)
def test_bad_input_is_one_sentence(place, capsys, new, words):
    assert run(place, new) != 0
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_corrupt_image_is_left_out_and_named(place, capsys):
    folder = place / "corrupt"
    folder.mkdir()
    for path in sorted((place / "alike").iterdir())[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    broken = folder / "zzz.png"
    broken.write_bytes(b"no image")
    assert run(place, "corrupt") == 0
    output = capsys.readouterr().out
    assert "1 unreadable of new, left out" in output
    assert "zzz" in output
    assert "20 of each compared" in output
