"""The objectives of PHI-S, RADIO, Theia, EUPE and C-RADIOv4, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.copies import HostCopies
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.functional import squared_angle
from multikd.losses import (
    AngleLoss,
    DistillationLoss,
    FeatureLoss,
    GramLoss,
    LossSum,
    MSELoss,
    ShiftEquivariantMSE,
)
from multikd.losses.shift import shifted, view_shift
from multikd.types import Batch, TokenFeatures, Widths

GRID = (4, 6)


def draw(seed: int, dtype: torch.dtype = torch.float32, width: int = 7) -> TokenFeatures:
    generator = torch.Generator().manual_seed(seed)
    summary = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    patches = torch.randn(3, 24, width, generator=generator, dtype=torch.float64)
    return TokenFeatures(summary.to(dtype), patches.to(dtype), GRID)


def array(features: TokenFeatures, token: str) -> np.ndarray:
    return getattr(features, token).double().numpy()


def shift_of(*cells: tuple[int, int]) -> Tensor:
    """Shifts in whole patches of ``GRID``, as view sides."""
    return torch.tensor([[down / 4, right / 6] for down, right in cells], dtype=torch.float32)


SHIFTS = shift_of((0, 0), (1, -2), (-3, 4))
LOSSES: dict[str, tuple[DistillationLoss, dict[str, Tensor]]] = {
    "mse": (MSELoss(0.3, 0.7), {}),
    "angle": (AngleLoss().eval(), {}),
    "gram": (GramLoss(), {}),
    "shift": (ShiftEquivariantMSE(), {"shift": SHIFTS}),
    "sum": (
        LossSum({"a": MSELoss(0.0, 1.0), "b": AngleLoss().eval()}, {"a": 2.0, "b": 0.5}),
        {},
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_mse_by_the_formula() -> None:
    s, y = draw(1), draw(2)
    d = [((array(s, t) - array(y, t)) ** 2).mean(-1) for t in ("summary", "patches")]
    np.testing.assert_allclose(MSELoss(0.3, 0.7)(s, y), 0.3 * d[0] + 0.7 * d[1].mean(1), rtol=1e-5)


def test_gram_by_the_formula_and_blind_to_rotation_and_scale() -> None:
    s, y = draw(1), draw(2, width=7)
    expected = []
    for a, b in zip(array(s, "patches"), array(y, "patches"), strict=True):
        a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b))
        expected.append(((a @ a.T - b @ b.T) ** 2).mean())
    np.testing.assert_allclose(GramLoss()(s, y), expected, rtol=1e-5)
    assert y.patches is not None
    turn = torch.linalg.qr(torch.randn(7, 7))[0]
    turned = TokenFeatures(patches=3.0 * y.patches @ turn, grid=GRID)
    assert GramLoss()(turned, y).max() < 1e-10


def test_the_angle_by_the_arc_cosine() -> None:
    s, y = draw(1), draw(2)
    a, b = array(s, "summary"), array(y, "summary")
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(
        squared_angle(s.summary, y.summary), np.arccos(cosines) ** 2, rtol=1e-5
    )


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 0.0999, 0.1001, 1.0, 2.0, 3.0, 3.1415])
def test_every_angle_keeps_its_digits_and_its_gradient(angle: float) -> None:
    s = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[np.cos(angle), np.sin(angle), 0.0]], dtype=torch.float64)
    value = squared_angle(s, y)
    assert value.item() == pytest.approx(angle**2, rel=1e-7, abs=1e-20)
    value.sum().backward()
    # On the unit sphere the gradient of Θ² is 2Θ, away from the target.
    np.testing.assert_allclose(s.grad, [[0.0, -2.0 * angle, 0.0]], rtol=1e-5, atol=1e-12)
    assert squared_angle(s.float(), y.float()).item() == pytest.approx(angle**2, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_angle_loss_knows_no_scale(scale: float) -> None:
    loss = AngleLoss()
    s, y = draw(1), draw(2)
    expected = AngleLoss()(s, y)
    assert s.summary is not None
    assert y.summary is not None
    received = loss(TokenFeatures(scale * s.summary), TokenFeatures(y.summary / scale))
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-6)
    assert loss(y, y).max() < 1e-9


def test_dispersion_makes_narrow_and_wide_cones_count_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 64, generator=generator)
    noise = torch.randn(4096, 64, generator=generator)
    off = torch.randn(4096, 64, generator=generator)
    values = []
    for cone in (0.02, 0.3):
        y = centre + cone * noise
        loss = AngleLoss()
        value = loss(TokenFeatures(y + 0.5 * cone * off), TokenFeatures(y)).mean()
        unit = y.double().numpy() / np.linalg.norm(y.double().numpy(), axis=1, keepdims=True)
        mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
        np.testing.assert_allclose(loss.dispersion, (np.arccos(unit @ mean) ** 2).mean(), rtol=1e-3)
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=0.05)


def _angle_on_ranks(rows: list[TokenFeatures]) -> tuple[Tensor, Tensor]:
    loss = AngleLoss(momentum=0.3)
    loss.bind(Widths(5, None))
    values = []
    for features in rows:
        assert features.summary is not None
        half = len(features.summary) // D.world_size()
        own = features.summary[D.rank() * half :][:half]
        values.append(loss(TokenFeatures(own + 0.1), TokenFeatures(own)))
    return torch.cat(values), torch.cat([loss.mean, loss.dispersion[None]])


def test_dispersion_over_ranks() -> None:
    rows = [TokenFeatures(torch.randn(8, 5) + 1.0 + step) for step in range(5)]
    rows[1].summary[:4] -= 2.0  # type: ignore[index]
    values, state = _angle_on_ranks(rows)
    (first, one), (second, other) = run_ranks(_angle_on_ranks, 2, rows)
    torch.testing.assert_close(one, state)
    assert torch.equal(one, other)
    joined = torch.cat(
        [t for pair in zip(first.split(4), second.split(4), strict=True) for t in pair]
    )
    torch.testing.assert_close(joined, values)


def test_a_first_image_alone_tells_no_dispersion() -> None:
    loss, y = AngleLoss(), draw(1)
    one = TokenFeatures(y.summary[:1])  # type: ignore[index]
    first = loss(TokenFeatures(draw(2).summary[:1]), one, None)  # type: ignore[arg-type,index]
    assert first.item() == pytest.approx(squared_angle(draw(2).summary[:1], one.summary).item())  # type: ignore[arg-type,index]
    assert loss.dispersion.item() == 1.0
    loss(y, y, None)  # type: ignore[arg-type]
    assert loss.dispersion.item() != 1.0


def test_dispersion_survives_a_checkpoint_a_nan_and_bfloat16() -> None:
    loss = AngleLoss()
    loss.bind(Widths(5, None))
    y = torch.randn(8, 5) + 1.0
    loss(TokenFeatures(y), TokenFeatures(y))
    broken = y.clone()
    broken[2] = torch.nan
    values = loss(TokenFeatures(y), TokenFeatures(broken))
    assert torch.isnan(values[2])
    assert torch.isfinite(loss.mean).all()
    assert torch.isfinite(loss.dispersion)
    again = AngleLoss()
    again.bind(Widths(5, None))
    again.to(torch.bfloat16).load_state_dict(loss.state_dict())
    assert again.mean.dtype == torch.float32
    before = again.dispersion.clone()
    first, second = loss(TokenFeatures(y + 1.0), TokenFeatures(y)), None
    second = again(TokenFeatures(y + 1.0), TokenFeatures(y))
    assert torch.equal(first, second)
    assert not torch.equal(again.dispersion, before)
    again.eval()
    before = again.dispersion.clone()
    again(TokenFeatures(y), TokenFeatures(y * 3 + 1))
    assert torch.equal(again.dispersion, before)  # evaluation learns nothing


# --- shifts ---------------------------------------------------------------------------------------


def test_shift_by_a_loop_over_places() -> None:
    s, y = draw(1), draw(2)
    received = ShiftEquivariantMSE()(s, y, shift=SHIFTS)
    a = array(s, "patches").reshape(3, 4, 6, 7)
    b = array(y, "patches").reshape(3, 4, 6, 7)
    for i, (down, right) in enumerate([(0, 0), (1, -2), (-3, 4)]):
        errors = [
            ((a[i, r, c] - b[i, r + down, c + right]) ** 2).mean()
            for r in range(4)
            for c in range(6)
            if 0 <= r + down < 4 and 0 <= c + right < 6
        ]
        assert len(errors) == (4 - abs(down)) * (6 - abs(right))
        assert received[i].item() == pytest.approx(np.mean(errors), rel=1e-5)
    plain = MSELoss(0.0, 1.0)(s, y)
    torch.testing.assert_close(ShiftEquivariantMSE()(s, y), plain)


def test_a_prediction_that_is_shifted_with_its_view_has_no_loss() -> None:
    scene = torch.randn(8, 10, 7)

    def view(down: int, right: int) -> Tensor:
        return scene[2 + down : 6 + down, 2 + right : 8 + right].reshape(24, 7)

    student, teacher = [(0, 0), (1, -2), (2, 2)], [(0, 0), (-1, 1), (-2, -2)]
    s = TokenFeatures(patches=torch.stack([view(*p) for p in student]), grid=GRID)
    y = TokenFeatures(patches=torch.stack([view(*p) for p in teacher]), grid=GRID)
    cells = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(student, teacher, strict=True)]
    loss = ShiftEquivariantMSE()
    assert torch.equal(loss(s, y, shift=shift_of(*cells)), torch.zeros(3))
    assert loss(s, y, shift=shift_of((0, 0), (0, 0), (0, 0)))[1:].min() > 0.5
    assert torch.equal(loss(y, y), torch.zeros(3))
    # No overlap at all: no loss, and no division by 0.
    assert loss(s, y, shift=shift_of((4, 0), (0, 6), (9, 9))).tolist() == [0.0, 0.0, 0.0]


def test_a_nan_outside_the_overlap_does_not_count() -> None:
    s, y = draw(1), draw(2)
    assert s.patches is not None
    s.patches.requires_grad_()
    broken = y.map(torch.clone)
    broken.patches[1, 0] = torch.nan  # type: ignore[index]
    moved, inside = shifted(broken.patches, GRID, shift_of((0, 0), (1, 0), (0, 0)))  # type: ignore[arg-type]
    assert torch.isfinite(moved[1]).all()
    assert inside[1].sum() == 18
    loss = ShiftEquivariantMSE()(s, broken, shift=shift_of((0, 0), (1, 0), (0, 0)))
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(s.patches.grad).all()  # type: ignore[arg-type]


def test_a_shift_is_applied_without_a_copy_from_the_host() -> None:
    s, y = draw(1), draw(2)
    with HostCopies() as copies:
        torch.tensor([1.0])
    assert copies.found == 1
    with HostCopies() as copies:
        ShiftEquivariantMSE()(s, y, shift=SHIFTS)
    assert copies.found == 0


def test_shifts_are_read_from_the_batch() -> None:
    batch = Batch(
        [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)] * 2,
        *(torch.zeros(2, dtype=torch.int64),),
        ["a", "b"],
        *(torch.zeros(2, dtype=torch.int64),) * 3,
        view_parameters=torch.tensor([[[0.5, 0.0, 9.0], [0.25, 0.25, 9.0]]] * 2),
    )
    torch.testing.assert_close(view_shift(batch, 0, 1), torch.tensor([[0.25, -0.25]] * 2))
    torch.testing.assert_close(view_shift(batch, 1, 0), torch.tensor([[-0.25, 0.25]] * 2))
    with pytest.raises(ValueError, match="ShiftedViews, received 2"):
        view_shift(batch, 0, 2)
    batch.view_parameters = None
    with pytest.raises(ValueError, match="received 0"):
        view_shift(batch, 0, 1)


# --- all of them ----------------------------------------------------------------------------------


@every_loss
def test_gradcheck(name: str) -> None:
    loss, extra = LOSSES[name]
    s, y = draw(1, torch.float64), draw(2, torch.float64)

    def function(summary: Tensor, patches: Tensor) -> Tensor:
        return loss(TokenFeatures(summary, patches, GRID), y, **extra)

    inputs = (s.summary.requires_grad_(), s.patches.requires_grad_())  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, inputs)


@every_loss
def test_a_loss_per_image_in_float32_under_autocast(name: str) -> None:
    loss, extra = LOSSES[name]
    s, y = draw(1), draw(2)
    plain = loss(s, y, **extra)
    assert plain.shape == (3,)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(s, y, **extra), plain)
    swapped = loss(
        s.map(lambda t: t[[1]]), y.map(lambda t: t[[1]]), **{k: v[[1]] for k, v in extra.items()}
    )
    torch.testing.assert_close(swapped, plain[[1]])


def test_sums_are_the_published_ones() -> None:
    """AM-RADIO and EUPE: cosine for the summary, 0.9 cosine + 0.1 smooth-L1 for patches."""
    s, y = draw(1), draw(2)
    radio = LossSum(
        {
            "summary": FeatureLoss(1.0, 0.0, summary=1.0, patches=0.0),
            "patches": FeatureLoss(0.9, 0.1, summary=0.0, patches=1.0),
        }
    )

    def cos(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return 1.0 - (a * b).sum(-1) / norms

    a, b = array(s, "patches"), array(y, "patches")
    d = np.abs(a - b)
    smooth = np.where(d < 1, d**2 / 2, d - 0.5).mean(-1)
    expected = cos(array(s, "summary"), array(y, "summary"))
    expected = expected + (0.9 * cos(a, b) + 0.1 * smooth).mean(1)
    np.testing.assert_allclose(radio(s, y), expected, rtol=1e-5)
    # A teacher of patches alone: that part alone.
    only = TokenFeatures(patches=y.patches, grid=GRID)
    np.testing.assert_allclose(radio(s, only), (0.9 * cos(a, b) + 0.1 * smooth).mean(1), rtol=1e-5)


def test_sums_know_what_their_parts_read() -> None:
    both = LossSum({"a": AngleLoss(), "p": ShiftEquivariantMSE()})
    assert both.tokens == ("summary", "patches")
    assert both.raw == ("summary",)
    assert both.uses_shift
    s, y = draw(1), draw(2)
    with_shift, without = both(s, y, shift=SHIFTS), both(s, y)
    assert not torch.allclose(with_shift, without)
    off = LossSum({"a": AngleLoss(), "p": ShiftEquivariantMSE()}, {"p": 0.0})
    assert (off.tokens, off.uses_shift) == (("summary",), False)


def test_mistakes() -> None:
    for wrong, words in (
        (lambda: MSELoss(0.0, 0.0), "not both 0"),
        (lambda: AngleLoss(momentum=0.0), r"momentum must be in \(0, 1\]"),
        (lambda: AngleLoss(floor=0.0), "floor must be above 0"),
        (lambda: AngleLoss(floor=torch.nan), "floor must be above 0 and finite, received nan"),
        (lambda: FeatureLoss(beta=torch.nan), "beta must be 0 or more and finite, received nan"),
        (lambda: LossSum({}), "at least one loss"),
        (lambda: LossSum({"a": MSELoss()}, {"b": 1.0}), "which is no loss here: they are a"),
        (lambda: LossSum({"a": MSELoss()}, {"a": -1.0}), "weights of 0 or more"),
        (lambda: LossSum({"a": MSELoss(), "b": AngleLoss()}), "one head can't predict both"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    summary, patches = draw(1), draw(1)
    summary.patches = summary.grid = None
    patches.summary = None
    for loss, features in (
        (MSELoss(1.0, 0.0), patches),
        (AngleLoss(), patches),
        (GramLoss(), summary),
        (ShiftEquivariantMSE(), summary),
        (LossSum({"g": GramLoss()}), summary),
    ):
        with pytest.raises(ValueError):
            loss(draw(1), features)
    with pytest.raises(ValueError, match="differ in their patches"):
        GramLoss()(draw(1), draw(2, width=9))
