"""The ladder (UNIC, arXiv 2408.05088): a prediction of each teacher from several student rungs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from multikd.errors import unknown_name
from multikd.functional import full_precision
from multikd.grids import resample_patches
from multikd.projectors import Projector, ProjectorFactory
from multikd.types import Grid, TokenFeatures, Widths


class Ladder(nn.Module):
    """``s_t = Σ_r P_{t,r}(x_r)``: rungs × teachers of projectors, summed over rungs.

    A rung's patches are brought to the common grid *before* its projector: the projectors of all
    rungs then see one grid, the sum needs no further resampling, and each (rung, grid) is
    resampled once for all teachers that meet there. For a grid smaller than the rung's (the early
    stages of a CNN) this is also the cheap order.

    Args:
        student_widths: widths of every rung that the student returns.
        teacher_widths: name → widths of the teacher.
        projectors: makes each projector.
        rungs: which of the student's rungs carry projectors: all, the last, or indices (negative
            ones count from the end).

    Raises:
        ValueError: for no teacher, a teacher name that can't be part of a parameter's name, or
            rungs that the student does not have.
    """

    def __init__(
        self,
        student_widths: Sequence[Widths],
        teacher_widths: Mapping[str, Widths],
        projectors: ProjectorFactory,
        rungs: Literal["all", "last"] | Sequence[int] = "all",
    ) -> None:
        super().__init__()
        if not teacher_widths:
            raise ValueError("a ladder needs at least one teacher, received none")
        self.num_rungs = len(student_widths)
        self.rungs = resolve_rungs(rungs, self.num_rungs)
        self.teachers = tuple(teacher_widths)
        self.projectors = nn.ModuleDict()
        for name, widths in teacher_widths.items():
            if not name or "." in name or hasattr(self.projectors, name):
                raise ValueError(
                    f"teacher name {name!r} can't be part of a parameter's name: "
                    "use letters, digits, '_' and '-', and no word that torch reserves"
                )
            self.projectors[name] = nn.ModuleDict(
                {
                    str(r): projectors.build(
                        student_widths[r], widths, last=r == self.num_rungs - 1
                    )
                    for r in self.rungs
                }
            )

    def forward(
        self,
        rungs: Sequence[TokenFeatures],
        grids: Mapping[str, Grid | None],
        teachers: Collection[str] | None = None,
    ) -> dict[str, TokenFeatures]:
        """Predict teachers.

        Args:
            rungs: one per rung of the student, chosen or not.
            grids: teacher → the grid on which its prediction is wanted; None (or no entry) leaves
                the rungs' own grids, which must then be equal.
            teachers: the names to predict; None for all. The others cost nothing, and the caller
                adds ``unused_zero`` of them to its loss.

        Returns:
            name → prediction in the teacher's widths, float32 where it is a sum of several rungs
            (half precisions would lose digits in it).

        Raises:
            ValueError: for an unknown teacher or the wrong number of rungs.
        """
        if len(rungs) != self.num_rungs:
            raise ValueError(
                f"the ladder was built for {self.num_rungs} rungs, received {len(rungs)}"
            )
        asked = self.teachers if teachers is None else tuple(teachers)
        resampled: dict[tuple[int, Grid | None], TokenFeatures] = {}
        predictions: dict[str, TokenFeatures] = {}
        for name in asked:
            grid = grids.get(name)
            parts: list[TokenFeatures] = []
            for r, projector in self._of(name):
                if (r, grid) not in resampled:
                    resampled[r, grid] = _on_grid(rungs[r], grid)
                parts.append(projector(resampled[r, grid]))
            predictions[name] = _sum(name, parts)
        return predictions

    def teacher_parameters(self, name: str) -> list[nn.Parameter]:
        """Parameters of one teacher's projectors."""
        return [p for _, projector in self._of(name) for p in projector.parameters()]

    def unused_zero(self, names: Collection[str]) -> Tensor:
        """0 as a scalar float32 that depends on every parameter of these teachers.

        Added to the loss of a step in which they did not run, it gives their parameters a gradient
        (of zeros), so that DDP need not search for unused ones.
        """
        parameters = [p for name in names for p in self.teacher_parameters(name)]
        if not parameters:
            return torch.zeros((), dtype=torch.float32)
        # Under FSDP2 a parameter is a shard here; the zero of the local shard is as good.
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
        return 0.0 * torch.stack([shard.float().sum() for shard in shards]).sum()

    def _of(self, name: str) -> list[tuple[int, Projector]]:
        if name not in self.projectors:
            raise unknown_name("teacher", name, self.teachers)
        projectors = cast(nn.ModuleDict, self.projectors[name])
        return [(int(r), cast(Projector, projector)) for r, projector in projectors.items()]


def resolve_rungs(rungs: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Rung indices in ascending order, from a choice among ``count`` rungs.

    Raises:
        ValueError: for none, repeated ones, or indices outside ``[-count, count)``.
    """
    if rungs == "all":
        return tuple(range(count))
    if rungs == "last":
        return (count - 1,)
    if isinstance(rungs, str):  # from YAML or Python without a type checker
        raise unknown_name("choice of rungs", rungs, ["all", "last"], "or a list of indices")
    chosen = [r + count if r < 0 else r for r in rungs]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= r < count for r in chosen):
        raise ValueError(
            f"rungs must be 'all', 'last' or different indices from {-count} to {count - 1}, "
            f"received {list(rungs)}"
        )
    return tuple(sorted(chosen))


def _on_grid(features: TokenFeatures, grid: Grid | None) -> TokenFeatures:
    if grid is None or features.patches is None or features.grid in (None, grid):
        return features
    patches = resample_patches(features.patches, features.grid, grid)
    return TokenFeatures(summary=features.summary, patches=patches, grid=grid)


def _sum(name: str, parts: list[TokenFeatures]) -> TokenFeatures:
    if len(parts) == 1:
        return parts[0]
    if len({part.grid for part in parts}) > 1:
        raise ValueError(
            f"the rungs for teacher {name!r} have different grids "
            f"({', '.join(str(part.grid) for part in parts)}): pass the target grid"
        )
    return TokenFeatures(
        summary=_add([part.summary for part in parts]),
        patches=_add([part.patches for part in parts]),
        grid=parts[-1].grid,
    )


def _add(tensors: list[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        if tensor is not None:
            total = full_precision(tensor) if total is None else total + tensor
    return total
