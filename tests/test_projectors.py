from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multikd.projectors import (
    ConvProjectors,
    LinearProjectors,
    MLPProjectors,
    ProjectorFactory,
    ResidualMLPProjectors,
    TransformerProjectors,
)
from multikd.types import TokenFeatures, Widths

FACTORIES = [
    LinearProjectors(),
    MLPProjectors(hidden=6, last_hidden=10),
    ResidualMLPProjectors(hidden=12),
    ResidualMLPProjectors(hidden=12, blocks=2, patches_hidden=8),
    TransformerProjectors(heads=2),
    TransformerProjectors(depth=2, heads=4, layer_scale=0.0, mlp_ratio=2.0),
]


def features(student: Widths, batch: int = 3) -> TokenFeatures:
    return TokenFeatures(
        summary=None if student.summary is None else torch.randn(batch, student.summary),
        patches=None if student.patches is None else torch.randn(batch, 4, student.patches),
        grid=None if student.patches is None else (2, 2),
    )


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("student", [Widths(8, 8), Widths(None, 8)], ids=["both", "patches"])
@pytest.mark.parametrize(
    "teacher", [Widths(5, 5), Widths(5, 7), Widths(5, None), Widths(None, 7)], ids=str
)
def test_every_projector_gives_what_the_teacher_has_and_trains_all_of_itself(
    factory: ProjectorFactory, student: Widths, teacher: Widths
) -> None:
    projector = factory.build(student, teacher, last=False)
    result = projector(features(student))
    assert result.widths == teacher
    assert result.grid == (None if teacher.patches is None else (2, 2))
    total = torch.zeros(())
    for tensor in (result.summary, result.patches):
        if tensor is not None:
            total = total + tensor.square().sum()
    total.backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("qkv.bias"), name


def test_a_summary_only_student_serves_a_summary_only_teacher() -> None:
    student = Widths(8, None)
    for factory in FACTORIES:
        projector = factory.build(student, Widths(5, None), last=True)
        assert projector(features(student)).widths == Widths(5, None)
        with pytest.raises(ValueError, match="teacher has patches.*rung has none"):
            factory.build(student, Widths(5, 5), last=True)


def test_summary_and_patches_do_not_mix_in_tokenwise_projectors() -> None:
    projector = MLPProjectors(hidden=6).build(Widths(8, 8), Widths(5, 5), last=False)
    one = features(Widths(8, 8))
    other = TokenFeatures(summary=torch.randn(3, 8), patches=one.patches, grid=one.grid)
    assert torch.equal(projector(one).patches, projector(other).patches)
    transformer = TransformerProjectors(heads=2, layer_scale=0.0).build(
        Widths(8, 8), Widths(5, 5), last=False
    )
    assert not torch.equal(transformer(one).patches, transformer(other).patches)


def test_a_student_without_summary_gives_the_mean_of_its_patches() -> None:
    projector = LinearProjectors().build(Widths(None, 8), Widths(5, None), last=False)
    x = features(Widths(None, 8))
    assert x.patches is not None
    layer = projector.summary
    assert isinstance(layer, nn.Linear)
    expected = x.patches.mean(1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(projector(x).summary, expected)


def test_mlp_is_linear_gelu_linear_with_the_published_start() -> None:
    factory = MLPProjectors(hidden=400, last_hidden=600)
    inner = factory.build(Widths(300, 300), Widths(200, 200), last=False)
    last = factory.build(Widths(300, 300), Widths(200, 200), last=True)
    for projector, hidden in ((inner, 400), (last, 600)):
        mlp = projector.summary
        assert isinstance(mlp, nn.Sequential)
        first, second = mlp[0], mlp[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        assert (first.in_features, first.out_features) == (300, hidden)
        for layer in (first, second):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert layer.weight.abs().max() < 0.12
            assert layer.bias.abs().max() == 0
        x = torch.randn(4, 300)
        hidden_units = x @ first.weight.T
        gelu = 0.5 * hidden_units * (1 + torch.erf(hidden_units / math.sqrt(2)))
        torch.testing.assert_close(mlp(x), gelu @ second.weight.T)


def test_transformer_shares_its_linear_layer_only_between_equal_widths() -> None:
    def linears(teacher: Widths) -> list[str]:
        projector = TransformerProjectors(heads=2).build(Widths(8, 8), teacher, last=True)
        return [n for n, _ in projector.named_parameters() if n.startswith(("summary", "patches"))]

    assert linears(Widths(5, 5)) == ["summary.weight", "summary.bias"]
    assert len(linears(Widths(5, 6))) == 4


def test_transformer_defaults_to_a_head_per_64_channels() -> None:
    projector = TransformerProjectors().build(Widths(128, 128), Widths(5, 5), last=True)
    assert projector.blocks[0].attn.num_heads == 2


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="3 attention heads do not divide.*8"):
        TransformerProjectors(heads=3).build(Widths(8, 8), Widths(5, 5), last=True)
    with pytest.raises(ValueError, match="one width, received 4 and 8"):
        TransformerProjectors(heads=2).build(Widths(4, 8), Widths(5, 5), last=True)
    with pytest.raises(ValueError, match="neither"):
        LinearProjectors().build(Widths(8, 8), Widths(None, None), last=True)
    with pytest.raises(ValueError, match="1 or more, received 0 and 3072"):
        MLPProjectors(hidden=0)


def test_projectors_build_on_the_meta_device() -> None:
    with torch.device("meta"):
        for factory in FACTORIES:
            projector = factory.build(Widths(8, 8), Widths(5, 6), last=True)
            assert all(p.is_meta for p in projector.parameters())


# --- RADIO, EUPE, Theia ---------------------------------------------------------------------------


def normed(h: torch.Tensor) -> torch.Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_the_residual_mlp_by_its_formula() -> None:
    factory = ResidualMLPProjectors(hidden=10, blocks=1, patches_hidden=6)
    projector = factory.build(Widths(8, 8), Widths(5, 7), last=True)
    given = features(Widths(8, 8))
    for layers, x, received in (
        (projector.summary, given.summary, projector(given).summary),
        (projector.patches, given.patches, projector(given).patches),
    ):
        first, block, norm, _, last = layers
        h = x @ first.weight.T + first.bias
        h = h + nn.functional.gelu(normed(h)) @ block[2].weight.T
        expected = nn.functional.gelu(normed(h) * norm.weight) @ last.weight.T + last.bias
        torch.testing.assert_close(received, expected)
    assert [first.out_features for first in (projector.summary[0], projector.patches[0])] == [10, 6]
    # Without blocks: EUPE's Linear, LN, GELU, Linear.
    plain = ResidualMLPProjectors(hidden=10).build(Widths(8, 8), Widths(5, 7), last=True)
    kinds = [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert [type(layer) for layer in plain.summary] == kinds


def test_the_convolutional_translator_sees_neighbours_in_the_right_places() -> None:
    projector = ConvProjectors(depth=2, hidden=6).build(Widths(8, 8), Widths(5, 7), last=True)
    given = TokenFeatures(torch.randn(2, 8), torch.randn(2, 30, 8), (5, 6))
    given.patches.requires_grad_()
    result = projector(given)
    assert result.widths == Widths(5, 7)
    assert result.grid == (5, 6)
    result.patches[0, 2 * 6 + 3].sum().backward()
    reached = given.patches.grad.abs().sum(2).view(2, 5, 6) > 0
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[0, 0:5, 1:6] = True  # two 3×3 convolutions around (2, 3)
    assert torch.equal(reached, expected)
    # Against torch's own on a map.
    maps = given.patches.detach().view(2, 5, 6, 8)
    for stage in projector.stages:
        maps = nn.functional.conv2d(
            maps.permute(0, 3, 1, 2), stage.conv.weight, stage.conv.bias, padding=1
        ).permute(0, 2, 3, 1)
        maps = nn.functional.layer_norm(maps, (6,)).relu()
    torch.testing.assert_close(result.patches, projector.patches(maps.reshape(2, 30, 6)))


def test_the_convolutional_translator_trains_all_of_itself() -> None:
    for teacher in (Widths(5, 7), Widths(None, 7)):
        projector = ConvProjectors().build(Widths(8, 8), teacher, last=False)
        result = projector(features(Widths(8, 8)))
        assert result.widths == teacher
        total = result.patches.square().sum()
        (total if result.summary is None else total + result.summary.square().sum()).backward()
        for name, parameter in projector.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_new_projectors_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="needs a teacher with patches"):
        ConvProjectors().build(Widths(8, 8), Widths(5, None), last=True)
    with pytest.raises(ValueError, match="rung has none"):
        ConvProjectors().build(Widths(8, None), Widths(5, 7), last=True)
    with pytest.raises(ValueError, match="needs patches on a grid"):
        ConvProjectors().build(Widths(8, 8), Widths(None, 7), last=True)(
            TokenFeatures(torch.zeros(1, 8))
        )
    for wrong in (
        lambda: ConvProjectors(depth=0),
        lambda: ConvProjectors(hidden=0),
        lambda: ResidualMLPProjectors(hidden=0),
        lambda: ResidualMLPProjectors(patches_hidden=0),
        lambda: ResidualMLPProjectors(blocks=-1),
    ):
        with pytest.raises(ValueError, match="received"):
            wrong()
