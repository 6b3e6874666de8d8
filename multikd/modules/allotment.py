"""Which images of a batch are whose: data sets of single teachers, and ranks that run only some.

A teacher is run on its own rows. On a rank where it has none it is not run, and *nothing* stands in
for its features: tensors of no rows and the right widths, so that normalisers and losses still meet
the other ranks in every sum over ranks, counting no image. Their statistics are therefore the same
on every rank, and so are checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from multikd.distributed import all_reduce_sum, world_size
from multikd.teachers import Teacher
from multikd.types import Batch, Grid, StudentOutput, TokenFeatures, TokenType

Rows = tuple[int, ...]


class Allotment:
    """The rows of one batch that each teacher learns from.

    Args:
        rows: teacher → rows of the batch in ascending order, maybe none. Its order is that of T.
        count: images of the batch.
        device: of the batch.
    """

    def __init__(self, rows: Mapping[str, Sequence[int]], count: int, device: torch.device) -> None:
        self.rows: dict[str, Rows] = {name: tuple(own) for name, own in rows.items()}
        self.count = count
        self.device = device
        self._indices: dict[Rows, Tensor] = {}
        self._shown: dict[Rows, Tensor] = {}

    @property
    def present(self) -> tuple[str, ...]:
        """Teachers that have images here; only they are run."""
        return tuple(name for name, own in self.rows.items() if own)

    @property
    def images(self) -> dict[str, int]:
        """How many images each teacher has here."""
        return {name: len(own) for name, own in self.rows.items()}

    def index(self, name: str) -> Tensor:
        """The rows of a teacher on the device, int64 ``(n,)``; it waits for nothing there."""
        own = self.rows[name]
        if own not in self._indices:
            index = torch.tensor(own, dtype=torch.int64)
            if self.device.type == "cuda":
                index = index.pin_memory()
            self._indices[own] = index.to(self.device, non_blocking=True)
        return self._indices[own]

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a teacher of ``(B, …)``."""
        if len(self.rows[name]) == self.count:
            return tensor
        return tensor.index_select(0, self.index(name))

    def shown(self, name: str, images: Tensor) -> Tensor:
        """A teacher's images; one tensor for teachers of the same rows, to be resized once."""
        own = self.rows[name]
        if own not in self._shown:
            self._shown[own] = self.part(name, images)
        return self._shown[own]

    def own(self, name: str, batch: Batch) -> Batch:
        """The batch of a teacher's images, without views: what its loss sees."""
        if len(self.rows[name]) == self.count:
            return batch
        return batch.take(self.rows[name], self.index(name))

    def prediction(self, name: str, made: Mapping[str, TokenFeatures], like: TokenFeatures) -> (
        TokenFeatures
    ):  # fmt: skip
        """The prediction on a teacher's rows; nothing, like its target, where it has none."""
        if name not in made:
            return like.detach()
        return made[name].map(lambda tensor: self.part(name, tensor))

    def spread(self, name: str, losses: Tensor) -> Tensor:
        """Losses of a teacher's images ``(n,)`` in their rows of ``(B,)``; 0 in the others."""
        if len(self.rows[name]) == self.count:
            return losses
        return losses.new_zeros(self.count).index_copy(0, self.index(name), losses)

    def belongs(self) -> Tensor:
        """Which image is whose, bool ``(T, B)``."""
        rows = []
        for name, own in self.rows.items():
            row = torch.zeros(self.count, dtype=torch.bool, device=self.device)
            rows.append(row.index_fill(0, self.index(name), True) if own else row)
        return torch.stack(rows)

    def means(self, losses: Tensor, belongs: Tensor) -> Tensor:
        """Values ``(T,)`` whose mean over ranks is each teacher's mean loss over its images of all
        ranks; NaN for a teacher that has none anywhere."""
        images = all_reduce_sum(belongs.sum(1))
        sums = torch.where(belongs, losses, 0.0).sum(1) * world_size()
        return torch.where(images > 0, sums / images.clamp(min=1), torch.nan)


def allot(
    batch: Batch,
    names: Sequence[str],
    claims: Mapping[str, frozenset[int]] | None,
    here: Sequence[str],
    device: torch.device,
) -> Allotment:
    """Who gets what of a batch.

    Args:
        batch: with ``origins``, or it is asked from the device.
        names: the teachers of this step, the same on every rank.
        claims: teacher → data sets (their places in the mixture); None: every image is everyone's.
        here: the teachers that this rank runs.
        device: of the images.
    """
    everything = range(len(batch))
    origins = batch.dataset.tolist() if claims and batch.origins is None else batch.origins or []

    def of(name: str) -> Sequence[int]:
        if name not in here:
            return ()
        if claims is None:
            return everything
        return [row for row, origin in enumerate(origins) if origin in claims[name]]

    return Allotment({name: of(name) for name in names}, len(batch), device)


def allotted_targets(
    allotment: Allotment,
    batch: Batch,
    images: Tensor,
    cached: bool,
    teacher: Callable[[str], Teacher],
    run: Callable[[str, Tensor], TokenFeatures],
    student_patch: int,
) -> dict[str, TokenFeatures]:
    """Each teacher's features of its own rows: from the cache, live, or of none."""
    found: dict[str, TokenFeatures] = {}
    for name, own in allotment.rows.items():
        if cached and batch.cached is not None:
            found[name] = batch.cached[name].map(lambda t, n=name: allotment.part(n, t))  # type: ignore[misc]
        elif own:
            found[name] = run(name, allotment.shown(name, images))
        else:
            size = (images.shape[2], images.shape[3])
            found[name] = nothing(teacher(name), size, student_patch, images.device)
    return found


def nothing(
    teacher: Teacher, size: Grid, student_patch: int, device: torch.device
) -> TokenFeatures:
    """A teacher's features of no image of this size, float32; it is not run, nor loaded."""
    widths, grid = teacher.widths, teacher.grid_for(size, student_patch)
    summary, patches = (
        None if width is None else torch.zeros((0, *tokens, width), device=device)
        for width, tokens in (
            (widths.summary, ()),
            (widths.patches, () if grid is None else (grid[0] * grid[1],)),
        )
    )
    return TokenFeatures(summary=summary, patches=patches, grid=grid)


def anchored(output: StudentOutput, tokens: Collection[TokenType]) -> Tensor:
    """0 as a scalar that depends on every rung, whatever it holds.

    Where no teacher of a rank has an image, or they read only some token types, the student's
    parameters still get a gradient, and DDP waits for none.
    """
    read = [getattr(rung, token) for rung in output.rungs for token in sorted(tokens)]
    corners = [tensor.flatten()[0].float() for tensor in read if tensor is not None]
    total = torch.stack(corners).sum()
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, 0.0)
