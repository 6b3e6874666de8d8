"""ATSC: both updates and the drift against a step written by hand; what is deployed; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data.shard_maker import make_shards
from helpers import methods, resuming
from helpers import training as small
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.backbones import skeleton
from multikd.checkpoints import TrainedStudent
from multikd.export import standalone_classifier
from multikd.export.card import CardFacts
from multikd.export.shared_classifier import write_classifier
from multikd.export.timm_folder import TimmOptions, write_timm
from multikd.modules import AdaptiveModule
from multikd.modules.adaptive import DEPLOYED_KEY, anchored, drift
from multikd.modules.optimizing import SecondOptimizer
from multikd.projectors import BottleneckProjector, to_map
from multikd.teachers import TrainableTeacher
from multikd.types import TokenFeatures

A, B, D, W, TAU = 0.3, 0.9, 0.5, 0.7, 4.0


def double(names: tuple[str, ...]) -> AdaptiveModule:
    """CNN teachers with batch norms (in train mode), a ViT student, float64."""
    kinds = {"one": ("test_resnet", 1), "two": ("test_resnet", 2)}
    module = methods.module(
        "adaptive",
        teachers={n: methods.teacher(*kinds[n]) for n in names},
        student=methods.student(),
        labels=A,
        features=B,
        response=D,
        drift=W,
        temperature=TAU,
        norm="batch",
    )
    return module.double().train()


def by_hand(module: AdaptiveModule, batch: Any, rate: float, second: float) -> dict[str, Tensor]:
    """The parameters after both steps, from the formulas alone (SGD), by name."""
    images, y = batch.views[0], batch.labels
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    f_s = module.student.model.forward_features(module.student.normalize(images).double())
    f_s = f_s[:, module.student.model.num_prefix_tokens :].transpose(1, 2)
    side = int(f_s.shape[2] ** 0.5)
    f_s = f_s.unflatten(2, (side, side))
    total, pooled = torch.zeros((), dtype=torch.float64), {}
    for name in module.teacher_names:
        teacher = module.teacher(name)
        f_t = teacher.encoder.model.forward_features(teacher.encoder.normalize(images).double())
        h, w = (min(f_s.shape[i], f_t.shape[i]) for i in (2, 3))
        projected = module.projectors[name](F.adaptive_avg_pool2d(f_s, (h, w)))
        weight, bias = teacher.classifier.weight, teacher.classifier.bias
        z_s = projected.mean((2, 3)) @ weight.T + bias
        z_t = f_t.mean((2, 3)) @ weight.T + bias
        p, q = (z_t / TAU).softmax(1), (z_s / TAU).softmax(1)
        loss = A * F.nll_loss(z_s.log_softmax(1), y)
        loss = loss + D * TAU**2 * (p * (p / q).log()).sum(1).mean()
        loss = loss + B * ((projected - F.adaptive_avg_pool2d(f_t, (h, w))) ** 2).mean()
        for key, parameter in teacher.named_parameters():
            if parameter.dim() > 1:
                there = module.moved[f"{name}.{key}"]  # type: ignore[attr-defined]
                loss = loss + W * ((parameter - there) ** 2).sum()
        total = total + loss / len(module.teacher_names)
        pooled[name] = f_t.mean((2, 3)).detach()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    after = {n: start[n] - rate * g for n, g in zip(parameters, gradients, strict=True)}
    for name in module.teacher_names:
        keys = [f"trained_teachers.{name}.classifier.{part}" for part in ("weight", "bias")]
        g = [after[key].detach().requires_grad_() for key in keys]
        ce = F.cross_entropy(pooled[name] @ g[0].T + g[1], y) / len(module.teacher_names)
        for key, value, slope in zip(keys, g, torch.autograd.grad(ce, g), strict=True):
            after[key] = value.detach() - second * slope
    return after


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_both_updates_are_those_of_a_hand_written_step(names: tuple[str, ...]) -> None:
    module, other = double(names), double(names)
    for one in (module, other):
        one.moved = {  # type: ignore[attr-defined]
            f"{n}.{k}": p.detach().clone()
            for n in names
            for k, p in one.teacher(n).named_parameters()
        }
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # the teachers have left their start
            for name in names:
                for p in one.teacher(name).parameters():
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.add_(noise * p.abs().mean() * 0.1)
    batch = small.batch(count=6)
    batch.views = [batch.views[0].double() / 255.0]
    expected = by_hand(other, batch, rate=0.05, second=0.2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    classifiers = [p for n in names for p in module.teacher(n).classifier.parameters()]
    module.second = SecondOptimizer(torch.optim.SGD(classifiers, lr=0.2))
    total, record = module.step(batch)
    total.backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    optimizer.step()
    module.second_step(optimizer, batch)
    assert expected.keys() == trained.keys()
    for name, parameter in trained.items():
        assert torch.allclose(parameter, expected[name], rtol=1e-9, atol=1e-10), name
    assert record.losses.shape == (len(names), 6)


def test_the_drift_is_over_weights_of_more_than_one_dimension() -> None:
    teacher = methods.teacher("test_resnet").double()
    found = anchored(teacher)
    expected = [p for p in teacher.parameters() if p.dim() > 1]
    assert len(found) == len(expected) > 5
    assert any(p is teacher.classifier.weight for p in found)
    assert not any(p is teacher.classifier.bias for p in found)
    starts = [p.detach().clone() for p in found]
    assert float(drift(found, starts).detach()) == 0.0
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.5)
    value = drift(found, starts)
    assert float(value.detach()) == pytest.approx(0.25 * sum(p.numel() for p in found), rel=1e-12)
    gradients = torch.autograd.grad(value, found)
    for g, p, start in zip(gradients, found, starts, strict=True):
        assert torch.allclose(g, 2 * (p - start))


def test_the_teacher_trains_in_train_mode_and_the_anchors_stay(tmp_path: Path) -> None:
    module = methods.module(
        "adaptive",
        teachers={"cnn": methods.teacher("test_resnet")},
        labels=0.0,
        response=0.0,
        norm="batch",
    )
    before = {k: v.clone() for k, v in module.state_dict().items()}
    batches = [small.batch(seed=seed) for seed in range(3)]
    small.trainer(tmp_path).fit(module, datamodule=small.Data(batches))
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert any("trained_teachers" in k and "running_mean" in k for k in changed)
    assert "trained_teachers.cnn.classifier.weight" in changed
    assert "trained_teachers.cnn.classifier.bias" in changed  # by the second step alone
    assert any(k.startswith("projectors.cnn") for k in changed)
    assert any(k.startswith("student.model") for k in changed)
    assert not any(k.startswith("anchors.") for k in changed)
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    assert not {k for k in changed if k in frozen}


def test_the_teachers_have_a_rate_of_their_own(tmp_path: Path) -> None:
    module = methods.module("adaptive", teacher_rate=0.25)
    small.trainer(tmp_path).fit(module, datamodule=small.Data([small.batch()]))
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    rates = {
        id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            expected = 5e-4 if name.startswith("trained_teachers.") else 2e-3
            assert rates[id(parameter)] == pytest.approx(expected), name
    assert module.second is not None
    assert module.second.rates == [2e-3, 2e-3]  # the second step has its own


def test_what_is_scored_is_projector_and_shared_classifier(tmp_path: Path) -> None:
    module = methods.module("adaptive").eval()
    batch = small.batch(count=8)
    images = batch.views[0].float() / 255.0
    features = module(batch.views[0])
    own = module.student.features(images)
    assert torch.equal(features.summary, own.summary)
    rows = []
    for name in module.teacher_names:
        teacher = module.teacher(name)
        found = module.projectors[name](to_map(own, (2, 2)))
        rows.append(teacher.classifier(found.mean((2, 3))).softmax(1))
    assert torch.allclose(features.logits.softmax(1), sum(rows) / 2, atol=1e-6)
    batch.labels[6:] = -1  # not scored
    runner = small.trainer(tmp_path)
    runner.validate(module, datamodule=small.Data([], [batch]), verbose=False)
    right = (features.logits.argmax(1) == batch.labels)[:6].float().mean()
    assert float(runner.callback_metrics["val/accuracy"]) == pytest.approx(float(right))
    loss = F.cross_entropy(features.logits[:6], batch.labels[:6])
    assert float(runner.callback_metrics["val/loss"]) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("resize", ["own", "none"])
def test_what_is_exported_answers_as_the_module_at_every_size(tmp_path: Path, resize: str) -> None:
    module = AdaptiveModule(
        {"t": methods.teacher("test_resnet", resize=resize)}, small.student(name="resnet10t")
    ).eval()
    layout = {"t": module._layout("t", module.student.spec.image_size)}
    checkpoint = {DEPLOYED_KEY: layout, "state_dict": module.state_dict()}
    trained = TrainedStudent(module.student, {}, {}, "raw", 1, 1, "", checkpoint)
    write_timm(tmp_path, trained.student, CardFacts(), TimmOptions())
    write_classifier(tmp_path, trained)
    deployed = standalone_classifier.load(tmp_path)
    for size in ((32, 32), (33, 33), (40, 72), (64, 32), (96, 96)):
        images = torch.rand(2, 3, *size)
        expected = module(images).logits.softmax(1)
        assert torch.allclose(deployed(images).softmax(1), expected, atol=1e-5), size


@torch.no_grad()
def test_projectors() -> None:
    batch = BottleneckProjector(6, 8, 2.0)
    kinds = [type(layer) for layer in batch]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    assert [layer.kernel_size for layer in batch if isinstance(layer, nn.Conv2d)] == [
        (1, 1),
        (3, 3),
        (1, 1),
    ]
    assert batch.hidden == 4
    assert float(batch(torch.randn(2, 6, 5, 4)).min()) == 0.0
    open_ended = BottleneckProjector(6, 8, 2.0, "group", rectified=False)
    assert float(open_ended(torch.randn(2, 6, 5, 4)).min()) < 0.0
    features = TokenFeatures(patches=torch.arange(32.0).reshape(1, 16, 2), grid=(4, 4))
    assert to_map(features)[0, 1, 2, 3] == features.patches[0, 11, 1]  # type: ignore[index]
    assert to_map(features, (2, 9)).shape == (1, 2, 2, 4)
    for wrong in ({"factor": 0.0}, {"factor": 2.0, "norm": "layer"}):
        with pytest.raises(ValueError, match="must be"):
            BottleneckProjector(6, 8, **wrong)  # type: ignore[arg-type]


def test_a_head_file_is_the_classifier(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    own = methods.teacher()
    width = own.classifier.in_features
    weight, bias = torch.randn(7, width), torch.randn(7)
    save_file({"weight": weight, "bias": bias}, path)
    teacher = methods.teacher(head=str(path))
    assert torch.equal(teacher.classifier.weight, weight)
    assert torch.equal(teacher.classifier.bias, bias)
    assert teacher.num_classes == 7
    images = torch.rand(2, 3, 32, 32)
    found = teacher(images)
    assert torch.allclose(found.logits, found.summary @ weight.T + bias, atol=1e-5)
    assert teacher.facts()["fingerprint"] != own.facts()["fingerprint"]
    assert methods.teacher(num_classes=4).num_classes == 4
    # A skeleton, as plans and checks build it, has as many classes; the file may not be there yet.
    with skeleton(), torch.device("meta"):
        assert methods.teacher(head=str(path)).num_classes == teacher.num_classes
        assert methods.teacher(head="not/fitted.safetensors").num_classes > 0
    with pytest.raises(ValueError, match="has 7 classes and num_classes is 10"):
        methods.teacher(head=str(path), num_classes=10)
    save_file({"weight": weight[:, :5].contiguous(), "bias": bias}, path)
    with pytest.raises(ValueError, match=r"reads 5 numbers .* summary has"):
        methods.teacher(head=str(path))
    save_file({"kernel": weight}, path)
    with pytest.raises(ValueError, match=r"a head holds weight \(K, D\) and bias \(K\)"):
        methods.teacher(head=str(path))


def classless(name: str) -> Any:
    import timm

    from multikd.teachers import BackboneEncoder

    model = timm.create_model(name, num_classes=0)
    return BackboneEncoder(model, name=name, image_size=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"drift": -1.0}, "drift must be 0 or more"),
        ({"teachers": {}}, "no teachers"),
        ({"student": methods.student(num_classes=10)}, "set student.init_args.num_classes to 0"),
        (
            {"teachers": {"a": methods.teacher(), "b": methods.teacher(num_classes=4)}},
            "a has 10, b has 4",
        ),
    ],
)
def test_bad_settings(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        methods.module("adaptive", **settings)


def test_bad_teachers() -> None:
    with pytest.raises(ValueError, match="has no classifier: give head=FILE"):
        TrainableTeacher(classless("test_resnet"))
    with pytest.raises(ValueError, match="does not read the plain mean of a feature map"):
        methods.module("adaptive", teachers={"next": methods.teacher("test_convnext")})
    with pytest.raises(ValueError, match="can't be a teacher that is trained: give timm:NAME"):
        TrainableTeacher("helpers.training.SummaryOnly")


def unlabelled(folder: Path) -> list[str]:
    """Shards as ``make_shards`` writes them, without labels."""
    import tarfile

    make_shards(folder, [12])
    (path,) = folder.glob("*.tar")
    bare = folder / "bare.tar"
    with tarfile.open(path) as old, tarfile.open(bare, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            if not member.name.endswith(".cls"):
                new.addfile(member, old.extractfile(member))
    path.unlink()
    return [str(bare)]


@pytest.mark.parametrize("name", methods.METHODS)
def test_missing_labels_are_said_before_training(name: str, tmp_path: Path) -> None:
    shards = unlabelled(tmp_path)
    with pytest.raises(ValueError, match=r"none of 12 training samples .* has one"):
        resuming.run(methods.module(name), methods.data(shards, batch_size=2), tmp_path)


def test_labels_beyond_the_classes_are_said_before_training(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [12])
    student = methods.student(num_classes=4)
    with pytest.raises(ValueError, match="labels reach 9 and the classifiers have 4"):
        resuming.run(methods.module("self", student=student), methods.data(shards), tmp_path)


@pytest.mark.parametrize(
    ("students", "words"),
    [
        ({"a": methods.student(num_classes=10)}, "two students or more, received 1"),
        (
            {"a": methods.student(num_classes=10), "b": methods.student()},
            "a has 10, b has 0: set num_classes alike",
        ),
    ],
)
def test_students_that_cannot_learn_from_one_another(students: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        methods.module("mutual", students=students)


def test_facts_of_teachers_are_plain() -> None:
    facts = methods.module("adaptive").teacher_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"one", "two"}
    assert facts["one"]["fingerprint"] != facts["two"]["fingerprint"]
