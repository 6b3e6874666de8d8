"""Numbers that the published UNIC and DUNE code produced for small inputs, met to 1e-5.

``golden/*.npz`` hold numbers only; METHODS.md, section 6, tells what each is.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from multikd.ladder import Ladder
from multikd.losses.dropping import hardest_kept, weigh
from multikd.losses.feature import FeatureLoss
from multikd.normalizers import BatchStandardizers, EMAStandardizers
from multikd.projectors import MLPProjectors, TransformerProjectors
from multikd.types import Grid, TokenFeatures, Widths

FOLDER = Path(__file__).parent / "golden"
TOKENS = {"summary": "cls", "patches": "patch"}


class Golden:
    """One file, its arrays as float32 tensors."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def features(self, prefix: str, suffix: str = "") -> TokenFeatures:
        patches = self[f"{prefix}.patch{suffix}"]
        return TokenFeatures(self[f"{prefix}.cls{suffix}"], patches, (1, patches.shape[1]))

    @property
    def teachers(self) -> list[str]:
        return sorted(k.removeprefix("loss.") for k in self.arrays if k.startswith("loss."))

    def widths(self, teacher: str) -> Widths:
        return self.features(f"prediction.{teacher}").widths


@pytest.fixture(params=["unic_small", "unic_four_teachers"])
def unic(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=tolerance)


def unic_ladder(golden: Golden) -> tuple[Ladder, list[TokenFeatures]]:
    rungs: list[TokenFeatures] = []
    while f"block{len(rungs) + 1}.cls" in golden.arrays:  # rung r reads block r + 1
        rungs.append(golden.features(f"block{len(rungs) + 1}"))
    heads = {key.split(".")[4] for key in golden.arrays if key.startswith("ladder.heads.")}
    chosen = sorted(int(rung) for rung in heads)
    one = golden.teachers[0]
    hidden, last_hidden = (
        golden[f"ladder.heads.{one}.cls.{rung}.layers.0.bias"].shape[0]
        for rung in (chosen[0], chosen[-1])
    )
    ladder = Ladder(
        [rung.widths for rung in rungs],
        {name: golden.widths(name) for name in golden.teachers},
        MLPProjectors(hidden, last_hidden),
        rungs=chosen,
    )
    state = {}
    for name, rung, (token, published), layer, kind in itertools.product(
        golden.teachers, chosen, TOKENS.items(), (0, 2), ("weight", "bias")
    ):
        key = f"ladder.heads.{name}.{published}.{rung}.layers.{layer}.{kind}"
        state[f"projectors.{name}.{rung}.{token}.{layer}.{kind}"] = golden[key]
    ladder.load_state_dict(state)  # strict: nothing of ours is left over either
    return ladder, rungs


def test_unic_ladder(unic: Golden) -> None:
    ladder, rungs = unic_ladder(unic)
    grids: dict[str, Grid | None] = dict.fromkeys(unic.teachers, rungs[0].grid)
    predictions = ladder(rungs, grids)
    for name in unic.teachers:
        expected = unic.features(f"prediction.{name}")
        close(predictions[name].summary, expected.summary)
        close(predictions[name].patches, expected.patches)


def test_unic_normalizer_sequence(unic: Golden) -> None:
    momenta = unic["norm.momentum"]
    for name in unic.teachers:
        normalizer = EMAStandardizers(total_steps=len(momenta)).build(unic.widths(name))
        for step, momentum in enumerate(momenta):
            prefix = f"norm.step{step}.{name}"
            raw = unic.features(prefix, ".raw")
            assert normalizer.momentum().item() == pytest.approx(momentum.item(), abs=1e-6)
            result = normalizer(raw)
            normalizer.update(raw)
            for token, published in TOKENS.items():
                close(getattr(result, token), unic[f"{prefix}.{published}.normalized"])
                for kind in ("mean", "std"):
                    expected = unic[f"{prefix}.{published}.{kind}"].flatten()
                    close(normalizer.get_buffer(f"{token}_{kind}"), expected)


def unic_losses(golden: Golden) -> Tensor:
    last = len(golden["norm.momentum"]) - 1
    return torch.stack(
        [
            FeatureLoss()(
                golden.features(f"prediction.{name}"),
                golden.features(f"norm.step{last}.{name}", ".normalized"),
            )
            for name in golden.teachers
        ]
    )


def test_unic_losses(unic: Golden) -> None:
    for name, losses in zip(unic.teachers, unic_losses(unic), strict=True):
        close(losses, unic[f"loss.{name}"])


def test_unic_dropping_total_and_coefficients(unic: Golden) -> None:
    losses = unic_losses(unic)
    hardest = losses.argmax(0)
    recorded = iter(unic["drop.draws"].tolist())
    draws = torch.zeros_like(losses)
    for image, teacher in itertools.product(range(losses.shape[1]), range(losses.shape[0])):
        if teacher != hardest[image]:
            draws[teacher, image] = next(recorded)
    assert next(recorded, None) is None
    keep = hardest_kept(losses, draws, p=unic["drop.prob"].item())
    assert torch.equal(keep, unic["drop.keep"])
    total, weights = weigh(losses, keep, torch.ones(len(losses)), normalize="batch")
    close(total, unic["drop.total"])
    for name, coefficient in zip(unic.teachers, weights.mean(1), strict=True):
        close(coefficient, unic[f"drop.coefficient.{name}"])


def test_unic_end_to_end(unic: Golden) -> None:
    """Ladder, normaliser, losses and total in one go, as a step runs them."""
    ladder, rungs = unic_ladder(unic)
    predictions = ladder(rungs, dict.fromkeys(unic.teachers, rungs[0].grid))
    steps = len(unic["norm.momentum"])
    rows = []
    for name in unic.teachers:
        normalizer = EMAStandardizers(total_steps=steps).build(unic.widths(name))
        for step in range(steps):
            raw = unic.features(f"norm.step{step}.{name}", ".raw")
            target = normalizer(raw)
            normalizer.update(raw)
        rows.append(FeatureLoss()(predictions[name], target))
    total, _ = weigh(torch.stack(rows), unic["drop.keep"], torch.ones(len(rows)), "batch")
    close(total, unic["drop.total"])


def test_dune_projector() -> None:
    golden = Golden("dune_small")
    x, expected = golden["projector_input"], golden["projector_output"]
    inputs, outputs = x.shape[-1], expected.shape[-1]
    projector = TransformerProjectors(heads=4).build(
        Widths(inputs, inputs), Widths(outputs, outputs), last=True
    )
    state = {
        key.removeprefix("projector."): golden[key]
        for key in golden.arrays
        if key.startswith("projector.")
    }
    state = {key.replace("linear.", "summary."): value for key, value in state.items()}
    projector.load_state_dict(state)
    result = projector(TokenFeatures(x[:, 0], x[:, 1:], (1, x.shape[1] - 1)))
    close(result.summary, expected[:, 0])
    close(result.patches, expected[:, 1:])


def test_dune_normalizer_in_training_and_evaluation() -> None:
    golden = Golden("dune_small")
    width = golden["norm.eval.raw"].shape[-1]
    normalizer = BatchStandardizers(momentum=0.3).build(Widths(width, width))
    for step in range(3):
        raw = golden.features(f"norm.step{step}", ".raw")
        result = normalizer(raw)
        normalizer.update(raw)
        for token, published in TOKENS.items():
            prefix = f"norm.step{step}.{published}"
            close(getattr(result, token), golden[f"{prefix}.train"])
            for kind in ("mean", "std"):
                close(normalizer.get_buffer(f"{token}_{kind}"), golden[f"{prefix}.{kind}"])
    evaluated = normalizer.eval()(TokenFeatures(golden["norm.eval.raw"]))
    close(evaluated.summary, golden["norm.eval.normalized"])
