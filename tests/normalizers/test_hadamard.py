"""Hadamard matrices against their definition, and against scipy's where it has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multikd.normalizers.hadamard import construction, hadamard, spreading_matrix

# Encoders' widths; 28 and 244 need the fields of 3³ and 3⁵, 36 the second construction, 344 7³.
ORDERS = [1, 2, 4, 12, 28, 36, 64, 96, 244, 344, 384, 768, 1024, 1152, 1280, 1408, 1536]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_entries_of_one_size(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert (matrix @ matrix.T - torch.eye(order)).abs().max() < 1e-12
    np.testing.assert_allclose(matrix.abs(), order**-0.5, rtol=1e-14)


def test_powers_of_two_are_sylvester_s() -> None:
    from scipy.linalg import hadamard as reference

    np.testing.assert_allclose(hadamard(32) * 32**0.5, reference(32))
    assert construction(32) == "Sylvester 32"


def test_second_paley_and_prime_powers_are_used() -> None:
    assert construction(36) == "Paley II 36"  # 35 is no prime power; 17 is
    assert construction(100) == "Paley II 100"  # over the field of 7² elements
    assert construction(344) == "Paley I 344"  # of 7³
    assert construction(72) == "Paley I 72"
    assert construction(96) == "Sylvester 8 ⊗ Paley I 12"
    for order in (36, 100):
        signs = (hadamard(order) * order**0.5).round().long()
        assert torch.equal(signs @ signs.T, order * torch.eye(order, dtype=torch.long))


def test_widths_without_a_construction_say_so() -> None:
    known = [n for n in range(4, 1000, 4) if construction(n) is not None]
    assert len(known) == 194
    assert min(set(range(4, 1000, 4)) - set(known)) == 92
    assert construction(3) is None
    with pytest.raises(ValueError, match="no Hadamard matrix of width 92 can be built"):
        hadamard(92)
    with pytest.raises(ValueError, match="width of 1 or more, received 0"):
        construction(0)


@pytest.mark.parametrize("width", [3, 5, 6, 92, 250, 333])
def test_the_substitute_is_orthogonal_and_spreads_exactly(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    values = torch.rand(width, generator=generator) ** 8 * torch.logspace(0, -6, width)
    matrix = spreading_matrix(values)
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-12
    variances = (matrix * values.double()) @ matrix.T
    mean = values.double().mean()
    np.testing.assert_allclose(variances.diagonal() / mean, 1.0, rtol=1e-9)
    # Spread over all dimensions, not merely orthogonal (the identity would be, too).
    assert matrix.abs().max() * width**0.5 < 2.0


def test_the_substitute_of_nothing_to_spread() -> None:
    for values in (torch.zeros(6), torch.ones(7)):
        matrix = spreading_matrix(values)
        assert (matrix @ matrix.T - torch.eye(len(values))).abs().max() < 1e-12
