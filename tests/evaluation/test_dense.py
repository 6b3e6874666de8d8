"""Dense protocols on images whose answer is known: coloured cells on a grid that is not square,
so that swapping rows and columns cannot pass."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from helpers.subjects import MemorySplit, MemorySubject, PooledPixels
from torchmetrics.functional.classification import multiclass_jaccard_index

from multikd.evaluation.depth import (
    LinearDepth,
    bin_depths,
    depth_errors,
    scale_invariant_loss,
)
from multikd.evaluation.patch_probe import patch_statistics, read_patches
from multikd.evaluation.segmentation import (
    LinearSegmentation,
    confusion_matrix,
    iou_of_rows,
    mean_iou,
)
from multikd.evaluation.task import EncodedSplit
from multikd.teachers.encoder import BackboneEncoder
from multikd.types import TokenFeatures

COLOURS = torch.tensor([[220, 30, 30], [30, 200, 40], [40, 50, 210]], dtype=torch.uint8)
CELLS, CELL, PATCH = (4, 6), 8, 4


def coloured(count, seed, dense):
    """Random colours cell by cell; masks say which, depths are a function of them."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 3, (count, *CELLS), generator=generator)
    pixels = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    images = COLOURS[pixels].permute(0, 3, 1, 2).contiguous()
    if dense == "mask":
        targets = pixels.clone()
        targets[:, :2, :3] = 255
    else:
        targets = torch.tensor([1.0, 2.5, 6.0])[pixels]
        targets[:, :2, :3] = 0.0
    return MemorySplit(
        images,
        name=f"made/{seed}",
        classes=["red", "green", "blue"],
        targets=targets.numpy(),
        dense=dense,
    )


def splits(dense, train=24, test=10):
    return {"train": coloured(train, 1, dense), "test": coloured(test, 2, dense)}


class Transposed:
    """The same encoder with the order of its patches wrong: column by column."""

    def __init__(self, encoder):
        self.encoder, self.spec = encoder, encoder.spec

    def __call__(self, images):
        out = self.encoder(images)
        h, w = out.grid
        wrong = out.patches.unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2)
        return TokenFeatures(out.summary, wrong, out.grid)


def pixels_encoder():
    return PooledPixels((CELLS[0] * CELL, CELLS[1] * CELL), PATCH)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        patch_size=PATCH,
        img_size=(CELLS[0] * CELL, CELLS[1] * CELL),
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=0,
    ).eval()
    encoder = BackboneEncoder(model, name="tiny").eval().requires_grad_(False)
    assert encoder.spec.image_size == (32, 48)
    return encoder


TRAINING = {"epochs": 40, "batch_size": 8, "learning_rate": 1e-2}
SEGMENTATION = LinearSegmentation("made", resolution=32, train_resolution=32, **TRAINING)
DEPTH = LinearDepth(
    "made",
    resolution=32,
    train_resolution=32,
    bins=32,
    epochs=25,
    batch_size=8,
    learning_rate=0.1,
)


def test_confusion_and_iou_equal_torchmetrics_and_a_plain_loop():
    predicted = torch.randint(0, 4, (3, 9, 7))
    truth = torch.randint(0, 4, (3, 9, 7))  # class 4 is neither there nor predicted
    truth[torch.rand(3, 9, 7) < 0.2] = 255
    got = confusion_matrix(predicted, truth, 5)
    for image in range(3):
        expected = np.zeros((5, 5))
        for t, p in zip(truth[image].flatten(), predicted[image].flatten(), strict=True):
            if t != 255:
                expected[t, p] += 1
        np.testing.assert_array_equal(got[image].numpy(), expected)
    value, iou = mean_iou(got.sum(0))
    reference = multiclass_jaccard_index(
        predicted, truth, num_classes=5, ignore_index=255, average="none"
    )
    torch.testing.assert_close(iou[:4].float(), reference[:4])
    assert torch.isnan(iou[4])
    assert value == pytest.approx(float(reference[:4].mean()), abs=1e-6)
    hits = got.diagonal(dim1=1, dim2=2)
    rows = torch.stack([hits, got.sum(1) + got.sum(2) - hits], dim=1).double().numpy()
    assert iou_of_rows(rows) == pytest.approx(value, abs=1e-12)


def test_segmentation_of_coloured_patches_is_near_perfect():
    subject = MemorySubject(splits("mask"), pixels_encoder())
    SEGMENTATION.check(subject.splits, {"pixels": subject.spec})
    result = SEGMENTATION.score(subject)
    # Bilinear logits round the corners of cells, so that 1 is not reached.
    assert result.value > 0.95
    assert result.value == pytest.approx(result.statistic(result.per_sample), abs=1e-12)
    assert result.per_sample.shape == (10, 2, 3)
    assert list(result.details["per_class"]) == ["red", "green", "blue"]
    ignored = 6 * 10
    assert np.sum(result.details["confusion"]) == 10 * 32 * 48 - ignored
    wrong = SEGMENTATION.score(MemorySubject(splits("mask"), Transposed(pixels_encoder())))
    assert wrong.value < 0.45


def test_segmentation_of_a_vision_transformer(vit):
    right = SEGMENTATION.score(MemorySubject(splits("mask"), vit))
    wrong = SEGMENTATION.score(MemorySubject(splits("mask"), Transposed(vit)))
    assert right.value > 0.95
    assert wrong.value < 0.4


def test_depth_of_coloured_patches(vit):
    # Three colours leave a linear layer little to shape 32 bins with; a transformer's width more.
    for encoder, bound in ((pixels_encoder(), 1.4), (vit, 0.9)):
        right = DEPTH.score(MemorySubject(splits("depth"), encoder))
        wrong = DEPTH.score(MemorySubject(splits("depth"), Transposed(encoder)))
        # The depth's own spread is 2.1 m.
        assert right.value < bound < 2.0 < wrong.value
        assert right.metrics["delta1"] > wrong.metrics["delta1"] + 0.1
        assert right.metrics["abs rel"] < 0.5 < 0.6 < wrong.metrics["abs rel"]
        assert right.value == pytest.approx(right.statistic(right.per_sample))


def test_depth_errors_equal_a_plain_loop():
    depth, truth = 5 * torch.rand(3, 6, 5) + 0.1, 5 * torch.rand(3, 6, 5)
    truth[truth < 1] = 0
    truth[2] = 0
    valid = truth > 0
    got = depth_errors(depth, truth, valid)
    for i in range(2):
        d = depth[i][valid[i]].double().numpy()
        t = truth[i][valid[i]].double().numpy()
        assert got["rmse"][i] == pytest.approx(np.sqrt(np.mean((d - t) ** 2)), abs=1e-9)
        assert got["abs_rel"][i] == pytest.approx(np.mean(abs(d - t) / t), abs=1e-9)
        assert got["delta1"][i] == pytest.approx(np.mean(np.maximum(d / t, t / d) < 1.25))
    assert torch.isnan(got["rmse"][2])


def test_bins_and_loss_equal_their_formulas():
    maps = torch.randn(2, 8, 3, 4)
    depth = bin_depths(maps, 1.0, 8.0, (12, 16))  # four times the grid: no second resize
    finer = torch.nn.functional.interpolate(maps, (12, 16), mode="bilinear")
    weights = finer.clamp(min=0) + 0.1
    expected = sum((k + 1.0) * weights[:, k] for k in range(8)) / weights.sum(1)
    torch.testing.assert_close(depth, expected)
    truth = 1 + torch.rand(2, 12, 16)
    valid = torch.rand(2, 12, 16) < 0.7
    g = (depth[valid].log() - truth[valid].log()).double().numpy()
    # Eigen et al.: mean g² − 0.85 (mean g)², with the unbiased variance.
    eigen = np.sqrt(np.var(g, ddof=1) + np.mean(g) ** 2 - 0.85 * np.mean(g) ** 2)
    assert float(scale_invariant_loss(depth, truth, valid, False)) == pytest.approx(eigen, abs=1e-6)
    assert float(scale_invariant_loss(depth, truth, valid & False, False)) == 0


def test_half_precision_memory_maps_and_statistics(tmp_path):
    values = (3 + torch.randn(20, 6, 5)).numpy().astype(np.float16)
    values[..., 4] = 7
    mapped = np.memmap(tmp_path / "f.bin", np.float16, "w+", shape=values.shape)
    mapped[:] = values
    encoded = EncodedSplit(None, mapped, (2, 3))
    rows = [0, 3, 4, 19]
    assert read_patches(encoded, np.array(rows)).dtype == torch.float32
    mean, std = patch_statistics(encoded, rows, chunk=3)
    flat = values[rows].reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), flat.mean(0), atol=1e-9)
    np.testing.assert_allclose(std[:4].numpy(), flat.std(0)[:4], atol=1e-9)
    assert std[4] == 1


def test_unreadable_images_are_left_out():
    data = splits("mask")
    subject = MemorySubject(data, pixels_encoder())
    encoded = {s: subject.features(s, ("patches",)) for s in ("train", "test")}
    encoded["test"].faults = [data["test"].keys[3]]
    encoded["train"].faults = [data["train"].keys[0]]
    data["train"].targets[0] = 99  # would be refused if it were read
    subject.fixed = encoded
    assert SEGMENTATION.score(subject).per_sample.shape == (9, 2, 3)


def test_bad_input_says_what_was_expected():
    specs = {"pixels": pixels_encoder().spec}
    masks, depths = splits("mask"), splits("depth")
    with pytest.raises(ValueError, match="needs masks"):
        SEGMENTATION.check(depths, specs)
    with pytest.raises(ValueError, match="needs depth maps"):
        DEPTH.check(masks, specs)
    masks["train"].classes = None
    with pytest.raises(ValueError, match="class names, found 0"):
        SEGMENTATION.check(masks, specs)
    masks = splits("mask")
    masks["train"].targets[5] = 3
    with pytest.raises(ValueError, match="the mask of made/1:5: classes must be from 0 to 2"):
        SEGMENTATION.score(MemorySubject(masks, pixels_encoder()))
    depths["train"].targets[:] = 9000
    with pytest.raises(ValueError, match="give max_depth in metres"):
        DEPTH.score(MemorySubject(depths, pixels_encoder()))
    no_patches = MemorySubject({}, features={"test": EncodedSplit(torch.zeros(2, 3))}).spec
    with pytest.raises(ValueError, match="patch tokens, which the encoder 'cnn' does not have"):
        SEGMENTATION.check(splits("mask"), {"cnn": no_patches})
    for bad in ({"resolution": 0}, {"train_resolution": 0}):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            LinearSegmentation("made", **bad)
    with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
        LinearDepth("made", max_depth=0)
    with pytest.raises(ValueError, match="at least one epoch"):
        LinearDepth("made", epochs=0)
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        LinearDepth("made", image_size=0)
    fixed = dataclasses.replace(specs["pixels"], fixed_size=True)
    with pytest.raises(ValueError, match="takes images of 32×48 only, not 64×64"):
        LinearDepth("made", image_size=64).check(splits("depth"), {"one": fixed})
