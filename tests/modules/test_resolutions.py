"""Several resolutions in one run: what a step makes of views of several sizes, and later stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from data.shard_maker import make_shards
from helpers import training as small
from lightning.pytorch.callbacks import ModelCheckpoint

from multikd.data.module import ShardDataModule
from multikd.data.views import LightViews
from multikd.normalizers import NoNormalizers


def module(**settings: Any) -> Any:
    made = small.module(normalizers=NoNormalizers(), **settings).train()
    logged: dict[str, Any] = {}
    made.log = lambda name, value, **_: logged.update({name: value})
    made.log_dict = lambda *_, **__: None
    return made, logged


def test_views_of_two_sizes_are_weighed_and_shown_to_so_many_images() -> None:
    made, logged = module(view_weights=[1.0, 3.0])
    data = small.batch(size=32)
    high = small.batch(size=64, count=2, seed=1)
    data.views.append(high.views[0])
    total = made.training_step(data, 0)
    low, wide = made.last_records
    assert low.losses.shape == (3, 6)
    assert wide.losses.shape == (3, 2)
    assert wide.keys == data.keys[:2]
    # 0.5 · low + 1.5 · high, as weights of mean 1, over two views.
    expected = (0.5 * low.total + 1.5 * wide.total) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(logged) >= {"train/loss_at/32", "train/loss_at/64"}
    assert logged["train/loss_at/64"] == wide.total
    # The same images alone: each size is an ordinary step.
    alone, _ = made.step(high, 0, 0, training=True)
    assert alone.item() == pytest.approx(wide.total.item(), rel=1e-6)


def test_a_view_that_comes_alone_has_its_own_weight() -> None:
    made, logged = module(view_weights=[1.0, 3.0])
    data = small.batch(size=64)
    data.view_numbers = (1,)
    total = made.training_step(data, 0)
    assert total.item() == pytest.approx(1.5 * made.last_records[0].total.item(), rel=1e-6)
    assert "train/loss_at/64" in logged


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [float("inf")]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="view_weights must be 0 or more and one of them above"):
        small.module(view_weights=weights)


class Sizes(small.Notes):
    """The size of every step's views, besides."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        super().on_train_batch_end(trainer, module, out, batch, i)
        self.sizes.append(batch.views[0].shape[-1])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_alternates_goes_on_inside_an_epoch(tmp_path: Path) -> None:
    make_shards(tmp_path / "s", [33], size=(70, 66))

    def run(checkpoint: Path | None = None) -> tuple[Sizes, Any]:
        made = small.module(
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3), view_weights=[1, 2]
        )
        data = ShardDataModule(
            str(tmp_path / "s"),
            train_views=[LightViews(32), LightViews(64)],
            view_mode="alternate",
            view_images=[None, 2],
            batch_size=4,
            num_workers=0,
        )
        notes = Sizes()
        keep = ModelCheckpoint(
            tmp_path / str(checkpoint is None), "{step}", every_n_train_steps=3, save_top_k=-1
        )
        trainer = small.trainer(tmp_path, notes, keep, enable_checkpointing=True)
        trainer.fit(made, datamodule=data, ckpt_path=checkpoint)
        return notes, made

    whole, trained = run()
    assert set(whole.sizes) == {32, 64}
    assert [len(k) for k in whole.keys] == [4 if s == 32 else 2 for s in whole.sizes]
    assert len(whole.sizes) == 8
    rest, resumed = run(tmp_path / "True" / "step=3.ckpt")
    assert rest.sizes == whole.sizes[3:]
    assert rest.keys == whole.keys[3:]
    assert rest.totals == pytest.approx(whole.totals[3:], rel=1e-6)
    for name, value in trained.state_dict().items():
        assert torch.allclose(resumed.state_dict()[name].double(), value.double()), name


def test_a_student_of_a_lower_resolution_begins_a_stage_at_a_higher(tmp_path: Path) -> None:
    """Its position embedding is resampled: at 64 px it is timm's resampling of that of 32 px."""
    low = small.student(size=32)
    with torch.no_grad():
        torch.nn.init.normal_(low.model.pos_embed, std=0.5)
    torch.save(low.encoder_state_dict(), tmp_path / "low.pth")
    high = small.student(size=64, seed=1, checkpoint=str(tmp_path / "low.pth"))
    assert high.spec.image_size == (64, 64)
    prefix = low.model.num_prefix_tokens * (not low.model.no_embed_class)
    grids = [student.grids((n, n))[-1] for student, n in ((low, 32), (high, 64))]
    expected = timm.layers.resample_abs_pos_embed(
        low.model.pos_embed.detach(), grids[1], grids[0], num_prefix_tokens=prefix
    )
    assert low.model.pos_embed.shape != high.model.pos_embed.shape
    assert torch.allclose(high.model.pos_embed, expected, atol=1e-6)
    others = {k: v for k, v in low.encoder_state_dict().items() if k != "pos_embed"}
    assert all(torch.equal(high.model.state_dict()[k], v) for k, v in others.items())
    assert torch.isfinite(high(torch.rand(2, 3, 64, 64)).features.summary).all()
