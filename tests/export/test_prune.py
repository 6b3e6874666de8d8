import json
import subprocess
import sys

import pytest
import torch

import multikd
from multikd.backbones.shrink import load as load_pruned
from multikd.cli import main
from multikd.errors import MissingExtraError
from multikd.export import prune
from multikd.export.card import CardFacts
from multikd.export.prune import PrunedStudent, prune_student
from multikd.export.timm_folder import export_timm_folder
from multikd.export.torch_export import export_pt2
from multikd.export.weight_only import quantize_weights
from multikd.modules import DistillationModule
from multikd.students import StudentEncoder
from multikd.teachers import Teacher

# As a user's script has it: the folder's own reader, this project hidden.
CHILD = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('multikd', 'torch_pruning'):
            raise ImportError(name + ' is hidden')
sys.meta_path.insert(0, Hide())
sys.path.insert(0, sys.argv[1])
import torch, student_pruned
torch.set_num_threads(1)
with torch.inference_mode():
    torch.save(student_pruned.load()(torch.load('in.pt', weights_only=True)), 'out.pt')
"""


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit4", "regnety_002"])
def test_a_pruned_student_is_smaller_and_keeps_its_features_width(name, tmp_path) -> None:
    student = StudentEncoder(name, image_size=64, num_classes=3).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    pruned, report = prune_student(student, 0.5)
    assert report.parameters[1] < 0.9 * report.parameters[0]
    assert report.multiply_adds[1] < 0.9 * report.multiply_adds[0]
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert sum(p.numel() for p in pruned.model.parameters()) == report.parameters[1]
    assert pruned.feature_widths == student.feature_widths
    folder = export_timm_folder(pruned, tmp_path / "p", card=CardFacts(licence="mit"))
    again = PrunedStudent(name, str(folder), image_size=64, num_classes=3).eval()
    images = torch.rand(2, 3, 64, 64)
    expected = pruned.features(images).summary
    assert torch.equal(again.features(images).summary, expected)
    assert again(images).features.logits.shape == (2, 3)
    out = pruned(images)
    assert tuple(r.widths for r in out.rungs) == pruned.widths == again.widths
    # It teaches, it loads, it leaves as a graph, and what a checkpoint restores is the same.
    assert torch.allclose(multikd.load(folder).encode(images).summary, expected, atol=1e-6)
    assert torch.allclose(Teacher(f"exported:{folder}")(images).summary, expected, atol=1e-4)
    assert export_pt2(pruned, tmp_path / "p.pt2").parity["max_relative_error"] <= 1e-5
    third = PrunedStudent(name, str(folder), image_size=64).eval()
    third.load_state_dict(pruned.state_dict())
    assert torch.equal(third.features(images).summary, expected)


def test_the_weakest_channels_go() -> None:
    student = StudentEncoder("test_resnet", image_size=64).eval()
    conv = student.model.layer1[0].conv1
    weak = torch.arange(0, conv.out_channels, 4)
    with torch.no_grad():
        conv.weight[weak] *= 1e-3
        student.model.layer1[0].conv2.weight[:, weak] *= 1e-3
        student.model.layer1[0].bn1.weight[weak] *= 1e-3
    kept = conv.weight.detach().clone()
    pruned, _ = prune_student(student, 0.25)
    left = pruned.model.layer1[0].conv1.weight
    assert left.shape[0] < kept.shape[0]
    assert float(left.detach().flatten(1).norm(dim=1).min()) > 0.1 * float(
        kept.flatten(1).norm(dim=1).median()
    )


def test_a_pruned_student_is_distilled_further() -> None:
    from helpers.training import batch, module

    pruned, _ = prune_student(StudentEncoder("test_resnet", image_size=64), 0.3)
    distillation: DistillationModule = module(student=pruned)
    for name in distillation.teacher_names:
        distillation.normalizer(name).set_total_steps(10)
    loss, _ = distillation.step(batch(size=64), 0, 0, training=True)
    loss.backward()
    for name, parameter in pruned.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_the_command_and_its_round_trip(run, tmp_path, capsys, monkeypatch) -> None:
    """Prune by `export`, go on by `fit` as it says, export again; each loads without multikd."""
    import yaml

    first, config, second = tmp_path / "pruned", tmp_path / "run.yaml", tmp_path / "second"
    assert main(["export", str(run.checkpoint), str(first), "--prune=0.5", "--no-cost"]) == 0
    said = capsys.readouterr().out
    config.write_text(yaml.safe_dump(run.config))
    command = next(line for line in said.splitlines() if "multikd fit" in line)
    words = command.replace("CONFIG_OF_THE_RUN", str(config)).split()[1:]
    words = [word.replace("NEW_FOLDER", str(tmp_path / "again")) for word in words]
    checkpoints = f"--trainer.callbacks.init_args.dirpath={tmp_path / 'again'}"
    assert main([*words, checkpoints, "--model.student.num_classes=10"]) == 0
    checkpoint = tmp_path / "again" / "last.ckpt"
    formats = ("--formats=onnx", "--no-cost")
    assert main(["export", str(checkpoint), str(second), *formats]) == 0
    about = json.loads((second / "manifest.json").read_text())
    assert about["pruned"] is True
    assert about["start"]["name"] == str(first)
    parameters = sum(p.numel() for p in load_pruned(first).parameters())
    assert about["parameters"] == parameters
    assert {report["format"] for report in about["formats"]} == {"timm", "onnx"}
    card = (first / "README.md").read_text()
    assert "student_pruned.load()" in card
    assert "not trained since then" in card
    assert "AutoModel" not in card
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, "in.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(second)], check=True, timeout=200
    )
    with torch.inference_mode():
        expected = load_pruned(second)(images)
        assert torch.equal(torch.load("out.pt", weights_only=True), expected)
        assert not torch.allclose(load_pruned(first)(images), expected, atol=1e-4)
    error = ["export", str(checkpoint), str(tmp_path / "h"), "--heads=vit"]
    assert main(error) == 2
    assert "leave out --heads" in capsys.readouterr().err
    assert not (tmp_path / "h").exists()


def test_refusals(tmp_path, monkeypatch) -> None:
    student = StudentEncoder("test_resnet", image_size=64)
    with pytest.raises(ValueError, match="between 0 and 1, received 1"):
        prune_student(student, 1)
    with pytest.raises(ValueError, match="torch-pruning cannot follow test_mambaout"):
        prune_student(StudentEncoder("test_mambaout", image_size=64))
    with pytest.raises(ValueError, match="is no pruned student"):
        PrunedStudent("test_resnet", str(tmp_path), image_size=64)
    whole = export_timm_folder(student, tmp_path / "whole")
    with pytest.raises(ValueError, match="does not say so"):
        PrunedStudent("test_resnet", str(whole), image_size=64)
    pruned, _ = prune_student(student, 0.5)
    folder = export_timm_folder(pruned, tmp_path / "pruned")
    with pytest.raises(ValueError, match="holds a pruned test_resnet, expected test_vit"):
        PrunedStudent("test_vit", str(folder), image_size=64)
    with pytest.raises(ValueError, match="hold no pruned student"):
        quantize_weights(pruned, tmp_path / "q", bits=8, data=None)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is no pruned student"):
        PrunedStudent("test_resnet", str(folder), image_size=64)
    monkeypatch.setattr(prune, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"multikd\[prune\]"):
        prune_student(student)
