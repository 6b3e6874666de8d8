"""LinearProbe, and what probes do for a run: stop it early, choose its best checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from data.shard_maker import make_shards
from helpers import training as small
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from multikd.callbacks import KNNProbe, LinearProbe
from multikd.data.module import ShardDataModule
from multikd.data.views import EvalViews
from multikd.evaluation.linear import logistic_regression
from multikd.fit_summary import figures_of, fit_text
from multikd.modules import DistillationModule
from multikd.preflight import check_monitors
from multikd.shipped import find_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    make_shards(folder, [23], name="val")
    make_shards(folder, [31], name="bank", size=(40, 36))  # other images
    return folder


def data_of(folder: Path, bank: bool = True, batch: int = 8) -> ShardDataModule:
    urls = {name: sorted(map(str, folder.glob(f"{name}-*.tar"))) for name in ("val", "bank")}
    return ShardDataModule(
        urls["bank"],
        val=urls["val"],
        bank=urls["bank"] if bank else None,
        train_views=EvalViews(32),
        batch_size=batch,
        num_workers=0,
    )


def features(module: DistillationModule, data: ShardDataModule, role: str) -> tuple[Tensor, Tensor]:
    """Of every image once, in one pass of the student that is deployed."""
    module.eval()
    rows, labels = [], []
    for batch in data.eval_dataloader(role):
        real = batch.positions >= 0
        with torch.no_grad():
            out = module.inference_student(batch.views[0].float() / 255)
        rows.append(out.features.summary[real])
        labels.append(batch.labels[real])
    return torch.cat(rows), torch.cat(labels)


class Passes(pl.Callback):
    """How often the student ran in validation, and which probes held features."""

    def __init__(self) -> None:
        self.student, self.batches = 0, 0
        self.held: list[list[bool]] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        def count(*_: Any) -> None:
            self.student += 1

        self.hook = module.student.register_forward_hook(count)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batches += 1
        probes = [c for c in trainer.callbacks if isinstance(c, KNNProbe | LinearProbe)]
        self.held.append([any(p._parts.values()) for p in probes])

    def on_validation_end(self, *_: Any) -> None:
        self.hook.remove()


def test_it_equals_the_direct_fit_and_shares_one_pass_with_the_knn(
    folder: Path, tmp_path: Path
) -> None:
    module = small.module(validate_losses=False)
    passes, probes = Passes(), (KNNProbe(k=3), LinearProbe(c=0.1))
    runner = small.trainer(tmp_path, *probes, passes)
    runner.fit(module, datamodule=data_of(folder))
    queries, truth = features(module, data_of(folder), "val")
    bank, labels = features(module, data_of(folder), "bank")
    assert (len(truth), len(labels)) == (23, 31)
    answers = logistic_regression(bank, labels, queries, c=0.1).predictions
    expected = float((answers == truth).double().mean())
    assert float(runner.callback_metrics["val/linear"]) == pytest.approx(expected)
    assert "val/knn" in runner.callback_metrics
    # One forward pass a batch, whose features the first probe alone keeps, and lets go.
    assert passes.student == passes.batches == 3 + 4
    assert all(held == [True, False] for held in passes.held)
    assert all(not probe._parts and probe._gathered is None for probe in probes)


def test_probes_that_are_due_at_different_times(folder: Path, tmp_path: Path) -> None:
    memory = small.Memory()
    runner = small.trainer(
        tmp_path, KNNProbe(k=3, every_n_epochs=2), LinearProbe(c=0.1, every_n_epochs=3),
        logger=memory, max_epochs=6,
    )  # fmt: skip
    runner.fit(small.module(validate_losses=False), datamodule=data_of(folder))
    assert len(memory.values("val/knn")) == 3
    assert len(memory.values("val/linear")) == 2


def test_a_probe_stops_a_run_that_no_longer_learns(folder: Path, tmp_path: Path) -> None:
    memory = small.Memory()
    module = small.module(
        validate_losses=False, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)
    )
    stop = EarlyStopping("val/linear", mode="max", patience=2)
    runner = small.trainer(tmp_path, LinearProbe(c=0.1), stop, logger=memory, max_epochs=9)
    check_monitors(runner, data_of(folder))
    runner.fit(module, datamodule=data_of(folder))
    # The first score is the best; two that are no better end the run.
    assert len(set(memory.values("val/linear"))) == 1
    assert runner.current_epoch == 3
    assert stop.stopped_epoch == 2


def test_the_best_checkpoint_is_the_probes_and_the_command_says_so(
    folder: Path, tmp_path: Path
) -> None:
    memory = small.Memory()
    best = ModelCheckpoint(tmp_path, "best-{epoch}", monitor="val/linear", mode="max")
    module = small.module(
        validate_losses=False, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01)
    )
    runner = small.trainer(
        tmp_path, LinearProbe(c=0.1), best, logger=memory, max_epochs=5, enable_checkpointing=True
    )
    runner.fit(module, datamodule=data_of(folder))
    scores = memory.values("val/linear")
    assert len(scores) == 5
    assert len(set(scores)) > 1, "the scores must differ for a best one to be found"
    assert Path(best.best_model_path).name == f"best-epoch={scores.index(max(scores))}.ckpt"
    figures = figures_of(runner, 1.0)
    assert figures["best"]["monitor"] == "val/linear"
    assert figures["best"]["value"] == pytest.approx(max(scores))
    assert f"(val/linear {max(scores):.4g})" in fit_text(figures)
    kept = torch.load(best.best_model_path, weights_only=True)
    assert kept["epoch"] == scores.index(max(scores))


def test_one_class_in_the_bank_is_said_in_one_sentence(tmp_path: Path) -> None:
    batch = small.batch(count=4)
    batch.labels[:] = 2
    data = small.Data([small.batch()], [small.batch(seed=1)], [batch])
    runner = small.trainer(tmp_path, LinearProbe(c=1.0))
    with pytest.raises(ValueError, match=r"LinearProbe on data\.bank: .*at least two classes"):
        runner.fit(small.module(validate_losses=False), datamodule=data)


def test_bad_settings() -> None:
    for settings, words in (
        ({"c": 0.0}, "c must be above 0"),
        ({"c": float("nan")}, "c must be above 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be 1 or more"),
        ({"max_iterations": 0}, "max_iterations must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            LinearProbe(**settings)  # type: ignore[arg-type]


STOP = {"monitor": "val/linear", "mode": "max"}


@pytest.mark.parametrize(
    "callbacks, settings, words",
    [
        ([EarlyStopping(**STOP)], {}, "EarlyStopping watches val/linear, which LinearProbe logs"),
        ([KNNProbe(), EarlyStopping(**STOP)], {}, "add it to trainer.callbacks"),
        ([LinearProbe(), EarlyStopping("val/linear")], {}, "with mode min, but more is better"),
        (
            [LinearProbe(5), EarlyStopping(**STOP)],
            {},
            "EarlyStopping reads val/linear every 1 epoch and LinearProbe scores every 5: set "
            "trainer.check_val_every_n_epoch to 5, or the probe's every_n_epochs to 1",
        ),
        (
            [KNNProbe(every_n_epochs=4), ModelCheckpoint(monitor="val/knn", mode="max")],
            {"check_val_every_n_epoch": 2},
            "ModelCheckpoint reads val/knn every 2 epochs and KNNProbe scores every 4: set its "
            "every_n_epochs to 4",
        ),
        ([LinearProbe(5), EarlyStopping(**STOP)], {"check_val_every_n_epoch": 5}, None),
        ([LinearProbe(5), ModelCheckpoint(**STOP, every_n_epochs=10)], {}, None),
        ([LinearProbe(), KNNProbe(), EarlyStopping(**STOP)], {}, None),
        ([EarlyStopping("val/loss")], {}, None),
    ],
)
def test_a_watcher_that_would_read_nothing_or_the_wrong_way(
    folder: Path, tmp_path: Path, callbacks: Any, settings: Any, words: str | None
) -> None:
    runner = small.trainer(tmp_path, *callbacks, enable_checkpointing=True, **settings)
    if words is None:
        check_monitors(runner, data_of(folder))
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        check_monitors(runner, data_of(folder))


def test_without_a_bank_the_watcher_is_refused(folder: Path, tmp_path: Path) -> None:
    runner = small.trainer(tmp_path, LinearProbe(), EarlyStopping(**STOP))
    with pytest.raises(ValueError, match=r"val/linear, which needs data\.bank"):
        check_monitors(runner, data_of(folder, bank=False))


def test_the_blocks_of_the_template_are_right_once_uncommented(
    folder: Path, tmp_path: Path
) -> None:
    text = find_config("base").read_text(encoding="utf-8")
    text = re.sub(r"^(    )# (- class_path: .*Probe|- class_path: lightning.*)$", r"\1\2", text,
                  flags=re.M)  # fmt: skip
    text = re.sub(r"^(    )# (  init_args: .*)$", r"\1\2", text, flags=re.M)
    made = yaml.safe_load(text)["trainer"]["callbacks"]
    found = {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in made}
    probe = LinearProbe(**found["LinearProbe"])
    stop, best = (
        EarlyStopping(**found["EarlyStopping"]),
        ModelCheckpoint(**found["ModelCheckpoint"]),
    )
    assert best.monitor == stop.monitor == "val/knn"
    runner = small.trainer(tmp_path, KNNProbe(), probe, stop, best, enable_checkpointing=True)
    check_monitors(runner, data_of(folder))
