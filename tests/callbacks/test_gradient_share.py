"""Shares and cosines of teachers' gradients, against gradients taken one teacher at a time."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import training as small

from multikd.callbacks import GradientShare
from multikd.callbacks.gradient_share import shares_and_cosines, teacher_gradients
from multikd.losses import FixedWeights, HardestKept
from multikd.normalizers import EMAStandardizers


def test_the_parts_add_up_to_the_loss_and_give_its_gradient() -> None:
    module = small.module(
        dropper=HardestKept(p=0.5),
        normalizers=EMAStandardizers(total_steps=10),
        student_settings={"rungs": [-1]},
    )
    module.keeps_parts = True
    batch = small.batch()
    loss, _ = module.step(batch, 0, 0, training=True)
    parts = module.kept_parts
    assert sum(p.item() for p in parts.values()) == pytest.approx(loss.item(), rel=1e-6)
    trained = [p for p in module.student.parameters() if p.requires_grad]
    gradients = teacher_gradients(parts, trained)
    loss.backward()
    whole = torch.cat([
        torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained
    ])  # fmt: skip
    torch.testing.assert_close(sum(gradients.values()), whole, rtol=1e-4, atol=1e-7)


def test_shares_and_cosines_of_known_gradients() -> None:
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 1.0]),
                 "c": torch.tensor([-1.0, 0.0])}  # fmt: skip
    shares, cosines = shares_and_cosines(gradients)
    assert {n: s.item() for n, s in shares.items()} == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    assert cosines["a", "b"].item() == 0.0
    assert cosines["a", "c"].item() == pytest.approx(-1.0)
    nothing, _ = shares_and_cosines({"a": torch.zeros(2), "b": torch.zeros(2)})
    assert all(s.item() == 0.0 for s in nothing.values())


def test_it_logs_and_does_not_change_the_training(tmp_path: Path) -> None:
    batches = [small.batch(seed=i) for i in range(4)]
    with_it, without = small.Notes(), small.Notes()
    memory = small.Memory()
    small.trainer(tmp_path, without).fit(small.module(), datamodule=small.Data(batches))
    runner = small.trainer(tmp_path, with_it, GradientShare(every_n_steps=2), logger=memory)
    runner.fit(small.module(), datamodule=small.Data(batches))
    assert with_it.totals == without.totals
    names = ("vit", "cnn", "next")
    shares = [memory.values(f"gradient/share/{name}") for name in names]
    assert [len(s) for s in shares] == [2, 2, 2]
    assert sum(s[0] for s in shares) == pytest.approx(1.0, rel=1e-5)
    assert len(memory.values("gradient/cosine/vit/cnn")) == 2


def test_a_starved_and_a_dominating_teacher_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"vit": 1.0, "cnn": 1e-4, "next": 1e-4}
    batches = [small.batch(seed=i) for i in range(4)]
    runner = small.trainer(tmp_path, GradientShare(every_n_steps=1, patience=3))
    with caplog.at_level(logging.WARNING, "multikd"):
        runner.fit(small.module(balancer=FixedWeights(weights)), datamodule=small.Data(batches))
    told = [r.getMessage() for r in caplog.records if "gradient on the encoder" in r.getMessage()]
    assert sorted(t.split(":")[0] for t in told) == [
        "teacher 'cnn' is starved", "teacher 'next' is starved", "teacher 'vit' is dominating",
    ]  # fmt: skip


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        GradientShare(every_n_steps=0)
    with pytest.raises(ValueError, match="starved must lie"):
        GradientShare(starved=1.5)
