"""A linear layer on frozen patch tokens, trained by mini-batches: the base of the dense protocols.

Features are standardised by the train split's exact statistics, channel by channel (what the batch
norm in front of DINOv2's linear head converges to), and the layer's output, one vector a patch, is
upsampled bilinearly to the size of the target.

Shapes: M images, N = h·w patches (row-major), D width, O outputs, (H, W) of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from multikd.evaluation.task import EncodedSplit, EvalSplit
from multikd.types import EncoderSpec, Grid

Loss = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class ProbeTraining:
    """How a patch probe is trained: AdamW, linear warm-up over a tenth, cosine to 0.

    Attributes:
        epochs: over the train images.
        batch_size: images.
        learning_rate: peak.
        weight_decay: of the weights, not of the bias.
        seed: of initial weights and order.
        device: None takes CUDA where there is any.
    """

    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                "a probe needs at least one epoch, one image a batch and a learning rate above 0, "
                f"received {self.epochs}, {self.batch_size} and {self.learning_rate}"
            )


class PatchProbe(nn.Module):
    """Standardise and project every patch: ``(B, N, D)`` → a map ``(B, O, h, w)``.

    Args:
        mean: ``(D,)`` of the train features.
        std: ``(D,)``; a constant channel has 1.
        outputs: O.
        seed: of the weights (normal, 0.01); the bias starts at 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, outputs: int, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.linear = nn.Linear(len(mean), outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.copy_(0.01 * torch.randn(outputs, len(mean), generator=generator))
            self.linear.bias.zero_()

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """Row-major patches become the map's rows and columns."""
        scaled = (patches - self.mean) / self.std
        outputs: Tensor = self.linear(scaled)
        return outputs.transpose(1, 2).reshape(len(outputs), -1, *grid)


def upsample(maps: Tensor, size: Grid) -> Tensor:
    """``(B, O, h, w)`` → ``(B, O, H, W)``, bilinear, half-pixel centres."""
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def train_patch_probe(
    encoded: EncodedSplit,
    rows: Sequence[int],
    targets: Tensor,
    outputs: int,
    loss: Loss,
    training: ProbeTraining,
) -> PatchProbe:
    """Fit a probe so that ``loss(map (B, O, h, w), targets (B, H, W), step)`` is small.

    Args:
        encoded: a split with patches.
        rows: its images to train on.
        targets: ``(len(rows), H, W)``, in the order of ``rows``.
        outputs: O.
        loss: a scalar of the map at the grid's size; it upsamples itself.
        training: settings.

    Raises:
        ValueError: no patches or no images.
    """
    if encoded.patches is None or encoded.grid is None or not len(rows):
        raise ValueError("a patch probe needs patch tokens of at least one train image")
    device = torch.device(training.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mean, std = patch_statistics(encoded, rows)
    probe = PatchProbe(mean, std, outputs, training.seed).to(device)
    decayed, free = [probe.linear.weight], [probe.linear.bias]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
    )
    per_epoch = -(-len(rows) // training.batch_size)
    steps = per_epoch * training.epochs
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = np.random.default_rng(training.seed)
    places = np.asarray(rows)
    step = 0
    for _ in range(training.epochs):
        order = generator.permutation(len(places))
        for start in range(0, len(order), training.batch_size):
            # Ascending within the batch: a memory map is then read forward.
            chosen = np.sort(order[start : start + training.batch_size])
            maps = probe(read_patches(encoded, places[chosen]).to(device), encoded.grid)
            value = loss(maps, targets[torch.from_numpy(chosen)].to(device), step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
    return probe.eval().requires_grad_(False)


def probe_maps(
    probe: PatchProbe, encoded: EncodedSplit, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Images and their maps ``(B, O, h, w)``, batch by batch, on the probe's device."""
    grid = encoded.grid
    if grid is None:
        raise ValueError("a patch probe needs patch tokens")
    device = probe.linear.weight.device
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            chosen = list(rows[start : start + batch_size])
            patches = read_patches(encoded, np.asarray(chosen)).to(device)
            yield chosen, probe(patches, grid)


def read_patches(encoded: EncodedSplit, rows: npt.NDArray[Any]) -> Tensor:
    """float32 ``(B, N, D)`` of some images, from memory or a memory map."""
    patches = encoded.patches
    if isinstance(patches, Tensor):
        return patches[torch.from_numpy(rows)].float()
    return torch.from_numpy(np.asarray(patches)[rows].astype(np.float32))


def patch_statistics(
    encoded: EncodedSplit, rows: Sequence[int], chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over all patches of ``rows``, float64 ``(D,)``.

    A channel that does not vary has standard deviation 1.
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    for start in range(0, len(rows), chunk):
        part = read_patches(encoded, np.asarray(rows[start : start + chunk]))
        flat = part.flatten(0, 1).to(torch.float64)
        # Chan et al.'s update: no difference of two large sums.
        own = flat.mean(dim=0)
        deviation = (flat - own).square().sum(dim=0)
        total = count + len(flat)
        delta = own - mean
        mean = mean + delta * len(flat) / total
        squares = squares + deviation + delta.square() * count * len(flat) / total
        count = total
    std = (squares / count).sqrt()
    noise = 1e-6 * mean.abs()
    return mean, torch.where(std <= noise, 1.0, std)


def readable_rows(encoded: EncodedSplit, split: EvalSplit) -> list[int]:
    """Images of a split that could be read."""
    faulty = set(encoded.faults)
    return [i for i, key in enumerate(split.keys) if key not in faulty]


def target_size(resolution: int, spec: EncoderSpec, image_size: int | None) -> Grid:
    """``resolution`` for the shorter side, in the aspect of what the encoder sees."""
    height, width = (image_size, image_size) if image_size else spec.image_size
    short = min(height, width)
    return round(resolution * height / short), round(resolution * width / short)


def view_size(image_size: int | None) -> Grid | None:
    """The size to ask features of; None is the encoder's own."""
    return None if image_size is None else (image_size, image_size)


def check_view_size(
    task: str, image_size: int | None, specs: Sequence[tuple[str, EncoderSpec]]
) -> None:
    """Refuse an image size that an encoder does not take.

    Raises:
        ValueError: it is below 1, or differs from the only size of an encoder.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"{task}: image_size must be at least 1, received {image_size}")
    for name, spec in specs:
        if image_size is not None and spec.fixed_size and spec.image_size != (image_size,) * 2:
            raise ValueError(
                f"{task}: the encoder {name!r} takes images of {spec.image_size[0]}×"
                f"{spec.image_size[1]} only, not {image_size}×{image_size}: leave out image_size "
                "or the encoder"
            )
