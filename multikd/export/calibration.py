"""Images that a quantiser calibrates on and is scored with, read from shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multikd.data.dataset import SampleReader, ShardDataset
from multikd.data.order import EpochOrder
from multikd.data.sources import ShardSource
from multikd.data.views import EvalViews


@dataclass
class CalibrationSet:
    """N images of the student's size.

    Attributes:
        images: uint8 ``(N, 3, H, W)``.
        labels: int64 ``(N,)``; −1 where there is none.

    Raises:
        ValueError: other dtypes or shapes, or fewer than two images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[0] < 2:
            raise ValueError(
                "calibration images must be uint8 (N, 3, H, W) with N of 2 or more, received "
                f"{shape} {self.images.dtype}"
            )
        if self.labels.shape != shape[:1]:
            raise ValueError(
                f"labels must be ({shape[0]},), one an image, received {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)


def calibration_set(
    shards: str | list[str],
    image_size: tuple[int, int],
    *,
    limit: int = 512,
    seed: int = 0,
    batch_size: int = 64,
) -> CalibrationSet:
    """Up to ``limit`` images drawn without replacement from all shards, evaluation view.

    The draw is a permutation under ``seed``, so that a data set sorted by class gives all classes.

    Args:
        shards: folder, glob or URLs, as for ``data.train``.
        image_size: ``(H, W)``; must be square.
        limit: images at most.
        seed: of the draw.
        batch_size: images decoded at once.

    Raises:
        ValueError: no shards, or a size that is not square.
    """
    if image_size[0] != image_size[1]:
        raise ValueError(f"shards give square images, received the size {image_size}")
    if limit < 2:
        raise ValueError(f"calibration needs 2 images or more, received a limit of {limit}")
    reader = SampleReader([ShardSource(shards)])
    lengths = [source.lengths for source in reader.sources]
    if sum(len(source) for source in reader.sources) < 2:
        raise ValueError(f"calibration needs 2 images or more, {shards} has fewer")
    # The training order is the permutation: nothing is drawn twice.
    order = EpochOrder(lengths, seed=seed)
    dataset = ShardDataset(reader, order, [EvalViews(image_size[0])], seed)
    count = min(limit, order.length)
    batches = [
        dataset.__getitems__([(0, place) for place in range(start, min(start + batch_size, count))])
        for start in range(0, count, batch_size)
    ]
    return CalibrationSet(
        torch.cat([batch.views[0] for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )
