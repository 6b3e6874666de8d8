from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from shard_maker import make_shards

from multikd.data.dataset import ShardDataset
from multikd.data.loader import ShardLoader
from multikd.data.module import DatasetSpec, ShardDataModule
from multikd.data.views import EvalViews, LightViews
from multikd.types import Batch, TokenFeatures

LENGTHS = [1, 37, 5, 0, 120, 14]  # 177
SETTINGS: dict[str, Any] = {"batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "dataset.json").write_text(json.dumps({"classes": [f"c{i}" for i in range(10)]}))
    return make_shards(folder, [n for n in LENGTHS if n])


def data(urls: list[str], **settings: Any) -> ShardDataModule:
    made = {"train_views": LightViews(16), **SETTINGS, **settings}
    return ShardDataModule(urls, **made)


def rank_of(module: ShardDataModule, rank: int, world: int) -> ShardDataModule:
    module._ranks = lambda: (rank, world)  # type: ignore[method-assign]
    return module


def sequence(urls: list[str], world: int, workers: int, epoch: int) -> list[tuple[int, str, Any]]:
    """(position, key, a view's digest) in the order of global batches."""
    loaders = [
        rank_of(data(urls, batch_size=16 // world, num_workers=workers), r, world)
        for r in range(world)
    ]
    steps: list[Iterator[Batch]] = []
    for module in loaders:
        loader = module.train_dataloader()
        loader.set_epoch(epoch)
        steps.append(iter(loader))
    found = []
    for batches in zip(*steps, strict=True):
        for batch in batches:
            digests = batch.views[0].double().mean(dim=(1, 2, 3)).tolist()
            found += list(zip(batch.positions.tolist(), batch.keys, digests, strict=True))
    for module in loaders:
        module.teardown()
    return found


def test_the_order_is_the_same_for_ranks_and_workers(urls: list[str]) -> None:
    for epoch in (0, 3):
        expected = sequence(urls, 1, 0, epoch)
        assert [position for position, _, _ in expected] == list(range(176))
        assert len({key for _, key, _ in expected}) == 176
        for world, workers in ((1, 2), (2, 0), (2, 2)):
            assert sequence(urls, world, workers, epoch) == expected
    assert sequence(urls, 1, 0, 1) != expected


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_torchs_own_random_numbers_alone(urls: list[str], workers: int) -> None:
    # They are the student's dropout and drop path: the number of workers must not show there.
    module = data(urls, num_workers=workers)
    loader = module.train_dataloader()
    before = torch.get_rng_state()
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert sum(1 for _ in loader) == 22
        assert torch.equal(torch.get_rng_state(), before)
    module.teardown()


def test_persistent_workers_see_the_new_epoch(urls: list[str]) -> None:
    module = data(urls, num_workers=1)
    loader = module.train_dataloader()
    keys = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        keys.append([key for batch in loader for key in batch.keys])
    module.teardown()
    assert keys[0] == [key for _, key, _ in sequence(urls, 1, 0, 0)]
    assert keys[1] == [key for _, key, _ in sequence(urls, 1, 0, 1)]


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_shows_each_sample_once(urls: list[str], world: int) -> None:
    keys: list[str] = []
    lengths = set()
    for rank in range(world):
        module = rank_of(data(urls, val=urls, bank=urls[:2], eval_batch_size=50), rank, world)
        module.setup("validate")
        val, bank = module.val_dataloader()
        lengths.add((len(val), len(bank)))
        for batch in val:
            real = batch.positions >= 0
            assert len(batch) == 50
            keys += [key for key, use in zip(batch.keys, real, strict=True) if use]
            assert (batch.labels[~real] == -1).all()
    assert sorted(keys) == sorted(f"s-{number}" for number in range(177))
    assert len(lengths) == 1
    assert len(data(urls, val=urls).val_dataloader()) == 1
    assert data(urls).val_dataloader() == []


def test_mixture_and_what_others_ask(urls: list[str]) -> None:
    mixture = {"a": DatasetSpec(urls[:2], 3.0), "b": DatasetSpec(urls[2:])}
    module = ShardDataModule(mixture, train_views=LightViews(16), epoch_length=400, **SETTINGS)
    module.setup("fit")
    assert (module.steps_per_epoch(), module.steps_per_epoch(2)) == (50, 25)
    counts = torch.cat([batch.dataset for batch in module.train_dataloader()]).bincount()
    assert counts.tolist() == [300, 100]
    assert module.classes == [f"c{i}" for i in range(10)]
    facts = module.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["sets"]["train"]["a"] == {
        "samples": 38,
        "shards": 2,
        "share": 0.75,
        "faults": {},
    }


# Lightning 2.6 asks torch 2.14's pytree in a way that torch deprecates; nothing of ours.
lightnings_own = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Tiny(LightningModule):
    """Records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.keys: list[list[str]] = []
        self.scored: list[int] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.keys.append(batch.keys)
        loss: torch.Tensor = self.layer(batch.views[0].float().mean(dim=(2, 3)) / 255).square()
        return loss.mean()

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking:
            self.scored.append(int((batch.positions >= 0).sum()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **{**quiet, "max_epochs": 2, **settings},
    )


@lightnings_own
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_trains_on_the_order(urls: list[str], tmp_path: Path, workers: int) -> None:
    model, module = Tiny(), data(urls, val=urls, bank=urls[1:2], num_workers=workers)
    trainer(tmp_path).fit(model, datamodule=module)  # warnings are errors here
    expected = [[k for _, k, _ in sequence(urls, 1, 0, epoch)] for epoch in (0, 1)]
    assert [key for keys in model.keys for key in keys] == expected[0] + expected[1]
    assert sum(model.scored) == 2 * (177 + 37)


@lightnings_own
def test_lightnings_overfitting_repeats_its_batches(urls: list[str], tmp_path: Path) -> None:
    model = Tiny()
    trainer(tmp_path, overfit_batches=2).fit(model, datamodule=data(urls, val=urls))
    assert len(model.keys) == 4
    assert model.keys[:2] == model.keys[2:]


@lightnings_own
def test_ddp_leaves_the_loader_alone(urls: list[str], tmp_path: Path) -> None:
    """Two real processes, with Lightning's own use_distributed_sampler at its default of True."""
    seen = tmp_path / "seen"
    seen.mkdir()
    torch.set_num_threads(1)  # forked children must not wait for the parent's threads
    runner = trainer(tmp_path, strategy="ddp_fork", devices=2, max_epochs=1)
    runner.fit(Noting(seen), datamodule=data(urls, val=urls))
    ranks = [json.loads((seen / f"{rank}.json").read_text()) for rank in range(2)]
    joined = [
        key for step in zip(*(r["train"] for r in ranks), strict=True) for k in step for key in k
    ]
    assert joined == [key for _, key, _ in sequence(urls, 1, 0, 0)]
    assert sum(r["scored"] for r in ranks) == 177


class Noting(Tiny):
    """Writes down, from each rank, what it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self) -> None:
        note = {"train": self.keys, "scored": sum(self.scored)}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(note))


def features_of(batch: Batch) -> TokenFeatures:
    pixels = batch.views[0].float()
    return TokenFeatures(pixels.mean(dim=(2, 3)), pixels[:, :, :2, :2].flatten(2).mT, (2, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_computed_once_and_served(
    urls: list[str], tmp_path: Path, workers: int
) -> None:
    settings = {
        "train_views": LightViews(16, recorded=2),
        "cache": str(tmp_path / "cache"),
        "cache_dtype": "float32",
        "num_workers": workers,
        "in_memory": bool(workers),
    }
    module = data(urls, **settings)
    assert not module.cache_complete({"t": "print"})
    specs = {"t": ("print", features_of(next(iter(data(urls).train_dataloader()))))}
    stopped = module.open_cache_writer(specs)
    loader = module.precompute_dataloader(0, 2)
    assert loader is not None
    for number, batch in enumerate(loader):
        if number < 5:
            stopped.put(batch, "t", features_of(batch))
    stopped.finish()  # killed after five batches of one of two ranks
    with pytest.raises(ValueError, match="not complete for the teachers"):
        module.train_dataloader()
    writer = module.open_cache_writer(specs)
    ranks = [module.precompute_dataloader(rank, 2) for rank in range(2)]
    rows = 0
    for loader in ranks:
        assert loader is not None
        for batch in loader:
            writer.put(batch, "t", features_of(batch))
            rows += int((batch.positions >= 0).sum())
    writer.finish()
    assert rows == 2 * 177 - 5 * 8
    assert module.precompute_dataloader() is None
    module.teardown()

    again = data(urls, **settings)
    assert again.cache_complete({"t": "print"})
    loader = again.train_dataloader()
    for epoch in (0, 1, 5):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.cached is not None
            expected = features_of(batch)  # of the very views in the batch
            assert torch.equal(batch.cached["t"].summary, expected.summary)  # type: ignore[arg-type]
            assert torch.equal(batch.cached["t"].patches, expected.patches)  # type: ignore[arg-type]
    again.teardown()
    with pytest.raises(ValueError, match="fingerprint of teacher 't'"):
        again.cache_complete({"t": "another"})
    changed = {**settings, "train_views": LightViews(16, flip=0.1, recorded=2)}
    with pytest.raises(ValueError, match="'policy'"):
        data(urls, **changed).cache_complete({"t": "print"})
    with pytest.raises(ValueError, match="'data'"):
        data(urls[:2], **settings).cache_complete({"t": "print"})


def test_faults_stop_the_run_past_the_rate(tmp_path: Path) -> None:
    broken = make_shards(tmp_path, [60], broken=range(0, 60, 5))
    module = data(broken)
    with pytest.raises(ValueError, match=r"could not be read \(1[12] undecodable\)"):
        list(module.train_dataloader())
    assert len(list(data(broken, max_fault_rate=0.5).train_dataloader())) == 7


def test_setup_refuses_bad_data(urls: list[str], tmp_path: Path) -> None:
    cut, empty = tmp_path / "cut.tar", tmp_path / "empty.tar"
    cut.write_bytes(Path(urls[1]).read_bytes()[:5000])
    empty.touch()
    for train, words in (
        (str(tmp_path / "none-{0..3}.tar"), "no shard"),
        (str(cut), r"cut\.tar is truncated"),
        (str(empty), r"empty\.tar is empty"),
        ("pipe:cat x.tar", "sequential mode"),
    ):
        with pytest.raises(ValueError, match=words):
            data([train]).setup("fit")
    with pytest.raises(ValueError, match="177 samples, fewer than one global batch of 200"):
        data(urls, batch_size=200).setup("fit")
    with pytest.raises(ValueError, match=r"global batch of 200 .100 on each of 2 processes"):
        rank_of(data(urls, batch_size=100), 0, 2).setup("fit")
    with pytest.raises(ValueError, match="no shard"):
        data(urls, val=str(tmp_path / "nothing.tar")).setup("fit")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache": "c"}, "set recorded"),
        ({"train_views": []}, "at least one view policy"),
        ({"train_views": [LightViews(16), LightViews(16, recorded=2)]}, "only the first"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_fault_rate": 2.0}, "max_fault_rate"),
        ({"sequential": True}, "epoch_batches"),
        ({"sequential": True, "epoch_batches": 3, "train_views": EvalViews(16)}, "indexed mode"),
    ],
)
def test_bad_settings_are_refused(urls: list[str], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data(urls, **settings)


def test_built_from_yaml(urls: list[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ShardDataModule, "data")
    config = {
        "data": {
            "train": {"a": {"urls": urls[:2], "weight": 2}, "b": {"urls": urls[2]}},
            "val": urls[0],
            "train_views": {
                "class_path": "multikd.data.views.UnicViews",
                "init_args": {"size": 32, "scale": [0.2, 1.0], "recorded": 4},
            },
            "batch_size": 4,
        }
    }
    module = parser.instantiate(parser.parse_object(config)).data
    assert module.train_views[0].scale == (0.2, 1.0)
    assert module.train_order().quotas == (29, 14)  # 43 samples, 2 : 1
    config["data"]["train"] = urls[0]
    config["data"]["train_views"] = [{"class_path": "multikd.data.views.LightViews"}] * 2
    module = parser.instantiate(parser.parse_object(config)).data
    assert [type(policy) for policy in module.train_views] == [LightViews, LightViews]


def test_loader_is_not_a_torch_loader(urls: list[str]) -> None:
    # Lightning re-creates DataLoaders under DDP; see ShardLoader.
    loader = data(urls).train_dataloader()
    assert isinstance(loader, ShardLoader)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    assert isinstance(loader.loader.dataset, ShardDataset)
