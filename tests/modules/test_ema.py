"""The student's moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import training as small
from lightning.pytorch.callbacks import ModelCheckpoint

from multikd.checkpoints import CHECKPOINT_KEY, load_student
from multikd.modules import StudentAverage


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_decay_must_lie_between_0_and_1(decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay must lie strictly between 0 and 1"):
        StudentAverage(small.student(), decay)


def test_the_warmed_up_average_by_hand() -> None:
    """Against the definition in float64, with a decay that the warm-up reaches at n = 11."""
    student = small.student()
    average = StudentAverage(student, 0.6)
    name, parameter = next((n, p) for n, p in student.named_parameters() if p.ndim > 1)
    expected = parameter.detach().double()
    generator = torch.Generator().manual_seed(0)
    rates = []
    for n in range(1, 21):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        average.update(student)
        decay = min(0.6, (1 + n) / (10 + n))
        rates.append(decay)
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        got = average.student.get_parameter(name).double()
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), n
    assert rates[10] < 0.6 == rates[12]
    assert int(average.updates) == 20


def test_statistics_of_batches_are_copied() -> None:
    student = small.student("test_resnet", 64)
    average = StudentAverage(student, 0.9)
    student.train()(torch.rand(4, 3, 64, 64))
    before = dict(average.student.named_buffers())
    assert any(not torch.equal(b, before[n]) for n, b in student.named_buffers())
    average.update(student)
    now = dict(average.student.named_buffers())
    assert all(torch.equal(b, now[n]) for n, b in student.named_buffers())


def test_it_stays_in_evaluation_mode_and_float32() -> None:
    module = small.module(ema_decay=0.9, teachers=small.teachers(1)).train()
    assert module.average is not None
    assert module.student.training
    assert not any(part.training for part in module.average.modules())
    assert not any(p.requires_grad for p in module.average.parameters())
    module.to(torch.bfloat16).double()
    assert {p.dtype for p in module.average.parameters()} == {torch.float32}
    assert {p.dtype for p in module.student.parameters()} == {torch.float64}
    assert module.average.updates.dtype == torch.int64


class AtEachSave(pl.Callback):
    """The average beside the student at the moment that a step-wise checkpoint is written."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        # ModelCheckpoint saves in this hook, and before the module's own.
        self.updates.append(int(module.average.updates))


def test_it_is_up_to_date_when_a_checkpoint_is_written(tmp_path: Path) -> None:
    note = AtEachSave()
    data = small.Data([small.batch(seed=s) for s in range(4)])
    module = small.module(ema_decay=0.9)
    small.trainer(tmp_path, note, accumulate_grad_batches=2, max_epochs=2).fit(
        module, datamodule=data
    )
    assert note.updates == [0, 1, 1, 2, 2, 3, 3, 4]


CONFIG = """
model:
  init_args:
    student:
      class_path: multikd.students.StudentEncoder
      init_args: {name: test_vit, image_size: 32}
"""


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_gives_the_average_or_the_last_weights(tmp_path: Path) -> None:
    class ConfigNote(pl.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            checkpoint[CHECKPOINT_KEY] = {"version": "0", "config": CONFIG}

    paths = {}
    modules = {}
    (tmp_path / "saved").mkdir()
    for decay in (None, 0.9):
        modules[decay] = small.module(ema_decay=decay)
        saver = ModelCheckpoint(
            tmp_path / "saved", f"{decay}", save_on_train_epoch_end=decay is None
        )
        runner = small.trainer(tmp_path, ConfigNote(), saver, enable_checkpointing=True)
        runner.fit(modules[decay], datamodule=small.Data([small.batch()] * 3, [small.batch()]))
        paths[decay] = tmp_path / f"{decay}.ckpt"
        runner.save_checkpoint(paths[decay])
    averaged, raw = load_student(paths[0.9]), load_student(paths[0.9], "raw")
    assert (averaged.weights, raw.weights, load_student(paths[None]).weights) == (
        "ema",
        "raw",
        "raw",
    )
    assert modules[0.9].average is not None
    for loaded, source in ((averaged, modules[0.9].average.student), (raw, modules[0.9].student)):
        expected = source.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in loaded.student.state_dict().items())
    weight = "model.blocks.0.mlp.fc1.weight"
    assert not torch.equal(averaged.student.state_dict()[weight], raw.student.state_dict()[weight])
    assert (raw.step, raw.epoch) == (3, 1)
    # However it was written: after the run, or by Lightning at the end of an epoch.
    assert {load_student(path).epoch for path in (tmp_path / "saved").iterdir()} == {1}
    assert {t["encoder"] for t in raw.teachers.values()} == {
        "test_vit", "test_resnet", "test_convnext",
    }  # fmt: skip
    with pytest.raises(ValueError, match="had no model.ema_decay"):
        load_student(paths[None], "ema")
    with pytest.raises(ValueError, match="is a folder, not one file"):
        load_student(tmp_path)
    # Inference is by the average.
    images = small.batch().views[0]
    with torch.no_grad():
        summary = modules[0.9](images).summary
        expected_summary = averaged.student(images.float() / 255).features.summary
    assert torch.equal(summary, expected_summary)
