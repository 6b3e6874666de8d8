import json

import pytest
import torch
from small_models import FAMILIES

from multikd.errors import MissingExtraError
from multikd.export import prune
from multikd.export.prune import PrunedStudent, prune_student
from multikd.export.torch_export import export_pt2
from multikd.modules import DistillationModule
from multikd.students import StudentEncoder


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext", pytest.param("test_vit4", marks=pytest.mark.slow)],
)
def test_a_pruned_student_is_smaller_and_keeps_its_features_width(name, tmp_path) -> None:
    student = StudentEncoder(name, image_size=64).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    report = prune_student(student, tmp_path / "p", ratio=0.3)
    assert report.parameters[1] < 0.9 * report.parameters[0]
    assert report.multiply_adds[1] < 0.9 * report.multiply_adds[0]
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert json.loads((tmp_path / "p" / "pruning.json").read_text())["architecture"] == name
    pruned = PrunedStudent(name, str(tmp_path / "p"), image_size=64).eval()
    assert sum(p.numel() for p in pruned.model.parameters()) == report.parameters[1]
    assert pruned.feature_widths == student.feature_widths
    images = torch.rand(2, 3, 64, 64)
    out = pruned(images)
    assert tuple(r.widths for r in out.rungs) == pruned.widths
    # It leaves as a graph, and what a checkpoint restores is the same.
    assert export_pt2(pruned, tmp_path / "p.pt2").parity["max_relative_error"] <= 1e-5
    again = PrunedStudent(name, str(tmp_path / "p"), image_size=64).eval()
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again.features(images).summary, pruned.features(images).summary)


def test_the_weakest_channels_go(tmp_path) -> None:
    student = StudentEncoder("test_resnet", image_size=64).eval()
    conv = student.model.layer1[0].conv1
    weak = torch.arange(0, conv.out_channels, 4)
    with torch.no_grad():
        conv.weight[weak] *= 1e-3
        student.model.layer1[0].conv2.weight[:, weak] *= 1e-3
        student.model.layer1[0].bn1.weight[weak] *= 1e-3
    kept = conv.weight.detach().clone()
    prune_student(student, tmp_path / "p", ratio=0.25)
    pruned = PrunedStudent("test_resnet", str(tmp_path / "p"), image_size=64)
    left = pruned.model.layer1[0].conv1.weight
    assert left.shape[0] < kept.shape[0]
    assert float(left.detach().flatten(1).norm(dim=1).min()) > 0.1 * float(
        kept.flatten(1).norm(dim=1).median()
    )


def test_a_pruned_student_is_distilled_further(tmp_path) -> None:
    from helpers.training import batch, module

    prune_student(StudentEncoder("test_resnet", image_size=64), tmp_path / "p", ratio=0.3)
    pruned = PrunedStudent("test_resnet", str(tmp_path / "p"), image_size=64)
    distillation: DistillationModule = module(student=pruned)
    for name in distillation.teacher_names:
        distillation.normalizer(name).set_total_steps(10)
    loss, _ = distillation.step(batch(size=64), 0, 0, training=True)
    loss.backward()
    for name, parameter in pruned.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_refusals(tmp_path, monkeypatch) -> None:
    student = StudentEncoder("test_resnet", image_size=64)
    with pytest.raises(ValueError, match="strictly between 0 and 1, received 1"):
        prune_student(student, tmp_path / "p", ratio=1)
    with pytest.raises(ValueError, match="without a classifier"):
        prune_student(StudentEncoder("test_resnet", image_size=64, num_classes=2), tmp_path / "p")
    with pytest.raises(ValueError, match="torch-pruning cannot follow test_mambaout"):
        prune_student(StudentEncoder("test_mambaout", image_size=64), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        prune_student(student, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="is no pruned student"):
        PrunedStudent("test_resnet", str(tmp_path / "mine"), image_size=64)
    prune_student(student, tmp_path / "p")
    prune_student(student, tmp_path / "p", overwrite=True)
    with pytest.raises(ValueError, match="holds a pruned test_resnet, expected test_vit"):
        PrunedStudent("test_vit", str(tmp_path / "p"), image_size=64)
    monkeypatch.setattr(prune, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"multikd\[prune\]"):
        prune_student(student, tmp_path / "q")
    assert len(FAMILIES) >= 12
