"""Heads: folded, they answer in the teacher's own space, in plain torch and timm."""

from __future__ import annotations

import ast
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multikd.checkpoints import load_student
from multikd.export import export_timm_folder, heads, standalone
from multikd.export.folding import affine_map, fold, last_linear
from multikd.export.heads import describe, write_heads
from multikd.export.trained_heads import TrainedHead, predict, trained_heads
from multikd.ladder import Ladder
from multikd.normalizers import (
    BatchStandardizers,
    CovarianceNormalizer,
    EMAStandardizers,
    FeatureNormalizer,
    FixedStandardizers,
    NoNormalizers,
    NormalizerFactory,
    PHISNormalizers,
    WhiteningNormalizers,
)
from multikd.projectors import (
    ConvProjectors,
    LinearProjectors,
    MLPProjectors,
    Projector,
    ProjectorFactory,
    ResidualMLPProjectors,
    TransformerProjectors,
)
from multikd.students import StudentEncoder
from multikd.types import TOKEN_TYPES, TokenFeatures, Widths

PROJECTORS: dict[str, ProjectorFactory] = {
    "mlp": MLPProjectors(hidden=24, last_hidden=40),
    "linear": LinearProjectors(),
    "transformer": TransformerProjectors(depth=2, layer_scale=0.5),
    "residual": ResidualMLPProjectors(hidden=24, blocks=2, patches_hidden=16),
    "conv": ConvProjectors(depth=2, hidden=16),
}
NORMALIZERS: dict[str, NormalizerFactory] = {
    "ema": EMAStandardizers(),
    "batch": BatchStandardizers(),
    "fixed": FixedStandardizers(),
    "phis": PHISNormalizers(images=300),
    "whitening": WhiteningNormalizers(images=300, floor=1e-2),
    "none": NoNormalizers(),
}
# Class token, registers, mean of patches, attention pool; CNN; NHWC map; windows.
STUDENTS = {
    "class token": ("test_vit", 32, {}),
    "registers": ("test_vit4", 32, {}),
    "mean of patches": ("test_vit2", 32, {}),
    "attention pool": ("test_vit3", 32, {}),
    "cnn": ("test_resnet", 64, {}),
    "next": ("test_convnext", 64, {"rungs": [-2, -1]}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        224,
        {"rungs": "last"},
    ),
}


def student(kind: str = "class token") -> StudentEncoder:
    name, size, settings = STUDENTS[kind]
    torch.manual_seed(0)
    return StudentEncoder(name, image_size=size, **settings).eval()


def statistics(normalizer: FeatureNormalizer) -> FeatureNormalizer:
    """Means far from 0 and deviations over four orders, as foundation models have them."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(normalizer, CovarianceNormalizer):
        tokens = {
            token: 10.0 ** (4.0 * torch.rand(width, generator=generator) - 3.0)
            * torch.randn(*shape, width, generator=generator)
            + 5.0
            for token, width, shape in (
                ("summary", normalizer.widths.summary, (300,)),
                ("patches", normalizer.widths.patches, (300, 4)),
            )
            if width is not None
        }
        normalizer.update(TokenFeatures(**tokens))
        return normalizer.eval()
    for name, buffer in normalizer.named_buffers():
        if name.endswith("_mean"):
            buffer.copy_(5.0 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("_std"):
            buffer.copy_(10.0 ** (4.0 * torch.rand(buffer.shape, generator=generator) - 3.0))
    return normalizer.eval()


def head(
    encoder: StudentEncoder,
    projectors: ProjectorFactory,
    normalizer: FeatureNormalizer,
    grid: tuple[int, int] | None = (2, 2),
) -> TrainedHead:
    torch.manual_seed(2)
    ladder = Ladder(encoder.widths, {"t": normalizer.widths}, projectors).eval()
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.normal_(std=0.2)
    return TrainedHead("t", ladder, normalizer, grid, {"encoder": "timm:some"})


def folded_ladder(trained: TrainedHead) -> Ladder:
    ladder = Ladder.__new__(Ladder)
    ladder.__dict__.update(trained.ladder.__dict__)
    parts = nn.ModuleDict({str(r): p for r, p in fold(trained).items()})
    ladder._modules = {"projectors": nn.ModuleDict({"t": parts})}
    return ladder


def error(received: TokenFeatures, expected: TokenFeatures) -> float:
    worst = 0.0
    for token in TOKEN_TYPES:
        a, b = getattr(received, token), getattr(expected, token)
        assert (a is None) == (b is None), token
        if a is not None:
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


@pytest.mark.parametrize(
    ("projectors", "normalizer", "widths"),
    [
        *((p, n, Widths(20, 12)) for p, n in product(PROJECTORS, NORMALIZERS)),
        *((p, "ema", Widths(16, 16)) for p in PROJECTORS),
        *((p, "ema", Widths(9, None)) for p in PROJECTORS if p != "conv"),
        ("conv", "phis", Widths(None, 9)),
        ("mlp", "ema", Widths(None, 9)),
    ],
)
@torch.no_grad()
def test_folded_equals_unfolded_mapped_back(projectors, normalizer, widths):
    encoder = student()
    trained = head(
        encoder, PROJECTORS[projectors], statistics(NORMALIZERS[normalizer].build(widths))
    )
    output = encoder(torch.rand(2, 3, 32, 32))
    expected = predict(trained, output)
    before = {k: v.clone() for k, v in trained.ladder.state_dict().items()}
    received = folded_ladder(trained)(output.rungs, {"t": (2, 2)})["t"]
    assert error(received, expected) < 1e-5
    # The trained ladder stays as it was, and folding matters.
    assert all(torch.equal(v, before[k]) for k, v in trained.ladder.state_dict().items())
    raw = trained.ladder(output.rungs, {"t": (2, 2)})["t"]
    assert normalizer == "none" or error(raw, expected) > 0.1
    # Against the definition, written out: s · (σ + ε) + μ.
    if normalizer == "ema" and widths.summary is not None:
        n = trained.normalizer
        plain = raw.summary.double() * (n.summary_std.double() + 1e-6) + n.summary_mean.double()
        assert torch.allclose(received.summary.double(), plain, rtol=1e-4, atol=1e-4)


class Rotated(FeatureNormalizer):
    """As PHI-S (arXiv 2410.01680): one scale, and a rotation."""

    def __init__(self, widths: Widths) -> None:
        super().__init__(widths)
        torch.manual_seed(5)
        self.rotation = torch.linalg.qr(torch.randn(widths.summary, widths.summary))[0]

    def inverse(self, features: TokenFeatures) -> TokenFeatures:
        def undo(x: Tensor) -> Tensor:
            return 3.0 * x @ self.rotation.to(x.dtype) + 7.0

        return features.map(undo)


class Crooked(FeatureNormalizer):
    def inverse(self, features: TokenFeatures) -> TokenFeatures:
        return features.map(lambda x: x + 0.1 * x**2)


class Tanh(Projector):
    def __init__(self) -> None:
        super().__init__()
        self.summary = nn.Sequential(nn.Linear(64, 8), nn.Tanh())
        self.patches = None


@pytest.mark.parametrize("projectors", PROJECTORS)
@torch.no_grad()
def test_a_rotation_is_folded_too(projectors):
    encoder = student()
    trained = head(encoder, PROJECTORS[projectors], Rotated(Widths(14, 14)))
    output = encoder(torch.rand(2, 3, 32, 32))
    assert affine_map(trained.normalizer, "summary")[0].shape == (14, 14)
    received = folded_ladder(trained)(output.rungs, {"t": (2, 2)})["t"]
    assert error(received, predict(trained, output)) < 1e-5


def test_what_is_not_affine_is_refused():
    with pytest.raises(ValueError, match=r"Crooked is not affine.*without --heads"):
        affine_map(Crooked(Widths(6, None)), "summary")


def test_a_projector_without_a_last_linear_layer_is_refused():
    with pytest.raises(ValueError, match="Tanh does not end in a linear layer"):
        last_linear(Tanh(), "summary")
    with pytest.raises(ValueError, match="layer Tanh can't be written"):
        describe(Tanh())


@pytest.mark.parametrize(
    ("kind", "projectors"),
    [
        *((k, "mlp") for k in STUDENTS if k != "swin"),
        *(("class token", p) for p in ("transformer", "residual", "conv")),
        ("registers", "transformer"),
    ],
)
@torch.no_grad()
def test_the_module_file_gives_the_same(tmp_path, kind, projectors):
    encoder = student(kind)
    trained = head(
        encoder, PROJECTORS[projectors], statistics(EMAStandardizers().build(Widths(20, 12)))
    )
    folder = export_timm_folder(encoder, tmp_path / "out")
    errors = write_heads(folder, encoder, [trained])
    assert 0 < errors["t"] < 1e-4
    loaded = standalone.load(folder)
    size = encoder.spec.image_size
    images = torch.rand(3, 3, *size)
    expected = predict(trained, encoder(images))
    received = loaded.head("t")(images)
    assert error(TokenFeatures(*received), expected) < 1e-4
    assert received.grid == expected.grid == (2, 2)
    own = encoder(images).features
    mine = loaded.encode(images)
    assert torch.equal(mine.summary, own.summary)
    assert torch.equal(mine.patches, own.patches)
    assert mine.grid == own.grid


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((f"test_{n}", 64) for n in ("byobnet", "coatnet", "convnext2", "efficientnet")),
        *((f"test_{n}", 64) for n in ("mambaout", "maxvit", "nfnet")),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("levit_128s", 224),
                ("mobilevit_xxs", 64),
                ("edgenext_xx_small", 64),
                ("eva02_tiny_patch14_224", 28),
                ("xcit_nano_12_p16_224", 32),
                ("poolformer_s12", 64),
                ("deit_tiny_distilled_patch16_224", 32),
            )
        ),
    ],
)
def test_other_families(tmp_path, name, size):
    torch.manual_seed(0)
    encoder = StudentEncoder(name, image_size=size).eval()
    trained = head(
        encoder, LinearProjectors(), statistics(EMAStandardizers().build(Widths(20, 12)))
    )
    folder = export_timm_folder(encoder, tmp_path / "out")
    assert 0 < write_heads(folder, encoder, [trained])["t"] < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_swin(tmp_path):
    test_the_module_file_gives_the_same(tmp_path, "swin", "mlp")


@torch.no_grad()
def test_another_image_size_scales_the_grid(tmp_path):
    encoder = student("cnn")
    trained = head(encoder, LinearProjectors(), FeatureNormalizer(Widths(8, 8)), grid=(4, 4))
    folder = export_timm_folder(encoder, tmp_path / "out")
    write_heads(folder, encoder, [trained])
    received = standalone.load(folder).head("t")(torch.rand(1, 3, 128, 96))
    assert received.grid == (8, 6)
    assert received.patches.shape == (1, 48, 8)


def test_a_head_that_is_off_is_refused(tmp_path, monkeypatch):
    encoder = student()
    trained = head(encoder, LinearProjectors(), statistics(EMAStandardizers().build(Widths(8, 8))))
    folder = export_timm_folder(encoder, tmp_path / "out")
    folded = heads.fold

    def off(trained: TrainedHead) -> dict[int, Projector]:
        parts = folded(trained)
        with torch.no_grad():
            last_linear(parts[0], "summary").bias += 1.0
        return parts

    monkeypatch.setattr(heads, "fold", off)
    with pytest.raises(ValueError, match=r"head 't' differs by .* from the trained ladder"):
        write_heads(folder, encoder, [trained])


def test_the_module_file_imports_nothing_of_ours(tmp_path):
    encoder = student()
    folder = export_timm_folder(encoder, tmp_path / "out")
    write_heads(
        folder, encoder, [head(encoder, LinearProjectors(), FeatureNormalizer(Widths(8, 8)))]
    )
    tree = ast.parse((folder / "student_heads.py").read_text())
    names = {
        name
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    outside = {"torch", "timm", "safetensors"}
    standard = {"__future__", "json", "math", "collections", "functools", "pathlib", "typing"}
    assert {name.partition(".")[0] for name in names} <= outside | standard


@torch.no_grad()
def test_out_of_a_checkpoint_it_is_the_trained_ladder(run):
    """Against the module that was trained, rebuilt from its config by the training code."""
    import warnings

    from multikd.fit import build_cli

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build_cli(["--config", str(run.folder / "mine.yaml")], run=False).model
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    module.eval()
    trained = load_student(run.checkpoint, "raw")
    images = torch.rand(2, 3, 32, 32)
    output = module.student(images)
    grids = [rung.grid for rung in output.rungs]
    for one in trained_heads(trained, ["vit", "next"]):
        target = module.teacher(one.name)(images)
        grid = module._grid(grids, target.grid)
        assert one.grid == grid
        prediction = module.ladder(output.rungs, {one.name: grid}, [one.name])[one.name]
        expected = module.normalizer(one.name).inverse(prediction)
        assert error(predict(one, trained.student(images)), expected) < 1e-6
        assert json.dumps(dict(one.facts))


def test_a_checkpoint_without_the_ladder_is_refused(run):
    trained = load_student(run.checkpoint)
    state = trained.checkpoint["state_dict"]
    trained.checkpoint["state_dict"] = {k: v for k, v in state.items() if "ladder" not in k}
    with pytest.raises(ValueError, match="no ladder for teacher 'vit'"):
        trained_heads(trained, ["vit"])


def test_the_source_is_copied_as_it_is(tmp_path):
    assert Path(standalone.__file__).read_text().startswith('"""A distilled student')
