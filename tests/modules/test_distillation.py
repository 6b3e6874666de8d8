"""DistillationModule: dropping, balancing, terms, precision, accumulation, what is logged."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import training as small
from torch import Tensor, nn

from multikd.callbacks import FiniteLossGuard, NonFiniteLossError
from multikd.losses import (
    DynamicWeightAverage,
    FeatureLoss,
    FixedWeights,
    HardestKept,
    InverseLossScale,
    LabelLoss,
    NoDropping,
    RandomTeachers,
    TeacherDropper,
    UncertaintyWeights,
)
from multikd.modules import DistillationModule
from multikd.normalizers import BatchStandardizers, EMAStandardizers, FixedStandardizers
from multikd.optim import WarmupCosine
from multikd.projectors import TransformerProjectors
from multikd.types import Batch, StudentOutput, TokenFeatures

DROPPERS = [NoDropping, HardestKept, lambda: HardestKept(normalize="image"), RandomTeachers]
BALANCERS = [
    FixedWeights,
    lambda: FixedWeights({"vit": 2.0, "cnn": 0.0}),
    UncertaintyWeights,
    DynamicWeightAverage,
    InverseLossScale,
]


def ready(module: DistillationModule) -> DistillationModule:
    """As Lightning would have it at the start of a run of 100 batches."""
    for name in module.teacher_names:
        module.normalizer(name).set_total_steps(100)
    return module.train()


def backward(module: DistillationModule, batch: Batch, index: int = 0) -> Tensor:
    module.zero_grad()
    total, _ = module.step(batch, 0, index, training=True)
    total.backward()
    return total.detach()


def without_gradient(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]


# ---------------------------------------------------------------------- dropping and balancing


@pytest.mark.parametrize("dropper", DROPPERS)
@pytest.mark.parametrize("balancer", BALANCERS)
def test_every_dropper_with_every_balancer(dropper: Any, balancer: Any) -> None:
    module = ready(small.module(dropper=dropper(), balancer=balancer()))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    data = small.batch()
    totals = []
    for index in range(3):
        totals.append(backward(module, data, index))
        assert not without_gradient(module)
        optimizer.step()
    assert torch.isfinite(torch.stack(totals)).all()
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("dropper", DROPPERS)
def test_it_learns(dropper: Any, tmp_path: Path) -> None:
    """On the same images the loss falls, whatever is dropped."""
    data = small.batch()
    module = small.module(
        dropper=dropper(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        normalizers=FixedStandardizers(images=6),
    )
    notes = small.Notes()
    small.trainer(tmp_path, notes, max_epochs=1).fit(module, datamodule=small.Data([data] * 25))
    for name in module.teacher_names:
        losses = [step[name] for step in notes.losses if name in step]
        # Step 0 still has raw targets: the statistics are those before the batch.
        assert losses[-1] < 0.8 * max(losses[1:4]), (name, losses)


def test_teachers_left_out_are_not_run_and_get_a_zero_gradient() -> None:
    module = ready(small.module(dropper=RandomTeachers(p=0.4, seed=3)))
    calls = dict.fromkeys(module.teacher_names, 0)

    def counting(name: str) -> Any:
        def count(*_: Any) -> None:
            calls[name] += 1

        return count

    handles = [module.teacher(name).encoder.register_forward_hook(counting(name)) for name in calls]
    expected = dict.fromkeys(calls, 0)
    sizes = set()
    for index in range(12):
        ran = module.dropper.select(index)
        sizes.add(len(ran))
        before = {n: module.normalizer(n).summary_mean.clone() for n in calls}  # type: ignore[operator]
        backward(module, small.batch(seed=index), index)
        assert not without_gradient(module)
        for name in calls:
            expected[name] += name in ran
            gradients = [p.grad for p in module.ladder.teacher_parameters(name)]
            assert any(bool(g.any()) for g in gradients) == (name in ran)  # type: ignore[union-attr]
            moved = not torch.equal(before[name], module.normalizer(name).summary_mean)  # type: ignore[arg-type]
            assert moved == (name in ran)
    for handle in handles:
        handle.remove()
    assert calls == expected
    assert sizes == {1, 2, 3}
    assert sum(calls.values()) < 3 * 12


class DropsOne(TeacherDropper):
    """The named teacher runs and counts for no image."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.dropped = name

    def keep(self, losses: Tensor, positions: Tensor, epoch: int, names: Any = None) -> Tensor:
        kept = torch.ones_like(losses)
        kept[list(names or self.names).index(self.dropped)] = 0.0
        return kept


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(
    "normalizers", [EMAStandardizers(), BatchStandardizers(), FixedStandardizers()]
)
def test_a_nan_of_a_dropped_teacher_leaks_nowhere(
    balancer: Any, normalizers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(broken: bool) -> tuple[Tensor, DistillationModule]:
        module = ready(
            small.module(dropper=DropsOne("cnn"), balancer=balancer(), normalizers=normalizers)
        )
        original = module.run_teacher

        def teacher(name: str, images: Tensor) -> TokenFeatures:
            features = original(name, images)
            if name == "cnn" and broken:
                assert features.summary is not None
                features.summary[2] = float("nan")
            return features

        monkeypatch.setattr(module, "run_teacher", teacher)
        return torch.stack([backward(module, small.batch(seed=s), s) for s in range(2)]), module

    totals, module = run(broken=True)
    assert not without_gradient(module)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    for name, buffer in module.named_buffers():
        assert torch.isfinite(buffer).all(), name
    assert torch.isfinite(totals).all()
    if isinstance(module.balancer, FixedWeights):  # others look at the broken teacher's loss
        clean, reference = run(broken=False)
        assert torch.allclose(totals, clean)
        for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
            if p.grad is not None and not name.startswith("ladder.projectors.cnn"):
                assert torch.allclose(p.grad, q.grad, atol=1e-6), name  # type: ignore[arg-type]


def test_without_dropping_that_nan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready(small.module())
    original = module.run_teacher
    monkeypatch.setattr(
        module, "run_teacher", lambda n, x: original(n, x).map(lambda t: t * float("nan"))
    )
    assert not torch.isfinite(backward(module, small.batch()))


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("dropper", [HardestKept(p=1.0), RandomTeachers(p=1.0)])
def test_validation_never_drops_and_counts_real_images_only(
    dropper: TeacherDropper, tmp_path: Path
) -> None:
    module = small.module(
        {"num_classes": 10}, dropper=dropper, terms={"labels": LabelLoss(weight=0.5)}
    )
    whole, part = small.batch(seed=1), small.batch(seed=2)
    part.positions = torch.tensor([6, 7, -1, -1, -1, -1])
    part.labels = torch.tensor([3, 4, -1, -1, -1, -1])
    fillers = small.batch(seed=3, positions=torch.full((6,), -1))
    fillers.labels = torch.full((6,), -1)
    runner = small.trainer(tmp_path)
    runner.validate(module, datamodule=small.Data([], [whole, part, fillers]), verbose=False)
    got = {k: float(v) for k, v in runner.callback_metrics.items()}

    module.eval()
    losses, labels = [], []
    for data in (whole, part):
        with torch.no_grad():
            _, record = module.step(data, 0, 0, training=False)
        assert record.names == module.teacher_names
        assert bool((record.keep == 1).all())
        losses.append(record.losses[:, data.positions >= 0])
        labels.append(record.terms["labels"][data.positions >= 0])
    per_teacher = torch.cat(losses, dim=1).mean(dim=1)
    for index, name in enumerate(module.teacher_names):
        assert got[f"val/loss/{name}"] == pytest.approx(float(per_teacher[index]), rel=1e-5)
    total = per_teacher.mean() + 0.5 * torch.cat(labels).mean()
    assert got["val/loss"] == pytest.approx(float(total), rel=1e-5)


def test_validation_changes_nothing(tmp_path: Path) -> None:
    module = small.module(balancer=InverseLossScale(), dropper=HardestKept())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    small.trainer(tmp_path).validate(
        module, datamodule=small.Data([], [small.batch()]), verbose=False
    )
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_without_validate_losses_no_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small.module(validate_losses=False)
    monkeypatch.setattr(module, "run_teacher", None)
    runner = small.trainer(tmp_path)
    runner.validate(module, datamodule=small.Data([], [small.batch()]), verbose=False)
    assert not [name for name in runner.callback_metrics if name.startswith("val/loss")]


# ---------------------------------------------------------------------- terms and tokens


def test_a_label_term_trains_the_head(tmp_path: Path) -> None:
    module = small.module({"num_classes": 10}, terms={"labels": LabelLoss(weight=2.0)})
    head = module.student.model.head.weight  # type: ignore[union-attr]
    start = head.detach().clone()  # type: ignore[union-attr, operator]
    assert not [n for n, p in module.student.named_parameters() if not p.requires_grad]
    ready(module)
    total, record = module.step(small.batch(), 0, 0, training=True)
    teachers_alone = record.losses.mean()
    expected = teachers_alone + 2.0 * record.terms["labels"].mean()
    assert total.item() == pytest.approx(float(expected), rel=1e-5)
    total.backward()
    assert not without_gradient(module)
    assert bool(head.grad.any())  # type: ignore[union-attr]
    memory = small.Memory()
    small.trainer(tmp_path, logger=memory, log_every_n_steps=1).fit(
        module, datamodule=small.Data([small.batch()])
    )
    assert not torch.equal(start, head)  # type: ignore[arg-type]
    assert memory.values("train/term/labels")[0] > 1.0


def test_a_term_that_needs_logits_needs_a_classifier() -> None:
    with pytest.raises(ValueError, match=r"num_classes to the number of classes"):
        small.module(terms={"labels": LabelLoss()})


@pytest.mark.parametrize(
    ("loss", "student", "projectors"),
    [
        (FeatureLoss(patches=0.0), "test_vit", None),
        (FeatureLoss(summary=0.0), "test_vit", None),
        # Its summary is behind a convolution that patches do not pass.
        (FeatureLoss(summary=0.0), "mobilenetv3_small_050", None),
        (FeatureLoss(patches=0.0), "mobilenetv3_small_050", None),
        (FeatureLoss(patches=0.0), "test_vit", TransformerProjectors(heads=4)),
        (FeatureLoss(summary=0.0), "test_vit", TransformerProjectors(heads=4)),
    ],
)
def test_a_loss_of_one_token_type_leaves_nothing_without_gradient(
    loss: FeatureLoss, student: str, projectors: Any
) -> None:
    settings = {} if projectors is None else {"projectors": projectors}
    module = ready(small.module({"name": student}, loss=loss, **settings))
    for index in range(2):
        total = backward(module, small.batch(), index)
        assert torch.isfinite(total)
        assert not without_gradient(module)


def test_a_loss_that_reads_nothing_of_its_teacher_is_refused() -> None:
    module = small.module(teacher_losses={"cnn": FeatureLoss(summary=0.0)})
    assert module.ladder.projectors["cnn"]["0"].summary is None  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="teacher_losses names 'nobody'"):
        small.module(teacher_losses={"nobody": FeatureLoss()})
    summary_only = small.summary_teacher()
    with pytest.raises(ValueError, match="loss of teacher 'clip' reads only patches"):
        small.module(teachers={"clip": summary_only}, loss=FeatureLoss(summary=0.0))
    module = ready(small.module(teachers={"clip": summary_only, **small.teachers(1)}))
    assert torch.isfinite(backward(module, small.batch()))
    assert not without_gradient(module)


@pytest.mark.parametrize(
    ("names", "words"), [([], "no teachers"), (["a.b"], "must consist of"), (["1a"], "begin")]
)
def test_names_of_teachers(names: list[str], words: str) -> None:
    one = small.teachers(1)["vit"]
    with pytest.raises(ValueError, match=words):
        small.module(teachers=dict.fromkeys(names, one))


# ---------------------------------------------------------------------- views


def test_two_views_are_two_steps_of_one_batch(tmp_path: Path) -> None:
    module = small.module()
    data = small.Data([small.batch(views=2), small.batch(seed=1, views=2)])
    data.train_views = [None, None]  # type: ignore[attr-defined]
    notes = small.Notes()
    small.trainer(tmp_path, notes).fit(module, datamodule=data)
    assert len(notes.losses) == 4
    for name in module.teacher_names:
        normalizer = module.normalizer(name)
        assert (int(normalizer.updates), normalizer.total_steps) == (4, 4)  # type: ignore[arg-type]
    broken = small.batch(views=2)
    broken.views[0] = torch.full((6, 3, 32, 32), float("nan"))  # the first, not the last
    guarded = small.trainer(tmp_path, FiniteLossGuard(max_in_a_row=1))
    with pytest.raises(NonFiniteLossError, match="teacher 'vit' at step 0"):
        guarded.fit(small.module(), datamodule=small.Data([broken]))


# ---------------------------------------------------------------------- optimisation


class Steps(pl.Callback):
    """Optimiser steps: when they came, and which norm the gradients had after clipping."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.batches.append(trainer.fit_loop.batch_idx)
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_accumulation(tmp_path: Path) -> None:
    """Five batches, two an optimiser step: steps after batches 1, 3 and, the epoch over, 4."""
    module = small.module(
        ema_decay=0.5,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=WarmupCosine(min_lr=0.0),
    )
    steps = Steps()
    data = small.Data([small.batch(seed=s) for s in range(5)])
    runner = small.trainer(tmp_path, steps, max_epochs=2, accumulate_grad_batches=2)
    runner.fit(module, datamodule=data)
    assert steps.batches == [1, 3, 4, 1, 3, 4]
    assert module.average is not None
    assert int(module.average.updates) == 6
    # Half a cosine from lr to 0 over the six steps.
    cosine = [0.05 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert steps.rates == pytest.approx(cosine)
    for name in module.teacher_names:
        normalizer = module.normalizer(name)
        assert (int(normalizer.updates), normalizer.total_steps) == (10, 10)  # type: ignore[arg-type]


def test_max_steps_counts_optimiser_steps(tmp_path: Path) -> None:
    module = small.module(
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=WarmupCosine(warmup_epochs=1, min_lr=0.02),
    )
    data = small.Data([small.batch(seed=s) for s in range(4)])
    steps = Steps()
    runner = small.trainer(tmp_path, steps, max_epochs=-1, max_steps=3, accumulate_grad_batches=2)
    runner.fit(module, datamodule=data)
    assert runner.global_step == 3
    assert steps.rates == pytest.approx([0.05, 0.1, 0.1])  # an epoch is two steps
    assert module.normalizer("vit").total_steps == 6


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    module = small.module(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    memory = small.Memory()
    runner = small.trainer(tmp_path, logger=memory, log_every_n_steps=1, gradient_clip_val=1e-2)
    runner.fit(module, datamodule=small.Data([small.batch()]))
    moved = [(p - before[n]).double() for n, p in module.named_parameters() if n in before]
    norm = torch.stack([m.norm() for m in moved]).norm().item()
    assert norm == pytest.approx(1e-2, rel=1e-2)
    # What is logged is the norm before clipping.
    assert memory.values("train/grad_norm/student")[0] > 1e-2


def test_learning_rate_scales_with_the_global_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rate(batch_size: int | None, lr_batch: int | None) -> float:
        module = small.module(
            lr_batch=lr_batch, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)
        )
        data = small.Data([small.batch(seed=s) for s in range(4)])
        if batch_size is not None:
            data.batch_size = batch_size  # type: ignore[attr-defined]
        steps = Steps()
        small.trainer(tmp_path, steps, accumulate_grad_batches=2).fit(module, datamodule=data)
        return steps.rates[0]

    assert rate(64, 256) == pytest.approx(0.1 * 64 * 2 / 256)
    assert rate(64, None) == pytest.approx(0.1)
    with caplog.at_level(logging.WARNING, "multikd"):
        assert rate(None, 256) == pytest.approx(0.1)
    assert "no batch_size" in caplog.text


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    runner = small.trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        runner.fit(small.module(), datamodule=small.Data([small.batch()]))


# ---------------------------------------------------------------------- logs


class GradientNorms(pl.Callback):
    """The norms, computed by hand where the module logs them."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        def norm(parameters: Any) -> float:
            squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
            return math.sqrt(sum(float(s) for s in squares))

        self.norms.append({"student": norm(module.student.parameters())})
        for name in module.teacher_names:
            self.norms[-1][name] = norm(module.ladder.teacher_parameters(name))


def test_every_term_weight_share_and_norm_is_logged(tmp_path: Path) -> None:
    memory, norms, notes = small.Memory(), GradientNorms(), small.Notes()
    module = small.module(dropper=HardestKept(), balancer=UncertaintyWeights())
    data = small.Data([small.batch(seed=s) for s in range(4)], [small.batch(seed=9)])
    small.trainer(tmp_path, norms, notes, logger=memory, log_every_n_steps=2).fit(
        module, datamodule=data
    )
    assert memory.steps("train/loss") == [1, 3]
    assert memory.values("train/loss") == pytest.approx([notes.totals[1], notes.totals[3]])
    for name in module.teacher_names:
        losses = [step[name] for step in notes.losses]
        assert memory.values(f"train/loss/{name}") == pytest.approx([losses[1], losses[3]])
        assert memory.values(f"epoch/loss/{name}") == pytest.approx([sum(losses) / 4])
        assert all(0 < share <= 1 for share in memory.values(f"train/kept/{name}"))
        assert memory.values(f"train/weight/{name}") == pytest.approx([0.5, 0.5], abs=0.01)
        logged = memory.values(f"train/grad_norm/{name}")
        assert logged == pytest.approx([norms.norms[1][name], norms.norms[3][name]], rel=1e-4)
        for kind in ("prediction", "target"):
            assert all(v > 0 for v in memory.values(f"train/norm/{kind}/{name}"))
        assert len(memory.values(f"val/loss/{name}")) == 1
    assert sum(memory.values(f"train/kept/{n}")[0] for n in module.teacher_names) < 3
    student = memory.values("train/grad_norm/student")
    assert student == pytest.approx(
        [norms.norms[1]["student"], norms.norms[3]["student"]], rel=1e-4
    )
    assert memory.values("epoch/loss") == pytest.approx([sum(notes.totals) / 4])


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any, tmp_path: Path) -> None:
    module = small.module(
        {"num_classes": 10},
        balancer=UncertaintyWeights(),
        dropper=HardestKept(),
        terms={"labels": LabelLoss()},
        ema_decay=0.9,
    )
    reference = small.module({"num_classes": 10}, terms={"labels": LabelLoss()})
    data = small.Data([small.batch(seed=s) for s in range(3)], [small.batch(seed=9)])
    notes, exact = small.Notes(), small.Notes()
    small.trainer(tmp_path, notes, precision=precision).fit(module, datamodule=data)
    small.trainer(tmp_path, exact).fit(reference, datamodule=data)
    for name in module.teacher_names:
        assert notes.losses[0][name] == pytest.approx(exact.losses[0][name], rel=0.03)
        assert all(math.isfinite(step[name]) for step in notes.losses)
    weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.student.parameters()} == {weights}
    assert {p.dtype for p in module.ladder.parameters()} == {weights}
    kept = [module.normalizers, module.balancer, module.average]
    for part in kept:
        assert part is not None
        dtypes = {t.dtype for t in part.state_dict().values() if t.is_floating_point()}
        assert dtypes == {torch.float32}
    # Statistics of unrounded features, not of rounded ones.
    for name in module.teacher_names:
        for key, value in module.normalizer(name).state_dict().items():
            if value.is_floating_point():
                expected = reference.normalizer(name).state_dict()[key]
                assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6), (name, key)


def test_the_average_moves_where_bfloat16_would_stand_still(tmp_path: Path) -> None:
    module = small.module(ema_decay=0.9999)
    assert module.average is not None
    module.average.updates += 1_000_000  # past the warm-up of the decay
    start = {n: p.clone() for n, p in module.average.student.named_parameters()}
    small.trainer(tmp_path, precision="bf16-true").fit(
        module, datamodule=small.Data([small.batch()])
    )
    moved = [
        n for n, p in module.average.student.named_parameters() if not torch.equal(p, start[n])
    ]
    assert len(moved) > 30


# ---------------------------------------------------------------------- inference


def test_prediction_gives_the_summaries_of_the_inference_student(tmp_path: Path) -> None:
    module = small.module(ema_decay=0.9)
    data = small.Data([], [small.batch()])
    data.predict_dataloader = lambda: small.Batches(small.batch())  # type: ignore[method-assign]
    (rows,) = small.trainer(tmp_path).predict(module, datamodule=data)  # type: ignore[misc]
    assert rows["features"].patches is None
    assert module.average is not None
    images = small.batch().views[0].float() / 255
    with torch.no_grad():
        expected: StudentOutput = module.average.student(images)
    assert torch.equal(rows["features"].summary, expected.features.summary)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_compiled_student_gives_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and differentiated as always; only the generation of machine code is left out.
    compiling = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiling)
    notes = {}
    for compiled in (False, True):
        module = small.module(teachers=small.teachers(1), compile_student=compiled)
        notes[compiled] = small.Notes()
        small.trainer(tmp_path, notes[compiled]).fit(
            module, datamodule=small.Data([small.batch(seed=s) for s in range(2)])
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # student and ladder
    assert notes[True].totals == pytest.approx(notes[False].totals, rel=1e-4)
    assert set(module.state_dict()) == set(small.module(teachers=small.teachers(1)).state_dict())
