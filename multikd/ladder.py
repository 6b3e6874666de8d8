"""The ladder (UNIC, arXiv 2408.05088): a prediction of each teacher from several student rungs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from multikd.errors import unknown_name
from multikd.functional import autocast_dtype, full_precision
from multikd.grids import resample_patches
from multikd.mlp_sums import MLP, mlp_sums
from multikd.projectors import Projector, ProjectorFactory, mlp_weights, summary_of
from multikd.types import TOKEN_TYPES, Grid, TokenFeatures, TokenType, Widths


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
        fused: compute the projectors of all rungs and teachers together where they are plain
            two-layer MLPs (``multikd.mlp_sums``); the same numbers, and the same parameters.

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
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
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
        sample: Callable[[TokenFeatures, Grid | None], TokenFeatures] | None = None,
    ) -> dict[str, TokenFeatures]:
        """Predict teachers.

        Args:
            rungs: one per rung of the student, chosen or not.
            grids: teacher → the grid on which its prediction is wanted; None (or no entry) leaves
                the rungs' own grids, which must then be equal.
            teachers: the names to predict; None for all. The others cost nothing, and the caller
                adds ``unused_zero`` of them to its loss.
            sample: keeps some of a rung's patches, which lie on a grid; for projectors that do not
                mix patches.

        Returns:
            name → prediction in the teacher's widths: of MLPs, which are summed over the rungs in
            one product, in the dtype of autocast; of other projectors float32 where it is a sum
            of several rungs (half precisions would lose digits in it).

        Raises:
            ValueError: for an unknown teacher or the wrong number of rungs.
        """
        if len(rungs) != self.num_rungs:
            raise ValueError(
                f"the ladder was built for {self.num_rungs} rungs, received {len(rungs)}"
            )
        asked = self.teachers if teachers is None else tuple(teachers)
        resampled: dict[tuple[int, Grid | None], TokenFeatures] = {}

        def seen(r: int, grid: Grid | None) -> TokenFeatures:
            if (r, grid) not in resampled:
                found = _on_grid(rungs[r], grid)
                resampled[r, grid] = found if sample is None else sample(found, grid)
            return resampled[r, grid]

        meetings: dict[Grid | None, list[str]] = {}
        for name in asked:
            meetings.setdefault(grids.get(name), []).append(name)
        predictions: dict[str, TokenFeatures] = {}
        for grid, names in meetings.items():
            of_names = {name: self._of(name) for name in names}
            here = [seen(r, grid) for r in self.rungs]
            together = self._together(here, of_names) if self.fused else {}
            for name in names:
                predictions[name] = (
                    together[name]
                    if name in together
                    else _sum(
                        name,
                        [
                            projector(features)
                            for features, (_, projector) in zip(here, of_names[name], strict=True)
                        ],
                    )
                )
        return {name: predictions[name] for name in asked}

    def _together(
        self,
        rungs: Sequence[TokenFeatures],
        of_names: Mapping[str, Sequence[tuple[int, Projector]]],
    ) -> dict[str, TokenFeatures]:
        """Predictions of those teachers whose projectors are all plain MLPs, in one go."""
        weights = {
            name: [mlp_weights(projector) for _, projector in projectors]
            for name, projectors in of_names.items()
        }
        names = [
            name
            for name, own in weights.items()
            if all(mlps is not None and mlps.keys() == (own[0] or {}).keys() for mlps in own)
        ]
        grids = {rung.grid for rung in rungs}
        found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for token in TOKEN_TYPES:
            asked = [name for name in names if token in (weights[name][0] or {})]
            inputs = [_token(rung, token) for rung in rungs]
            present = [x for x in inputs if x is not None]
            if not asked or not present:
                continue
            mlps = [[MLP(*(w or {})[token]) for w in weights[name]] for name in asked]
            if len(present) < len(inputs) or len(grids) > 1 or not _agree(present, mlps):
                return {}  # the projectors, one by one, say what is wrong
            for name, result in zip(asked, mlp_sums(present, mlps), strict=True):
                found[name][token] = result
        return {
            name: TokenFeatures(
                summary=own.get("summary"),
                patches=own.get("patches"),
                grid=rungs[-1].grid if "patches" in own else None,
            )
            for name, own in found.items()
        }

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


class NoLadder(Ladder):
    """Of a run that compares no features through projectors: it predicts nobody.

    Args:
        student_widths: widths of every rung that the student returns.
    """

    def __init__(self, student_widths: Sequence[Widths]) -> None:
        nn.Module.__init__(self)
        self.fused = False
        self.num_rungs = len(student_widths)
        self.rungs, self.teachers = (), ()
        self.projectors = nn.ModuleDict()


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


def _token(features: TokenFeatures, token: TokenType) -> Tensor | None:
    return summary_of(features) if token == "summary" else features.patches


def _agree(inputs: Sequence[Tensor], outputs: Sequence[Sequence[MLP]]) -> bool:
    """Whether one product can hold them: fitting widths, one dtype unless autocast makes it so."""
    if any(
        x.shape[-1] != mlp.w1.shape[1]
        for mlps in outputs
        for x, mlp in zip(inputs, mlps, strict=True)
    ):
        return False
    if autocast_dtype(inputs[0].device) is not None:
        return inputs[0].dtype != torch.float64
    return all(w.dtype == inputs[0].dtype for mlps in outputs for mlp in mlps for w in mlp)


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
