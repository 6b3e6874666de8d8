"""KNNProbe: the direct k-NN on the same features, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks
from torch import Tensor

from multikd.callbacks import KNNProbe, LinearProbe
from multikd.data.module import ShardDataModule
from multikd.data.views import EvalViews
from multikd.evaluation.knn import knn_predict
from multikd.modules import DistillationModule

# 23 scored and 31 voting images in batches of 4: fillers at the end, and on two ranks a batch of
# nothing else.
SCORED, VOTING = 23, 31


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knn")
    make_shards(folder, [20, SCORED - 20], name="val")
    make_shards(folder, [VOTING], name="bank", size=(40, 36))  # other images
    return folder


def data_of(folder: Path, bank: bool = True, batch: int = 4) -> ShardDataModule:
    urls = {name: sorted(map(str, folder.glob(f"{name}-*.tar"))) for name in ("val", "bank")}
    return ShardDataModule(
        urls["bank"],
        val=urls["val"],
        bank=urls["bank"] if bank else None,
        train_views=EvalViews(32),
        batch_size=batch,
        num_workers=0,
    )


def direct(module: DistillationModule, folder: Path, k: int) -> float:
    """By the definition: every image once, in one process, with the inference student."""
    data = data_of(folder, batch=1)
    data._ranks = lambda: (0, 1)  # type: ignore[method-assign]
    module.eval()

    def features(role: str) -> tuple[Tensor, Tensor]:
        summaries, labels = [], []
        for batch in data.eval_dataloader(role):
            with torch.no_grad():
                student = module.inference_student
                summaries.append(student(batch.views[0].float() / 255).features.summary)
            labels.append(batch.labels)
        return torch.cat(summaries), torch.cat(labels)  # type: ignore[arg-type]

    (queries, truth), (bank, votes) = features("val"), features("bank")
    assert (len(queries), len(bank)) == (SCORED, VOTING)
    return float((knn_predict(bank, votes, queries, k=k) == truth).double().mean())


@pytest.mark.parametrize("k", [1, 5])
def test_it_equals_the_direct_knn(folder: Path, tmp_path: Path, k: int) -> None:
    module = small.module(ema_decay=0.5, validate_losses=False)
    runner = small.trainer(tmp_path, KNNProbe(k=k))
    runner.fit(module, datamodule=data_of(folder))
    got = float(runner.callback_metrics["val/knn"])
    assert got == pytest.approx(direct(module, folder, k))
    assert 0.0 < got < 0.6  # labels say nothing of these images


class Features(pl.Callback):
    """Everything that the probe could have seen."""

    def __init__(self) -> None:
        self.seen = 0

    def on_validation_batch_end(self, trainer: Any, module: Any, out: Any, *_: Any) -> None:
        self.seen += len(out["labels"])


def on_ranks(folder: Path, out: Path) -> dict[str, float]:
    module = small.module(validate_losses=False)
    features = Features()
    runner = small.ddp_trainer(out, features, KNNProbe(k=5), LinearProbe(c=0.1))
    runner.fit(module, datamodule=data_of(folder))
    return {
        "knn": float(runner.callback_metrics["val/knn"]),
        "linear": float(runner.callback_metrics["val/linear"]),
        "direct": direct(module, folder, 5),
        "seen": features.seen,
    }


def test_on_two_ranks_with_filler_rows(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, folder, tmp_path)
    assert first["knn"] == second["knn"] == pytest.approx(first["direct"])
    assert first["seen"] + second["seen"] == 24 + 32  # with fillers
    assert first["linear"] == second["linear"] == pytest.approx(round(first["linear"] * 23) / 23)


def test_it_scores_every_nth_epoch_and_whenever_validate_asks(folder: Path, tmp_path: Path) -> None:
    memory = small.Memory()
    module = small.module(validate_losses=False)
    runner = small.trainer(
        tmp_path, KNNProbe(k=3, every_n_epochs=2), logger=memory, max_epochs=5,
        num_sanity_val_steps=1,
    )  # fmt: skip
    runner.fit(module, datamodule=data_of(folder))
    assert len(memory.values("val/knn")) == 2
    memory.rows.clear()
    runner.validate(module, datamodule=data_of(folder), verbose=False)
    assert len(memory.values("val/knn")) == 1


def test_without_a_bank_there_is_no_score(folder: Path, tmp_path: Path) -> None:
    runner = small.trainer(tmp_path, KNNProbe())
    runner.fit(small.module(validate_losses=False), datamodule=data_of(folder, bank=False))
    assert "val/knn" not in runner.callback_metrics


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="k and every_n_epochs must be 1 or more"):
        KNNProbe(k=0)
