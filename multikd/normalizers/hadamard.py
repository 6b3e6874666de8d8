"""Hadamard matrices of any width that has a known simple construction, and what to do otherwise.

A Hadamard matrix is square, of ±1, with orthogonal rows; beside 1 and 2 its order is a multiple of
4. Built here from Sylvester's (powers of two), Paley's first and second (over any finite field of
odd order) and Kronecker products of these. Orders below 1,000 that they leave out begin with 92.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Signs = npt.NDArray[np.int64]


def construction(width: int) -> str | None:
    """How a Hadamard matrix of ``width`` is built, such as ``Sylvester 32 ⊗ Paley II 36``.

    None where none of the constructions applies.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"a matrix needs a width of 1 or more, received {width}")
    plan = _plan(width)
    return None if plan is None else " ⊗ ".join(f"{kind} {order}" for kind, order in plan)


def hadamard(width: int) -> Tensor:
    """A normalised Hadamard matrix: float64 ``(width, width)``, entries ±1/√width, ``H Hᵀ = I``.

    Raises:
        ValueError: there is no construction for this width.
    """
    construction(width)  # refuses what is no width
    plan = _plan(width)
    if plan is None:
        raise ValueError(
            f"no Hadamard matrix of width {width} can be built here (it takes a multiple of 4, "
            "from powers of two and from primes): use spreading_matrix"
        )
    signs: Signs = np.ones((1, 1), dtype=np.int64)
    for kind, order in plan:
        signs = np.kron(signs, _BUILDERS[kind](order))
    return torch.from_numpy(signs / np.sqrt(width))


def spreading_matrix(eigenvalues: Tensor) -> Tensor:
    """An orthogonal Q that gives every dimension the same variance: ``diag(Q Λ Qᵀ) = mean λ``.

    The Hadamard matrix of the width where there is one: it does so for every Λ. Elsewhere the
    nearest thing to one, the discrete Hartley matrix (orthogonal, entries up to √2/√width), turned
    by at most D − 1 plane rotations that bring one diagonal entry each to the mean (Bendel &
    Mickey 1978). The variances are then exact too, for this Λ.

    Args:
        eigenvalues: ``(D,)``, 0 or more.

    Returns:
        float64 ``(D, D)`` on the CPU.
    """
    width = len(eigenvalues)
    if construction(width) is not None:
        return hadamard(width)
    values = eigenvalues.detach().double().cpu().numpy()
    angles = 2.0 * np.pi * np.outer(np.arange(width), np.arange(width)) / width
    rows = (np.cos(angles) + np.sin(angles)) / np.sqrt(width)
    mean = values.mean()
    matrix = (rows * values) @ rows.T
    for _ in range(width):
        diagonal = np.diag(matrix)
        # The first of those that are equal but for rounding, as many here are by symmetry: the
        # choice must not turn with the last bit of the eigenvalues.
        near = 1e-9 * mean
        low = int((diagonal <= diagonal.min() + near).argmax())
        high = int((diagonal >= diagonal.max() - near).argmax())
        if diagonal[high] - diagonal[low] <= 1e-12 * max(mean, 1e-300):
            break
        below, above, b = diagonal[low] - mean, diagonal[high] - mean, matrix[low, high]
        # tan of the turn after which entry `low` is the mean: the smaller root of the quadratic.
        root = np.sqrt(b * b - below * above)
        tangent = below / (b + (root if b >= 0 else -root))
        c = 1.0 / np.sqrt(1.0 + tangent * tangent)
        turn = np.array([[c, -tangent * c], [tangent * c, c]])
        pair = [low, high]
        rows[pair] = turn @ rows[pair]
        matrix[pair] = turn @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ turn.T
    return torch.from_numpy(rows)


@cache
def _plan(order: int) -> tuple[tuple[str, int], ...] | None:
    """The Kronecker factors of a matrix of this order: (construction, order) each."""
    if order & (order - 1) == 0:
        return (("Sylvester", order),)
    if order % 4:
        return None
    if _prime_power(order - 1) is not None and (order - 1) % 4 == 3:
        return (("Paley I", order),)
    if _prime_power(order // 2 - 1) is not None and (order // 2 - 1) % 4 == 1:
        return (("Paley II", order),)
    # The largest power of two first: that factor costs nothing to build.
    for factor in sorted((d for d in range(2, order) if order % d == 0), key=_oddness):
        left = _plan(factor)
        right = _plan(order // factor)
        if left is not None and right is not None:
            return (*left, *right)
    return None


def _oddness(number: int) -> tuple[int, int]:
    power = number & -number
    return (number // power, -power)


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with p^k = number, p an odd prime; None otherwise."""
    if number < 3 or number % 2 == 0:
        return None
    prime = next((d for d in range(3, int(number**0.5) + 1, 2) if number % d == 0), number)
    rest, power = number, 0
    while rest % prime == 0:
        rest, power = rest // prime, power + 1
    return (prime, power) if rest == 1 else None


def _sylvester(order: int) -> Signs:
    signs: Signs = np.ones((1, 1), dtype=np.int64)
    while len(signs) < order:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def _paley_1(order: int) -> Signs:
    q = order - 1
    signs: Signs = np.ones((order, order), dtype=np.int64)
    signs[1:, 0] = -1
    signs[1:, 1:] = _jacobsthal(q) + np.eye(q, dtype=np.int64)
    return signs


def _paley_2(order: int) -> Signs:
    q = order // 2 - 1
    conference: Signs = np.ones((q + 1, q + 1), dtype=np.int64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    one = np.eye(q + 1, dtype=np.int64)
    return np.kron(conference, np.array([[1, 1], [1, -1]])) + np.kron(
        one, np.array([[1, -1], [-1, -1]])
    )


_BUILDERS = {"Sylvester": _sylvester, "Paley I": _paley_1, "Paley II": _paley_2}


def _jacobsthal(q: int) -> Signs:
    """χ(a − b) over all a, b of the field of q elements; χ is 1 on squares, −1 elsewhere, χ(0)=0.

    Elements are polynomials over the integers mod p, their coefficients the digits of an index.
    """
    found = _prime_power(q)
    if found is None:
        raise ValueError(f"there is no field of {q} elements with an odd characteristic")
    p, k = found
    places = p ** np.arange(k)
    digits = np.arange(q)[:, None] // places % p
    character: Signs = np.full(q, -1, dtype=np.int64)
    character[_squares(digits, p, places)] = 1
    character[0] = 0
    index: Signs = np.zeros((q, q), dtype=np.int64)
    for place, digit in zip(places, digits.T, strict=True):
        index += place * ((digit[:, None] - digit[None, :]) % p)
    return character[index]


def _squares(digits: Signs, p: int, places: Signs) -> Signs:
    """Indices of the squares of all elements but 0.

    Reduction is by the first polynomial that makes a field: then and only then no square but 0's
    is 0, and half of the elements are squares.
    """
    q, k = digits.shape
    for tail in digits:  # x^k + tail
        product: Signs = np.zeros((q, 2 * k - 1), dtype=np.int64)
        for i in range(k):
            product[:, i : i + k] += digits[:, i : i + 1] * digits
        for degree in range(2 * k - 2, k - 1, -1):
            product[:, degree - k : degree] -= product[:, degree : degree + 1] % p * tail
        squares = (product[:, :k] % p) @ places
        distinct = np.unique(squares[1:])
        if 0 not in distinct and len(distinct) == (q - 1) // 2:
            return distinct
    raise ValueError(f"no irreducible polynomial of degree {k} over {p} was found")
