import pytest
import torch
from torch import nn

from multikd.evaluation import extract_features
from multikd.types import Batch, StudentOutput, TokenFeatures


def batches(count=3, size=4, fillers=0):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        positions = torch.arange(i * size, (i + 1) * size)
        if i == count - 1 and fillers:
            positions[-fillers:] = -1
        yield Batch(
            views=[torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)],
            labels=torch.arange(size) + i,
            keys=[f"{i}-{j}" for j in range(size)],
            dataset=torch.zeros(size, dtype=torch.long),
            positions=positions,
            samples=positions,
        )


def test_features_are_the_encoder_on_floats_in_0_1_in_order():
    got = extract_features(lambda images: images.flatten(1), batches())
    expected = torch.cat([b.views[0].float().div(255).flatten(1) for b in batches()])
    assert torch.equal(got.features, expected)
    assert float(got.features.max()) <= 1.0
    assert got.labels.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
    assert got.keys[4:6] == ["1-0", "1-1"]


def test_fillers_are_left_out():
    seen = []
    got = extract_features(lambda x: x.flatten(1), batches(fillers=3), progress=seen.append)
    assert got.features.shape == (9, 192)
    assert got.keys[-1] == "2-0"
    assert len(got.labels) == 9
    assert seen == [4, 4, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: TokenFeatures(summary=x.mean((2, 3)), patches=x.new_zeros(4, 4, 3), grid=(2, 2)),
        lambda x: TokenFeatures(patches=x.flatten(2).transpose(1, 2), grid=(8, 8)),
        lambda x: StudentOutput((), TokenFeatures(summary=x.mean((2, 3)))),
    ],
)
def test_summary_or_else_the_mean_patch(make):
    got = extract_features(make, batches())
    expected = torch.cat([b.views[0].float().div(255).mean((2, 3)) for b in batches()])
    torch.testing.assert_close(got.features, expected)


def test_a_module_runs_in_eval_and_gets_its_modes_back():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.5), nn.Linear(192, 5))
    encoder.train()
    encoder[1].eval()
    before = encoder[1].running_mean.clone()
    first = extract_features(encoder, batches())
    again = extract_features(encoder, batches())
    assert torch.equal(first.features, again.features)
    assert torch.equal(encoder[1].running_mean, before)
    assert [encoder.training, *(m.training for m in encoder)] == [True, True, False, True, True]


def test_modes_come_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    encoder = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        extract_features(encoder, batches())
    assert encoder.training


def test_results_are_ordinary_tensors_even_from_within_inference_mode():
    with torch.inference_mode():
        got = extract_features(lambda x: x.flatten(1).bfloat16(), batches())
    assert got.features.dtype == torch.float32
    head = nn.Linear(192, 2)
    head(got.features).sum().backward()
    assert head.weight.grad is not None


def test_bad_encoders_and_empty_loaders():
    with pytest.raises(ValueError, match="the loader was empty"):
        extract_features(lambda x: x.flatten(1), [])
    with pytest.raises(ValueError, match=r"one vector for each of 4 images, \(B, D\)"):
        extract_features(lambda x: x, batches())
    with pytest.raises(ValueError, match="neither a summary nor patches"):
        extract_features(lambda x: TokenFeatures(), batches())
