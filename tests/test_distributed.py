from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from helpers.ddp import run_ranks
from torch import Tensor

from multikd import distributed as D
from multikd.functional import batch_moments


def _reductions() -> dict[str, object]:
    rank = D.rank()
    x = torch.tensor([1.0 + rank, 10.0 - rank], requires_grad=True)
    summed = D.all_reduce_sum(x)
    return {
        "world": D.world_size(),
        "rank": rank,
        "sum": summed,
        "grad": summed.requires_grad,
        "input": x.detach(),
        "mean": D.all_reduce_mean(x),
        "max": D.all_reduce_max(x),
        "rows": D.all_gather_rows(torch.arange(4.0).reshape(2, 2) + 100 * rank),
        "objects": D.all_gather_object({"rank": rank}),
        "stopped": _stopped(rank),
    }


def _stopped(rank: int) -> list[str]:
    """What a block says of which nothing fails, rank 1 fails, and both do."""
    said = []
    for failing in ((), (1,), (0, 1)):
        try:
            with D.all_or_none():
                if rank in failing:
                    raise OSError(f"no room for {rank}")
            said.append("")
        except (ValueError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_reductions_on_two_ranks() -> None:
    for rank, result in enumerate(run_ranks(_reductions)):
        assert (result["world"], result["rank"]) == (2, rank)
        assert result["sum"].tolist() == [3.0, 19.0]
        assert result["mean"].tolist() == [1.5, 9.5]
        assert result["max"].tolist() == [2.0, 10.0]
        assert result["grad"] is False
        assert result["input"].tolist() == [1.0 + rank, 10.0 - rank]  # not in place
        assert result["rows"].tolist() == [[0, 1], [2, 3], [100, 101], [102, 103]]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        other = "ValueError: no room for 1 (on rank 1; all of them stop)"
        mine = f"OSError: no room for {rank}"
        assert result["stopped"] == ["", mine if rank else other, mine]


def test_a_single_process_reduces_to_itself() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (D.world_size(), D.rank()) == (1, 0)
    for result in (D.all_reduce_sum(x), D.all_reduce_max(x), D.all_gather_rows(x)):
        assert torch.equal(result, x)
        result += 1  # a new tensor: the argument stays
    assert x.tolist() == [1.0, 2.0]
    assert D.all_gather_object("a") == ["a"]
    D.barrier()


def _moments(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return D.combine_moments(*batch_moments(parts[D.rank()], 0))


@pytest.mark.parametrize("sizes", [(300, 300), (500, 7), (64, 0)])
def test_moments_of_ranks_are_those_of_the_union(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    # Badly conditioned: mean 100, deviation 0.5, and ranks whose means differ.
    parts = [torch.randn(n, 6, generator=generator) * 0.5 + 100 + i for i, n in enumerate(sizes)]
    union = torch.cat(parts).double().numpy()
    for count, mean, m2 in run_ranks(_moments, 2, parts):
        assert count.tolist() == [sum(sizes)] * 6
        np.testing.assert_allclose(mean, union.mean(0), rtol=1e-9)
        np.testing.assert_allclose(m2, union.var(0) * sum(sizes), rtol=1e-5)


def test_moments_of_nothing_are_zero() -> None:
    for result in D.combine_moments(*batch_moments(torch.zeros(0, 3), 0)):
        assert result.tolist() == [0.0, 0.0, 0.0]


def _fail_on_rank_1() -> None:
    if D.rank() == 1:
        raise ZeroDivisionError("rank one's own words")
    D.barrier()


def _hang() -> None:
    time.sleep(60)


def test_the_helper_reports_a_failing_rank_and_a_hanging_one() -> None:
    with pytest.raises(RuntimeError, match="rank one's own words"):
        run_ranks(_fail_on_rank_1)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="still running"):
        run_ranks(_hang, 1, timeout=1.0)
    assert time.monotonic() - start < 30
