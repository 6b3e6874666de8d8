import pytest
import torch
from helpers.training import Data, batch, module, trainer
from torch import nn

from multikd.callbacks import QuantizationAware, fake_quantized
from multikd.callbacks.fake_quantized import (
    FakeQuantizedConv2d,
    fake_quantize_tensor,
    prepare,
    restore,
)
from multikd.errors import MissingExtraError
from multikd.export.calibration import CalibrationSet
from multikd.export.parity import synthetic_images
from multikd.export.quality import QualityLimits
from multikd.export.weight_only import load_weight_only, quantize_weights
from multikd.students import StudentEncoder


def test_activations_are_rounded_to_256_steps_and_pass_gradients() -> None:
    values = (torch.randn(2, 3, 8, 8) * 3).requires_grad_()
    rounded = fake_quantize_tensor(values)
    step = float((values.max() - values.min()).detach()) / 255
    assert float((rounded - values).abs().max().detach()) <= 0.51 * step
    assert len(rounded.detach().unique()) <= 256
    assert float(fake_quantize_tensor(torch.zeros(3)).abs().max()) == 0.0
    rounded.sum().backward()
    # At the two ends rounding of the zero point may clip.
    assert float((values.grad == 1).float().mean()) > 0.98


def test_convolutions_use_integer_weights_per_channel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[0] *= 100  # would swamp the others with one scale for all
    model = nn.Sequential(conv)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    prepare(model, 8, False, 32)
    assert isinstance(model[0], FakeQuantizedConv2d)
    received = model(images)
    weight = conv.weight.detach()
    scale = weight.flatten(1).abs().amax(1) / 127.5
    difference = (received - expected).abs().amax(dim=(0, 2, 3)).detach()
    assert (difference > 0).all()
    assert (difference < 27 * 0.5 * scale * float(images.abs().max())).all()
    received.square().sum().backward()
    assert conv.weight.grad is not None
    # Of each channel at most the largest weight, which is clipped, has none.
    assert (conv.weight.grad.flatten(1) == 0).sum(dim=1).max() <= 1


@pytest.mark.parametrize("name", ["test_vit4", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("bits", [8, 4])
def test_changing_and_restoring_keeps_names_parameters_and_outputs(name, bits) -> None:
    student = StudentEncoder(name, image_size=64).eval()
    images = torch.rand(2, 3, 64, 64)
    keys, parameters = list(student.state_dict()), [id(p) for p in student.parameters()]
    before = student.features(images).summary
    count = prepare(student.model, bits, True, 32)
    assert count.linear + count.convolutions > 10
    assert list(student.state_dict()) == keys
    assert [id(p) for p in student.parameters()] == parameters
    during = student.features(images).summary
    assert not torch.equal(before, during)
    similar = torch.cosine_similarity(before, during).min().detach()
    assert float(similar) > (0.99 if bits == 8 else 0.7)
    restore(student.model)
    assert [id(p) for p in student.parameters()] == parameters
    assert torch.equal(student.features(images).summary, before)
    assert not any(
        "ake" in type(m).__name__ and "uant" in type(m).__name__ for m in student.modules()
    )


def fit(model, callback, folder, steps=2):
    running = trainer(folder, callback, max_steps=steps, limit_val_batches=0)
    batches = [batch(seed=i) for i in range(steps)]
    running.fit(model, datamodule=Data(batches, batches[:1]))
    return running


def test_a_fit_trains_rounded_layers_and_leaves_ordinary_ones(tmp_path) -> None:
    first = module(ema_decay=0.9)
    seen = []

    class Watch(QuantizationAware):
        def on_train_batch_start(self, trainer, pl_module, *args):
            names = {type(m).__name__ for m in pl_module.student.modules()}
            average = {type(m).__name__ for m in pl_module.average.modules()}
            seen.append(("FakeQuantizedLinear" in names, "FakeQuantizedLinear" in average))

    weights = first.student.model.blocks[0].mlp.fc1.weight.detach().clone()
    callback = Watch()
    running = fit(first, callback, tmp_path)
    assert seen == [(True, True)] * 2
    assert not torch.equal(first.student.model.blocks[0].mlp.fc1.weight, weights)
    assert type(first.student.model.blocks[0].mlp.fc1) is nn.Linear
    running.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["quantization_aware"] == {"bits": 8, "activations": True}
    second = module(seed=3, ema_decay=0.9)
    assert list(saved["state_dict"]) == list(second.state_dict())
    # Another run goes on from there.
    start = QuantizationAware(start=str(tmp_path / "a.ckpt"))
    before = []
    start.on_fit_start = lambda trainer, pl_module: before.append(
        pl_module.student.model.blocks[0].mlp.fc1.weight.detach().clone()
    )
    fit(second, start, tmp_path, steps=1)
    assert torch.equal(before[0], first.student.model.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("rounded", [True, False])
def test_what_is_learned_survives_the_deployed_file(rounded, tmp_path) -> None:
    """Distilled from its own float form, an int4 student recovers; without rounding nothing moves.

    The file is the exporter's, read as it is deployed, on images that were not trained on.
    """
    torch.manual_seed(0)
    student = StudentEncoder("test_vit", image_size=32).eval()
    with torch.no_grad():  # outliers, as trained ViTs have them: int4 really loses
        for module in student.model.modules():
            if isinstance(module, nn.Linear):
                module.weight[:, ::16] *= 6
    noise = synthetic_images((32, 32), 96)
    train, held_out = noise[:64], (noise[64:] * 255).round().to(torch.uint8)
    with torch.no_grad():
        target = student.features(train).summary.clone()
        truth = student.features(held_out / 255).summary.clone()

    def deployed_cosine() -> float:
        quantize_weights(
            student,
            tmp_path / "q.safetensors",
            bits=4,
            data=CalibrationSet(held_out, torch.zeros(32, dtype=torch.int64)),
            limits=QualityLimits(cosine_loss=2.0, agreement_loss=2.0),
            overwrite=True,
        )
        small = load_weight_only(tmp_path / "q.safetensors")
        with torch.inference_mode():
            found = small(student.normalize(held_out / 255))
        return float(torch.cosine_similarity(found, truth).mean())

    before = deployed_cosine()
    assert before < 0.97
    if rounded:
        prepare(student.model, 4, False, 32)
    optimizer = torch.optim.Adam(student.parameters(), 3e-4)
    for step in range(40):
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        found = student.features(train[rows]).summary
        loss = (1 - torch.cosine_similarity(found, target[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rounded:
        restore(student.model)
    after = deployed_cosine()
    if rounded:
        assert 1 - after < 0.6 * (1 - before), (before, after)
    else:
        assert abs(after - before) < 0.1 * (1 - before), (before, after)


def test_refusals(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 4"):
        QuantizationAware(bits=2)
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no checkpoint of this config to start from"):
        fit(module(), QuantizationAware(start=str(tmp_path / "a.ckpt")), tmp_path)
    with pytest.raises(ValueError, match="no linear layer and no plain convolution"):
        prepare(nn.ReLU(), 8, True, 32)
    monkeypatch.setattr(fake_quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"multikd\[quantize\]"):
        QuantizationAware()
