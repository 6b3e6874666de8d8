"""FeatureWriter: what ``multikd predict`` leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data.shard_maker import make_shards
from helpers import training as small
from helpers.ddp import run_ranks

from multikd.callbacks import FeatureWriter
from multikd.data.module import ShardDataModule
from multikd.data.views import EvalViews
from multikd.modules import DistillationModule


def data_of(folder: Path) -> ShardDataModule:
    urls = sorted(map(str, folder.glob("*.tar")))
    return ShardDataModule(urls, val=urls, train_views=EvalViews(32), batch_size=4, num_workers=0)


def expected(module: DistillationModule, folder: Path) -> tuple[list[str], torch.Tensor]:
    keys, rows = [], []
    data = data_of(folder)
    data._ranks = lambda: (0, 1)  # type: ignore[method-assign]
    for batch in data.eval_dataloader("val"):
        real = batch.positions >= 0
        with torch.no_grad():
            summary = module.inference_student.eval()(batch.views[0].float() / 255).features.summary
        assert summary is not None
        keys += [k for k, r in zip(batch.keys, real.tolist(), strict=True) if r]
        rows.append(summary[real])
    return keys, torch.cat(rows)


def test_one_process_writes_every_image_once(tmp_path: Path) -> None:
    make_shards(tmp_path, [3, 7])
    module = small.module()
    runner = small.trainer(tmp_path, FeatureWriter(str(tmp_path / "out")))
    runner.predict(module, datamodule=data_of(tmp_path), return_predictions=False)
    (path,) = (tmp_path / "out").iterdir()
    written = np.load(path)
    keys, summary = expected(module, tmp_path)
    assert written["keys"].tolist() == keys == [f"s-{n}" for n in range(10)]
    assert written["labels"].tolist() == list(range(10))
    assert written["summary"].dtype == np.float32
    assert torch.equal(torch.from_numpy(written["summary"]), summary)


def on_ranks(folder: Path) -> None:
    runner = small.ddp_trainer(folder, FeatureWriter(str(folder / "out")))
    runner.predict(small.module(), datamodule=data_of(folder), return_predictions=False)


def test_ranks_write_their_own_images_without_fillers(tmp_path: Path) -> None:
    make_shards(tmp_path, [10])
    run_ranks(on_ranks, 2, tmp_path)
    paths = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in paths] == ["features-0000.npz", "features-0001.npz"]
    parts = [np.load(path) for path in paths]
    rows = {k: f for part in parts for k, f in zip(part["keys"], part["summary"], strict=True)}
    keys, summary = expected(small.module(), tmp_path)
    assert sum(len(part["keys"]) for part in parts) == len(rows) == 10
    for key, row in zip(keys, summary, strict=True):
        assert np.allclose(rows[key], row.numpy(), atol=1e-6)
