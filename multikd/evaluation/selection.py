"""The largest values of every row of a wide matrix, fast or with ties in order.

Shapes: R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates are looked for in the columns whose group of GROUP has one of the largest maxima.
GROUP = 64


def largest(products: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest of every row, their columns, and a bound ``(R,)`` on all the others.

    ``products`` is ``(R, groups·GROUP)``, contiguous, padded by −∞. The largest values lie in the
    groups of columns with the largest maxima, and one cheap pass over the row finds those.
    """
    rows, groups = len(products), products.shape[1] // GROUP
    if groups <= 2 * count:
        top = products.topk(count, dim=1)
        return top.values, top.indices, top.values[:, -1]
    leading = products.view(rows, groups, GROUP).amax(dim=2).topk(count, dim=1)
    first = torch.arange(rows, device=products.device)[:, None] * groups
    chosen = (first + leading.indices).flatten()
    some = products.view(rows * groups, GROUP).index_select(0, chosen).view(rows, -1)
    top = some.topk(count, dim=1)
    place = top.indices
    group = leading.indices.gather(1, place.div(GROUP, rounding_mode="floor"))
    columns = group * GROUP + place % GROUP
    return top.values, columns, torch.maximum(leading.values[:, -1], top.values[:, -1])


def stable_top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of every row, and their columns; ties go to the lower index, unlike with ``topk``."""
    bound = similarities.topk(k, dim=1, sorted=True).values[:, -1:]
    above = similarities > bound
    # Of those at the bound, as many of the first as are still wanted.
    wanted = k - above.sum(dim=1, keepdim=True)
    tied = similarities == bound
    chosen = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= wanted))
    indices = chosen.nonzero()[:, 1].view(len(similarities), k)
    values = similarities.gather(1, indices)
    order = values.sort(dim=1, descending=True, stable=True).indices
    return values.gather(1, order), indices.gather(1, order)
