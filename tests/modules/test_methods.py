"""Every method's module: two ranks equal one process, and a broken-off run goes on exactly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data.shard_maker import make_shards
from helpers import methods, resuming
from helpers import training as small
from helpers.ddp import run_ranks
from torch.nn.parallel import DistributedDataParallel

from multikd.callbacks import FiniteLossGuard, NonFiniteLossError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

GLOBAL_BATCH = 4
# Without dropout, whose draws are a rank's own; LayerNorm and GroupNorm throughout.
PLAIN: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "influence": {},
    "mutual": {"accumulate_grad_batches": 2},
    "self": {"gradient_clip_val": 0.5},
}


class Ddp(pl.Callback):
    """What DDP was told."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.wrapped = isinstance(trainer.model, DistributedDataParallel)
        self.searches = getattr(trainer.model, "find_unused_parameters", False)


def fit(folder: Path, name: str, world: int) -> dict[str, Any]:
    # SGD: Adam makes large steps of the rounding where a gradient is nearly 0.
    module = methods.module(
        name,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        drop_path=0.0,
    )
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = methods.data(urls, val=urls, batch_size=GLOBAL_BATCH // world)
    ddp = Ddp()
    steps = resuming.run(
        module,
        data,
        folder / f"{name}-{world}",
        ddp,
        make=small.trainer if world == 1 else small.ddp_trainer,
        max_epochs=1,
        **PLAIN[name],
    )
    return {
        "keys": steps.keys,
        "totals": [row[-1] for row in steps.losses],
        "state": steps.state,
        "metrics": {k: float(v) for k, v in module.trainer.callback_metrics.items()},
        "ddp": (ddp.wrapped, ddp.searches),
    }


def fit_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: fit(folder, name, world=2) for name in PLAIN}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    make_shards(folder, [8, 16])  # 18 are trained on: four batches of four
    return folder


@pytest.fixture(scope="module")
def ranks(shards: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(fit_all, 2, shards)


@pytest.mark.parametrize("name", PLAIN)
def test_two_ranks_are_one_process(name: str, shards: Path, ranks: Any) -> None:
    one, (a, b) = fit(shards, name, world=1), [rank[name] for rank in ranks]
    assert a["ddp"] == b["ddp"] == (True, False)
    assert len(one["keys"]) == len(a["keys"]) == 4
    assert [x + y for x, y in zip(a["keys"], b["keys"], strict=True)] == one["keys"]
    totals = [(x + y) / 2 for x, y in zip(a["totals"], b["totals"], strict=True)]
    assert totals == pytest.approx(one["totals"], rel=1e-5, abs=1e-6)
    assert a["totals"] != b["totals"]  # of different images
    assert len(set(one["totals"])) == 4
    for key, value in one["state"].items():
        assert torch.equal(a["state"][key], b["state"][key]), key
        assert torch.allclose(a["state"][key].double(), value.double(), rtol=1e-5, atol=1e-5), key
    for rank in (a, b):
        for key in (k for k in one["metrics"] if k.startswith("val/")):
            assert rank["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4), key
    assert {"val/loss", "val/accuracy"} <= one["metrics"].keys()


def steps_of(folder: Path) -> dict[int, Path]:
    return {int(re.search(r"step=(\d+)", p.name)[1]): p for p in folder.glob("*.ckpt")}  # type: ignore[index]


RESUMED: dict[str, dict[str, Any]] = {
    "adaptive": {"precision": "bf16-mixed"},
    "influence": {"precision": "bf16-mixed"},
    "mutual": {"accumulate_grad_batches": 2},
    "self": {"gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_at_any_step(name: str, shards: Path, tmp_path: Path) -> None:
    """Inside an epoch and at its end: every loss, rate and tensor again, bit for bit."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    settings = {"max_epochs": 2, **RESUMED[name]}

    def data() -> Any:
        return methods.data(urls, val=urls, bank=urls, batch_size=5)  # three batches an epoch

    whole = resuming.run(
        methods.module(name), data(), tmp_path / "w", save={"every_n_train_steps": 1}, **settings
    )
    accumulate = RESUMED[name].get("accumulate_grad_batches", 1)
    found = steps_of(tmp_path / "w")
    assert len(whole.places) == 6
    for step in (1, 2) if accumulate > 1 else (2, 3):
        # An epoch of three batches is a step of two and one of one.
        done = {1: 2, 2: 3}[step] if accumulate > 1 else step
        torch.manual_seed(1234 + step)  # another process has another state
        resumed = resuming.run(
            methods.module(name, seed=9), data(), tmp_path / str(step), resume=found[step],
            **settings,
        )  # fmt: skip
        resuming.same_from(whole, resumed, divmod(done, 3))


@pytest.mark.parametrize("name", methods.METHODS)
def test_loading_is_strict(name: str) -> None:
    module = methods.module(name)
    state = module.state_dict()
    methods.module(name, seed=5).load_state_dict(state)
    for prefix in ("student", "seed", "anchors", "projectors", "trained_teacher", "average"):
        lost = next((key for key in state if key.startswith(prefix)), None)
        if lost is not None:
            part = {k: v for k, v in state.items() if k != lost}
            with pytest.raises(RuntimeError, match=re.escape(lost)):
                module.load_state_dict(part)


class Poison(pl.Callback):
    """Makes the images of one batch NaN."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index in self.batches:
            batch.views[0] = torch.full(batch.views[0].shape, float("nan"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_guard_skips_a_broken_step_whole(name: str, shards: Path, tmp_path: Path) -> None:
    """Nothing of a method is changed by a batch that is not finite; three in a row stop the run."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    states: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            states.append({k: v.clone() for k, v in module.state_dict().items()})

    module = methods.module(name)
    small.trainer(tmp_path, Poison(1), FiniteLossGuard(), Keep()).fit(
        module, datamodule=methods.data(urls)
    )
    before, after, last = states
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == ({"held_out_taken"} if name == "influence" else set())
    assert any(not torch.equal(after[k], last[k]) for k in after)
    assert all(bool(torch.isfinite(v).all()) for v in last.values())
    with pytest.raises(NonFiniteLossError, match="not finite"):
        small.trainer(tmp_path, Poison(1), FiniteLossGuard(max_in_a_row=1)).fit(
            methods.module(name), datamodule=methods.data(urls)
        )
