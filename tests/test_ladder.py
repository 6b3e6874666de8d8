from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import multikd.ladder
from multikd.grids import resample_patches
from multikd.ladder import Ladder, resolve_rungs
from multikd.losses.feature import FeatureLoss
from multikd.projectors import LinearProjectors, MLPProjectors, TransformerProjectors
from multikd.types import Grid, TokenFeatures, Widths

GRIDS: list[Grid] = [(4, 4), (2, 2), (2, 2)]
STUDENT = [Widths(6, 6), Widths(8, 8), Widths(10, 10)]
TEACHERS = {"a": Widths(5, 7), "b": Widths(4, None), "c": Widths(None, 3)}
WANTED: dict[str, Grid | None] = {"a": (3, 3), "b": None, "c": (3, 3)}


def rungs(dtype: torch.dtype = torch.float32) -> list[TokenFeatures]:
    return [
        TokenFeatures(
            torch.randn(2, w.summary or 0, dtype=dtype),
            torch.randn(2, g[0] * g[1], w.patches or 0, dtype=dtype),
            g,
        )
        for w, g in zip(STUDENT, GRIDS, strict=True)
    ]


def make(**options: object) -> Ladder:
    return Ladder(STUDENT, TEACHERS, MLPProjectors(6, 9), **options)  # type: ignore[arg-type]


def apply(sequential: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(sequential, nn.Sequential)
    first, second = sequential[0], sequential[2]
    hidden = nn.functional.gelu(x @ first.weight.T + first.bias)
    return hidden @ second.weight.T + second.bias


def test_prediction_is_the_sum_over_rungs_on_the_target_grid() -> None:
    ladder, x = make(), rungs()
    for parameter in ladder.parameters():
        nn.init.normal_(parameter)
    predictions = ladder(x, WANTED)
    assert {name: p.widths for name, p in predictions.items()} == TEACHERS
    assert [predictions[n].grid for n in "abc"] == [(3, 3), None, (3, 3)]
    for name, prediction in predictions.items():
        if prediction.summary is not None:
            parts = [apply(ladder.projectors[name][str(r)].summary, x[r].summary) for r in range(3)]
            torch.testing.assert_close(prediction.summary, sum(parts))
        if prediction.patches is not None:
            parts = [
                apply(
                    ladder.projectors[name][str(r)].patches,
                    resample_patches(x[r].patches, GRIDS[r], (3, 3)),
                )
                for r in range(3)
            ]
            torch.testing.assert_close(prediction.patches, sum(parts))


def test_only_the_students_last_rung_has_the_wide_hidden_layer() -> None:
    ladder = make(rungs=[0, -1])
    assert ladder.rungs == (0, 2)
    assert ladder.projectors["a"]["0"].summary[0].out_features == 6
    assert ladder.projectors["a"]["2"].summary[0].out_features == 9
    assert make(rungs=[0, 1]).projectors["a"]["1"].summary[0].out_features == 6


def test_each_rung_is_resampled_once_for_each_grid() -> None:
    ladder, calls = make(), []

    def count(patches: Tensor, source: Grid, target: Grid) -> Tensor:
        calls.append((source, target))
        return resample_patches(patches, source, target)

    with patch.object(multikd.ladder, "resample_patches", count):
        ladder(rungs(), {"a": (3, 3), "b": None, "c": (3, 3)})
        assert calls == [((4, 4), (3, 3)), ((2, 2), (3, 3)), ((2, 2), (3, 3))]
        calls.clear()
        ladder(rungs(), {"a": (2, 2), "b": None, "c": (2, 2)})
        assert calls == [((4, 4), (2, 2))]  # rungs on the grid are not touched


def test_only_the_asked_teachers_are_computed_and_the_rest_gets_zero_gradients() -> None:
    ladder, x = make(), rungs()
    ran: list[str] = []
    for name in TEACHERS:
        for projector in ladder.projectors[name].values():
            projector.register_forward_hook(lambda *_, name=name: ran.append(name))
    predictions = ladder(x, WANTED, ["c"])
    assert list(predictions) == ["c"]
    assert ran == ["c"] * 3
    assert predictions["c"].patches is not None
    zero = ladder.unused_zero(["a", "b"])
    assert zero.shape == ()
    assert zero.item() == 0
    (predictions["c"].patches.sum() + zero).backward()
    for name in ("a", "b"):
        parameters = ladder.teacher_parameters(name)
        assert len(parameters) == 3 * 4 * (2 if name == "a" else 1)
        assert all(p.grad is not None and (p.grad == 0).all() for p in parameters)
    assert all(p.grad is not None for p in ladder.teacher_parameters("c"))
    assert ladder.unused_zero([]).item() == 0
    assert {id(p) for n in TEACHERS for p in ladder.teacher_parameters(n)} == {
        id(p) for p in ladder.parameters()
    }


def test_gradients_through_resampling_and_loss() -> None:
    widths = [Widths(2, 2), Widths(2, 2)]
    ladder = Ladder(widths, {"a": Widths(3, 2)}, LinearProjectors()).double()
    f64 = torch.float64
    patches, summary = torch.randn(1, 12, 2, dtype=f64), torch.randn(1, 2, dtype=f64)
    other = TokenFeatures(torch.randn(1, 2, dtype=f64), torch.randn(1, 1, 2, dtype=f64), (1, 1))
    target = TokenFeatures(torch.randn(1, 3, dtype=f64), torch.randn(1, 4, 2, dtype=f64), (2, 2))
    loss = FeatureLoss()

    def function(patches: Tensor, summary: Tensor, weight: Tensor) -> Tensor:
        first = TokenFeatures(summary, patches, (4, 3))
        state = {"projectors.a.0.patches.weight": weight}
        arguments = ([first, other], {"a": (2, 2)})
        return loss(torch.func.functional_call(ladder, state, arguments)["a"], target)

    weight = ladder.projectors["a"]["0"].patches.weight.detach().clone()
    inputs = [tensor.requires_grad_() for tensor in (patches, summary, weight)]
    assert torch.autograd.gradcheck(function, inputs)


def test_sums_are_float32_under_autocast() -> None:
    # Many rungs whose parts cancel: a bfloat16 sum would keep two digits.
    widths = [Widths(4, None)] * 16
    ladder = Ladder(widths, {"a": Widths(3, None)}, LinearProjectors())
    x = [TokenFeatures(torch.randn(2, 4)) for _ in widths]
    with torch.autocast("cpu", torch.bfloat16):
        result = ladder(x, {})["a"].summary
        parts = [ladder.projectors["a"][str(r)](f).summary for r, f in enumerate(x)]
    assert result.dtype == torch.float32
    assert parts[0].dtype == torch.bfloat16
    torch.testing.assert_close(result, torch.stack(parts).float().sum(0), rtol=1e-6, atol=1e-7)


def test_transformer_projectors_see_the_grid_that_is_wanted() -> None:
    ladder = Ladder(STUDENT[2:], {"a": Widths(5, 5)}, TransformerProjectors(heads=2))
    assert ladder(rungs()[2:], {"a": (3, 3)})["a"].patches.shape == (2, 9, 5)


def test_without_a_target_grid_the_rungs_must_agree() -> None:
    ladder = make()
    with pytest.raises(ValueError, match=r"'a' have different grids .*pass the target grid"):
        ladder(rungs(), {}, ["a"])
    assert make(rungs=[1, 2])(rungs(), {}, ["a"])["a"].grid == (2, 2)


def test_resolve_rungs() -> None:
    assert resolve_rungs("all", 3) == (0, 1, 2)
    assert resolve_rungs("last", 3) == (2,)
    assert resolve_rungs([-1, 0], 3) == (0, 2)
    for wrong in ([], [0, 0], [0, -3], [3], [-4]):
        with pytest.raises(ValueError, match="different indices from -3 to 2"):
            resolve_rungs(wrong, 3)
    with pytest.raises(ValueError, match="did you mean 'last'"):
        resolve_rungs("lats", 3)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one teacher"):
        Ladder(STUDENT, {}, LinearProjectors())
    for name in ("dino.v2", "", "keys", "training"):
        with pytest.raises(ValueError, match="can't be part of a parameter's name"):
            Ladder(STUDENT, {name: Widths(5, 5)}, LinearProjectors())
    with pytest.raises(ValueError, match="built for 3 rungs, received 2"):
        make()(rungs()[:2], WANTED)
    with pytest.raises(ValueError, match="unknown teacher 'd'"):
        make()(rungs(), WANTED, ["d"])


def test_ladder_compiles_into_one_graph() -> None:
    ladder, x = make(), rungs()

    def run(patches: Tensor) -> Tensor:
        first = TokenFeatures(x[0].summary, patches, (4, 4))
        return ladder([first, *x[1:]], WANTED)["a"].patches

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0].patches), run(x[0].patches))
