import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from multikd.backbones import Normalize
from multikd.export import CardFacts, TeacherFacts, export_timm_folder
from multikd.students import StudentEncoder

FACTS = CardFacts(
    teachers=(TeacherFacts("timm:dino", "Apache-2.0", "hub"), TeacherFacts("own|one")),
    scores={"k-NN": 0.5},
    licence="apache-2.0",
    data="digits",
    command="multikd fit --config mine",
    notes="a note",
)
# A student of every kind whose rebuilding needs something: sizes, patches, registers, pooling.
FAMILIES = {
    "resnet": {"name": "resnet10t", "image_size": 64},
    "vit": {"name": "test_vit", "image_size": 64, "patch_size": 8, "drop_path": 0.2},
    "registers": {"name": "test_vit4", "image_size": 64},
    "pooled vit": {"name": "test_vit", "image_size": 64, "global_pool": "avg"},
    "windows": {"name": "test_maxvit", "image_size": 64},
    "channels last": {"name": "test_mambaout", "image_size": 64},
    "convnext": {"name": "test_convnext", "image_size": 64, "channels_last": True},
    "efficientnet": {"name": "test_efficientnet", "image_size": 64},
    "own normalisation": {
        "name": "test_resnet",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.9, 0.8, 0.7),
    },
}
CHILD = """
import json, sys

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
import timm, torch
torch.set_num_threads(int(sys.argv[2]))
jobs = torch.load(sys.argv[1], weights_only=True)
for job in jobs:
    model = timm.create_model('local-dir:' + job['folder'], pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(config['mean']).view(shape), torch.tensor(config['std']).view(shape)
    with torch.inference_mode():
        job['received'] = model((job['images'] - mean) / std)
    job['input_size'] = config['input_size']
torch.save(jobs, sys.argv[1])
"""


def build(settings):
    torch.manual_seed(0)
    student = StudentEncoder(**settings)
    for module in student.modules():  # statistics that an untrained model would have at 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return student.train()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Tiny models: threads that wait for each other on a busy machine cost more than they bring.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def students():
    return {name: build(settings) for name, settings in FAMILIES.items()}


@pytest.fixture(scope="module")
def exports(students, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {
        name: export_timm_folder(student, root / f"{name} #1", card=FACTS)
        for name, student in students.items()
    }


def test_timm_without_multikd_gives_the_same_features_bit_for_bit(students, exports, tmp_path):
    jobs = []
    for name, student in students.items():
        size = student.spec.image_size
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
        channels_last, student.channels_last = student.channels_last, False
        model = student.export_model()
        with torch.inference_mode():
            expected = model(student.normalize(images))
            if not channels_last:
                student.eval()
                assert torch.equal(student(images).features.summary, expected)
                student.train()
        student.channels_last = channels_last
        jobs.append({"folder": str(exports[name]), "images": images, "expected": expected})
    path = tmp_path / "jobs.pt"
    torch.save(jobs, path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(torch.get_num_threads())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    for name, job in zip(students, torch.load(path, weights_only=True), strict=True):
        assert job["received"].shape[1] == students[name].spec.widths.summary
        assert tuple(job["input_size"]) == (3, *students[name].spec.image_size), name
        assert torch.equal(job["received"], job["expected"]), name
        assert float(job["received"].std()) > 1e-3, name


@pytest.mark.parametrize("name", FAMILIES)
def test_config_says_how_to_rebuild_and_preprocess(students, exports, name):
    spec = students[name].spec
    config = json.loads((exports[name] / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert config["architecture"] == FAMILIES[name]["name"]
    assert config["origin"] == "multikd"
    assert config["num_classes"] == cfg["num_classes"] == 0
    assert config["num_features"] == students[name].model.num_features
    assert cfg["input_size"] == [3, *spec.image_size]
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (spec.mean, spec.std)
    assert cfg["interpolation"] == spec.interpolation
    assert 0.5 < cfg["crop_pct"] <= 1
    assert cfg["license"] == "apache-2.0"
    assert not {"url", "file", "hf_hub_id", "tag", "label_names"} & set(cfg)
    assert "drop_path_rate" not in config.get("model_args", {})
    model = students[name].export_model()
    for key in ("first_conv", "classifier"):
        assert cfg[key] is not None
        first = [cfg[key]] if isinstance(cfg[key], str) else cfg[key]
        assert all(model.get_submodule(part) is not None for part in first)


def test_pool_size_is_the_grid_that_is_pooled(exports):
    grids = {"resnet": [2, 2], "channels last": [2, 2], "efficientnet": [2, 2], "vit": None}
    for name, grid in grids.items():
        cfg = json.loads((exports[name] / "config.json").read_text())["pretrained_cfg"]
        assert cfg["pool_size"] == grid, name


def test_a_resized_vit_takes_other_sizes_and_other_heads(exports):
    model = timm.create_model(f"local-dir:{exports['vit']}", pretrained=True, num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert model(torch.zeros(1, 3, 96, 80)).shape == (1, 7)
    assert torch.equal(
        model.patch_embed.proj.weight,
        load_file(exports["vit"] / "model.safetensors")["patch_embed.proj.weight"],
    )


def test_manifest_and_card(students, exports):
    manifest = json.loads((exports["vit"] / "manifest.json").read_text())
    assert manifest["architecture"] == "test_vit"
    assert manifest["teachers"][0] == {
        "name": "timm:dino",
        "licence": "Apache-2.0",
        "source": "hub",
        "called": "",
        "link": "",
        "revision": "",
    }
    assert manifest["teachers"][1]["licence"] == "unknown"
    assert manifest["scores"] == {"k-NN": 0.5}
    assert manifest["image_size"] == [64, 64]
    assert manifest["parameters"] == sum(
        p.numel() for p in students["vit"].export_model().parameters()
    )
    assert manifest["versions"]["timm"] == timm.__version__
    weights = (exports["vit"] / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    card = (exports["vit"] / "README.md").read_text()
    assert "pretrained=True" in card
    assert "| timm:dino | Apache-2.0 | hub | – |" in card
    assert "own\\|one" in card
    assert "| k-NN | 50.0 % |" in card
    for text in ("apache-2.0", "digits", "multikd fit --config mine", "a note"):
        assert text in card


def test_the_card_s_code_runs(exports, tmp_path):
    from PIL import Image

    card = (exports["resnet"] / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    Image.new("L", (70, 50), 128).save(tmp_path / "image.jpg")
    code = code.replace("PATH", str(exports["resnet"])).replace(
        '"image.jpg"', repr(str(tmp_path / "image.jpg"))
    )
    names: dict[str, object] = {}
    with torch.inference_mode():
        exec(code, names)
    assert names["features"].shape == (1, 512)


def test_the_student_is_not_changed(tmp_path):
    student = build({"name": "test_resnet", "image_size": 32}).bfloat16()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    out = export_timm_folder(student, tmp_path / "out")
    after = student.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert [module.training for module in student.modules()] == modes
    # bf16-true weights are exported in float32, with the same values.
    written = load_file(out / "model.safetensors")
    assert written["conv1.0.weight"].dtype == torch.float32
    assert torch.equal(written["conv1.0.weight"], student.model.conv1[0].weight.float())


def test_a_classifier_goes_along_when_asked_for(tmp_path):
    student = build({"name": "test_resnet", "image_size": 32, "num_classes": 5}).eval()
    bare = export_timm_folder(student, tmp_path / "bare")
    whole = export_timm_folder(student, tmp_path / "whole", classifier=True)
    assert "fc.weight" not in load_file(bare / "model.safetensors")
    images = torch.rand(2, 3, 32, 32)
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    pixels = Normalize(student.spec.mean, student.spec.std)(images)
    with torch.inference_mode():
        assert torch.equal(model(pixels), student(images).features.logits)
    assert json.loads((whole / "manifest.json").read_text())["num_classes"] == 5
    with pytest.raises(ValueError, match="no classifier to export"):
        export_timm_folder(build({"name": "test_resnet"}), tmp_path / "none", classifier=True)


def leftovers(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def test_an_existing_folder_is_refused_or_replaced_whole(tmp_path):
    student = build({"name": "test_resnet", "image_size": 32})
    out = export_timm_folder(student, tmp_path / "deep" / "out")
    first = (out / "model.safetensors").read_bytes()
    (out / "stale.txt").write_text("old")
    with torch.no_grad():
        student.model.conv1[0].weight.add_(1)
    with pytest.raises(ValueError, match="exists already"):
        export_timm_folder(student, out)
    assert (out / "model.safetensors").read_bytes() == first
    export_timm_folder(student, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert not (out / "stale.txt").exists()
    assert leftovers(out.parent) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "other model", "link"])
def test_what_is_no_export_is_never_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        if kind == "other model":
            (out / "config.json").write_text('{"architecture": "bert"}')
    with pytest.raises(ValueError, match="not an earlier export"):
        export_timm_folder(build({"name": "test_resnet", "image_size": 32}), out, overwrite=True)
    assert out.is_symlink() or out.read_text() if kind in ("file", "link") else out.is_dir()
    if out.is_dir():
        assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["write", "verify", "rename"])
def test_a_failure_leaves_everything_as_it_was(tmp_path, monkeypatch, moment):
    student = build({"name": "test_resnet", "image_size": 32})
    out = export_timm_folder(student, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    if moment == "write":
        monkeypatch.setattr("multikd.export.timm_folder.readme", fail)
    elif moment == "verify":
        monkeypatch.setattr("multikd.export.timm_folder.timm.create_model", fail)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path,
            "rename",
            lambda self, to: fail() if self.name.endswith(".tmp") else rename(self, to),
        )
    with torch.no_grad():
        student.model.conv1[0].weight.add_(1)
    with pytest.raises((OSError, ValueError), match="no space left"):
        export_timm_folder(student, out, overwrite=True)
    assert leftovers(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_config_that_rebuilds_another_model_is_refused(tmp_path, monkeypatch):
    student = build({"name": "test_vit", "image_size": 64, "global_pool": "avg"})
    monkeypatch.setattr("multikd.export.timm_folder._model_arguments", lambda model: {})
    with pytest.raises(ValueError, match=r"rebuilds|does not load"):
        export_timm_folder(student, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    student = build({"name": "test_resnet", "image_size": 32})
    with torch.no_grad():
        student.model.conv1[0].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in conv1\.0\.weight"):
        export_timm_folder(student, tmp_path / "out")
    assert leftovers(tmp_path) == []
