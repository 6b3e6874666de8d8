"""The commands of the README's export section run as they stand there, on the tests' own run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import multikd
from multikd.cli import main

SECTION = (
    (Path(__file__).parents[2] / "README.md").read_text().partition("\n## Export\n")[2]
).partition("\n## ")[0]
COMMANDS = [
    line
    for line in re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)[0].splitlines()
    if line.startswith("multikd ")
]
pytestmark = pytest.mark.slow
PYTHON = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """What the commands leave: the last but one with heads is looked at below."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("readme")
    names = {
        "runs/laptop/last.ckpt": str(run.checkpoint),
        "my-student/": str(root / "my-student"),
        "shards/": str(run.shards),
        "lite0": "vit",
    }
    assert len(COMMANDS) == 4
    for command in COMMANDS[:2]:
        assert main([names.get(word, word) for word in shlex.split(command)[1:]]) == 0
    # The tiny student of the tests loses more to int8 than a real one: only its limits are wider.
    static = [names.get(word, word) for word in shlex.split(COMMANDS[2])[1:]]
    static[2] = str(root / "quantised")
    limits = ["--max-cosine-loss=1", "--max-agreement-loss=1", "--images=32"]
    assert main([*static, *limits]) == 0
    with pytest.raises(SystemExit):
        main(shlex.split(COMMANDS[3])[1:])
    return root / "my-student"


def test_the_commands_leave_what_they_say(folder):
    made = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "manifest.json"} <= made
    assert {"heads.safetensors", "student_heads.py", "model.onnx", "model.pt2"} <= made
    assert (folder.parent / "quantised" / "model.int8-static.onnx").is_file()


def test_the_python_runs(folder):
    image = folder.parent / "image.jpg"
    Image.new("RGB", (60, 40)).save(image)
    code = PYTHON[0].replace("my-student", str(folder)).replace("image.jpg", str(image))
    names: dict[str, object] = {}
    exec(code.replace('"lite0"', '"vit"'), names)
    assert names["features"].summary.shape == (1, 64)  # type: ignore[attr-defined]
    assert names["predicted"].summary.shape == (1, 64)  # type: ignore[attr-defined]
    assert isinstance(names["student"], multikd.export.LoadedStudent)


def test_the_text_lines_run(clip_student):
    images = torch.rand(2, 3, 32, 32)
    names = {"student": clip_student, "images": images}
    exec(PYTHON[1], names)
    assert names["probabilities"].shape == (2, 2)
    assert names["scores"].shape == (2, 1)


def test_the_next_run_s_settings_are_real(folder):
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher

    assert "--model.student.init_args.checkpoint=my-student" in SECTION
    assert "encoder: exported:my-student" in SECTION
    StudentEncoder("test_vit", image_size=32, checkpoint=str(folder))
    Teacher(f"exported:{folder}")
