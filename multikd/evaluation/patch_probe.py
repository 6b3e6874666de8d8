"""A linear layer on frozen patch tokens, trained by mini-batches: the base of the dense protocols.

Features are standardised by the train split's exact statistics, channel by channel (what the batch
norm in front of DINOv2's linear head converges to), and the layer's output, one vector a patch, is
upsampled bilinearly to the size of the target.

Shapes: M images, N = h·w patches (row-major), D width, O outputs, (H, W) of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from multikd.evaluation.task import EncodedSplit, EvalSplit, Request, Task
from multikd.types import EncoderSpec, Grid, TokenType

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


@dataclass
class DenseProbe(Task):
    """What the dense tasks share: settings of the layer, sizes, and one kind of target.

    Attributes:
        image_size: side of the square images; None takes each encoder's own.
        resolution: shorter side of the targets that are scored, alike for every encoder.
        train_resolution: of the targets that are trained on.
        epochs, batch_size, learning_rate, weight_decay, seed: see ``ProbeTraining``.
    """

    data: str
    image_size: int | None = None
    resolution: int = 256
    train_resolution: int = 128
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0

    tokens: ClassVar[tuple[TokenType, ...]] = ("patches",)
    target: ClassVar[Literal["mask", "depth"]]

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.train_resolution < 1:
            raise ValueError(
                "resolution and train_resolution must be at least 1 pixel, received "
                f"{self.resolution} and {self.train_resolution}"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, received {self.image_size}")
        self.training()

    def training(self) -> ProbeTraining:
        """Of the layer."""
        return ProbeTraining(
            self.epochs, self.batch_size, self.learning_rate, self.weight_decay, self.seed
        )

    def requests(self, spec: EncoderSpec) -> Sequence[Request]:
        """Patches of both splits."""
        del spec
        return [Request(split, ("patches",), self.view_size()) for split in self.splits]

    def check(self, splits: Mapping[str, EvalSplit], specs: Mapping[str, EncoderSpec]) -> None:
        """Also refuses data without targets, and sizes that an encoder does not take."""
        super().check(splits, specs)
        name = type(self).__name__
        for split in self.splits:
            if splits[split].dense != self.target:
                kind = "masks" if self.target == "mask" else "depth maps"
                raise ValueError(
                    f"{name} on {self.data!r} needs {kind}, and the split {splits[split].name} has "
                    "none: give a data set with them"
                )
        for encoder, spec in specs.items():
            fixed = spec.fixed_size and self.image_size is not None
            if fixed and spec.image_size != (self.image_size, self.image_size):
                raise ValueError(
                    f"{name}: the encoder {encoder!r} takes images of {spec.image_size[0]}×"
                    f"{spec.image_size[1]} only, not {self.image_size}×{self.image_size}: leave "
                    "out image_size or the encoder"
                )

    def view_size(self) -> Grid | None:
        """The size to ask features of; None is the encoder's own."""
        return None if self.image_size is None else (self.image_size, self.image_size)

    def target_sizes(self, spec: EncoderSpec) -> tuple[Grid, Grid]:
        """(H, W) of targets that are trained on and scored, in the aspect that is seen."""
        height, width = self.view_size() or spec.image_size
        short = min(height, width)
        train, test = (
            (round(side * height / short), round(side * width / short))
            for side in (self.train_resolution, self.resolution)
        )
        return train, test
