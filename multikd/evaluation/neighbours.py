"""Exact nearest neighbours by cosine similarity, at the price of float32 products.

Float32 products find candidates, float64 products rank them. What float32 can get wrong is bounded
(Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1: for any order of
summation ``|fl(x·y) − x·y| ≤ γ_D Σ|x_i y_i|`` with ``γ_D = D·u/(1 − D·u)``), so that every query
for which a true neighbour could have been missed is noticed, and searched again in float64.

Shapes: M rows of the bank, B queries, D width, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from multikd.evaluation.selection import GROUP, largest, stable_top

# Candidates beyond k: near the k-th neighbour more rows than k may be within rounding.
_SPARE = 28
# Queries multiplied at once at most; more is no faster.
_ROWS = 512
# Values converted at once: few enough for a processor's cache, enough for several threads.
_CONVERTED = 2**17
# Where even float64 products can't separate rows, similarities on this grid decide.
_TIE_GRID = 2.0**-44


class Neighbours(NamedTuple):
    """The k nearest bank rows of every query, nearest first; equally near ones by index."""

    indices: Tensor  # int64 (B, k)
    similarities: Tensor  # float64 (B, k), cosine in [-1, 1]


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, memory_mb: float = 512.0
) -> Neighbours:
    """The ``k`` rows of ``bank`` with the largest cosine similarity to every query, exactly.

    Similarities are float64 products of the rows in float64. A row of zeros has similarity 0 to
    everything. Of rows equally near, those with the lowest index are taken; where more than
    ``k + 28`` rows are nearer to the k-th than float64 rounding (about D·2⁻⁵³: duplicates,
    collapsed features), equally near means equal to 2⁻⁴⁴.

    Args:
        bank: ``(M, D)``, any floating dtype.
        queries: ``(B, D)``.
        k: neighbours, from 1 to M.
        memory_mb: megabytes (2²⁰ bytes) of working memory, beside the inputs and the result; from
            1. Less is slower.

    Returns:
        Indices ``(B, k)`` and similarities ``(B, k)`` on the device of ``bank`` (on the CPU where
        that device has no float64).

    Raises:
        ValueError: shapes that do not fit, k out of range, or values that are not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            "bank and queries must be (M, D) and (B, D) of one width, received "
            f"{tuple(bank.shape)} and {tuple(queries.shape)}"
        )
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(
            f"k must be from 1 to the {bank.shape[0]} rows of the bank, received {k}: "
            "use a smaller k or a larger bank"
        )
    if not memory_mb >= 1:
        raise ValueError(f"memory_mb must be at least 1, received {memory_mb}")
    device = torch.device("cpu") if bank.device.type == "mps" else bank.device
    bank, queries = bank.detach().to(device), queries.detach().to(device)
    with _full_precision(device.type):
        memory = memory_mb * 2**20
        norms = _norms(bank, "bank", memory)
        query_norms = _norms(queries, "queries", memory)
        indices = torch.empty((len(queries), k), dtype=torch.int64, device=device)
        similarities = torch.empty((len(queries), k), dtype=torch.float64, device=device)
        todo = torch.arange(len(queries), device=device)
        for dtype in (torch.float32, torch.float64):
            search = _Search(bank, norms, queries, query_norms, k, dtype, memory)
            missed = []
            for rows in search.groups(todo):
                found = search.run(rows)
                indices[rows], similarities[rows] = found.indices, found.similarities
                missed.append(rows[~found.proven])
            todo = torch.cat(missed) if missed else todo
            if len(todo) == 0:
                break
        for rows in search.groups(todo):
            found = search.on_grid(rows)
            indices[rows], similarities[rows] = found.indices, found.similarities
    return Neighbours(indices, similarities)


class _Found(NamedTuple):
    indices: Tensor
    similarities: Tensor
    proven: Tensor  # bool (B,): no true neighbour can be missing


@dataclass
class _Search:
    """One pass at one precision: products, candidates, and what they prove."""

    bank: Tensor
    norms: Tensor
    queries: Tensor
    query_norms: Tensor
    k: int
    dtype: torch.dtype
    memory: float

    def __post_init__(self) -> None:
        rows, width = self.bank.shape
        size = torch.finfo(self.dtype).bits // 8
        self.kept = min(self.k + _SPARE, rows)
        tile = min(rows, max(GROUP, int(self.memory / 2 / (width * size))))
        self.tile = math.ceil(rows / math.ceil(rows / tile))
        self.tiles = math.ceil(rows / self.tile)
        # Products, their group maxima, the columns looked at; a query in float64 and in dtype.
        columns = self.tile + 2 * GROUP + self.tile // GROUP + 2 * GROUP * self.kept
        row = size * columns + 24 * width
        self.rows = max(1, min(_ROWS, int(self.memory / 4 / row)))
        # Candidates of all queries between the tiles: in what is left, with room to sort them.
        left = 0.75 * (self.memory - self.tile * width * size - self.rows * row)
        self.group = max(self.rows, int(left / (self.tiles * self.kept * (size + 80))))
        self.step = _step(self.memory, width)
        unit = torch.finfo(self.dtype).eps / 2
        # Each factor is rounded once (8 covers both and their products), each product D times.
        self.bound = (width + 8) * unit / (1 - (width + 8) * unit)

    def groups(self, rows: Tensor) -> Iterator[Tensor]:
        """Queries whose candidates fit into memory together."""
        return (part for part in torch.split(rows, self.group) if len(part))

    def run(self, rows: Tensor) -> _Found:
        """Neighbours of the queries ``rows``, and for which of them they are proven."""
        values, indices, excluded = self._candidates(rows)
        kth = values.topk(self.k, dim=1).values[:, -1:].to(torch.float64)
        # Whatever lies below can't reach the k-th, whichever way both were rounded.
        enough = kth - 2 * self.bound
        ranked = values.to(torch.float64) >= enough
        proven = excluded.to(torch.float64) < enough[:, 0]
        indices, order = indices.sort(dim=1)  # so that a stable sort prefers the lower index
        ranked, values = ranked.gather(1, order), values.gather(1, order)
        exact = torch.full_like(values, -torch.inf, dtype=torch.float64)
        self._rank(rows, indices, ranked, exact)
        # A device that rounds more than it should (TF32, bfloat16 products) proves nothing.
        wrong = ranked & ((exact - values.to(torch.float64)).abs() > self.bound)
        best = exact.sort(dim=1, descending=True, stable=True)
        chosen = best.indices[:, : self.k]
        return _Found(
            indices.gather(1, chosen), best.values[:, : self.k], proven & ~wrong.any(dim=1)
        )

    def on_grid(self, rows: Tensor) -> _Found:
        """Neighbours by float64 similarities on a grid, so that equal means equal."""
        best_values = torch.full((len(rows), 0), 0.0, dtype=torch.float64, device=self.bank.device)
        best = best_values.to(torch.int64)
        for start, tile in self._bank_tiles():
            parts = []
            for some in torch.split(rows, self.rows):
                products = self._unit_queries(some) @ tile.T
                products.div_(_TIE_GRID).round_().mul_(_TIE_GRID)
                parts.append(stable_top(products, min(self.k, len(tile))))
            values = torch.cat([best_values, torch.cat([values for values, _ in parts])], dim=1)
            found = torch.cat([best, torch.cat([columns for _, columns in parts]) + start], dim=1)
            # Earlier tiles come first, and so do lower indices among equals.
            order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
            best_values, best = values.gather(1, order), found.gather(1, order)
        return _Found(best, best_values, torch.ones_like(rows, dtype=torch.bool))

    def _candidates(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest products ``(G, tiles·kept)``, their columns, and a bound on all the others."""
        shape = (len(rows), self.tiles * self.kept)
        values = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.bank.device)
        indices = torch.zeros(shape, dtype=torch.int64, device=self.bank.device)
        excluded = values.new_full((len(rows),), -torch.inf)
        groups = math.ceil(self.tile / GROUP)
        buffer = values.new_empty((min(self.rows, len(rows)), groups * GROUP))
        for number, (start, tile) in enumerate(self._bank_tiles()):
            buffer[:, len(tile) :] = -torch.inf
            for first in range(0, len(rows), self.rows):
                some = rows[first : first + self.rows]
                products = buffer[: len(some)]
                torch.mm(
                    self._unit_queries(some).to(self.dtype), tile.T, out=products[:, : len(tile)]
                )
                top, columns, rest = largest(products, min(self.kept, len(tile)))
                where = slice(first, first + len(some))
                place = slice(number * self.kept, number * self.kept + top.shape[1])
                values[where, place], indices[where, place] = top, columns + start
                if top.shape[1] < len(tile):
                    excluded[where] = torch.maximum(excluded[where], rest)
        return values, indices, excluded

    def _rank(self, rows: Tensor, indices: Tensor, ranked: Tensor, out: Tensor) -> None:
        """Float64 similarities of the candidates marked in ``ranked`` into ``out``.

        Every one is a row-wise product summed in the same order, so that equal rows of the bank
        have equal similarities to the last bit, which no matrix product promises.
        """
        step = self.step
        for first in range(0, len(rows), self.rows):
            where = slice(first, first + self.rows)
            unit = self._unit_queries(rows[where])
            pairs = ranked[where].nonzero()
            column = indices[where][pairs[:, 0], pairs[:, 1]]
            found = torch.empty(len(pairs), dtype=torch.float64, device=out.device)
            for start in range(0, len(pairs), step):
                some = slice(start, start + step)
                left = self.bank.index_select(0, column[some]).to(torch.float64)
                left *= unit.index_select(0, pairs[some, 0])
                found[some] = left.sum(dim=1) / self.norms[column[some]]
            out[where][pairs[:, 0], pairs[:, 1]] = found

    def _bank_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Start and unit rows of every tile of the bank."""
        width = self.bank.shape[1]
        step = self.step
        buffer = self.bank.new_empty((self.tile, width), dtype=self.dtype)
        for start in range(0, len(self.bank), self.tile):
            stop = min(start + self.tile, len(self.bank))
            tile = buffer[: stop - start]
            for first in range(start, stop, step):
                last = min(first + step, stop)
                rows = self.bank[first:last].to(torch.float64)
                tile[first - start : last - start] = rows / self.norms[first:last, None]
            yield start, tile

    def _unit_queries(self, rows: Tensor) -> Tensor:
        # Not in place: float64 queries are not a copy.
        return self.queries[rows].to(torch.float64) / self.query_norms[rows, None]


def _norms(rows: Tensor, name: str, memory: float) -> Tensor:
    """Float64 Euclidean norms ``(M,)``, 1 for a row of zeros.

    Raises:
        ValueError: a value that is not finite.
    """
    norms = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    step = _step(memory, rows.shape[1])
    for start in range(0, len(rows), step):
        some = rows[start : start + step].to(torch.float64)
        if rows.dtype == torch.float64:
            # Squares of its largest and smallest values leave its range; others' don't.
            scale = some.abs().amax(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
            found = scale * torch.linalg.vector_norm(some / scale[:, None], dim=1)
        else:
            found = torch.linalg.vector_norm(some, dim=1)
        norms[start : start + step] = found
    if not bool(torch.isfinite(norms).all()):
        raise ValueError(f"the features of the {name} must be finite, received NaN or infinity")
    return torch.where(norms > 0, norms, 1.0)


def _step(memory: float, width: int) -> int:
    """Rows converted to float64 at once."""
    return max(1, min(_CONVERTED, int(memory / 64)) // max(1, width))


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 products in float32: no autocast, no TF32 or bfloat16 passes."""
    before = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)
