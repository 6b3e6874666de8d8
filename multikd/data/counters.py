"""Random numbers that are a function of named counters, never of what was drawn before.

A draw is keyed by (seed, stream) and counted by up to three integers such as (epoch, position,
view). The numbers come from Philox 4×64-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") as raw 64-bit words: NumPy promises to keep the raw words of a bit generator, but not
what ``Generator`` methods make of them, so the mapping to floats and permutations is done here.
"""

from __future__ import annotations

import threading
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_UNIT = 2.0**-53
_UNUSED_BITS = np.uint64(11)  # of a word, beyond the 53 of a float64
_EMPTY = np.zeros(4, dtype=np.uint64)


class _Generators(threading.local):
    """One bit generator a thread, whose whole state every draw sets.

    Making a new one takes four times as long, as it asks the system for entropy that is not used.
    """

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_generators = _Generators()


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    SHARDS = 1
    WINDOW = 2
    BLOCK = 3
    LIVE_VIEW = 4
    RECORDED_VIEW = 5
    HELD_OUT = 16
    VIEW = 6


def raw_words(
    count: int, seed: int, stream: Stream, a: int = 0, b: int = 0, c: int = 0
) -> npt.NDArray[np.uint64]:
    """``count`` raw 64-bit words for the counter (a, b, c).

    The lowest counter word runs over the draws themselves, so neighbouring counters never share
    words.
    """
    counter = np.array((0, a & _MASK, b & _MASK, c & _MASK), dtype=np.uint64)
    key = np.array((seed & _MASK, int(stream)), dtype=np.uint64)
    philox = _generators.philox
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": key},
        "buffer": _EMPTY,
        "buffer_pos": len(_EMPTY),  # nothing left of an earlier draw
        "has_uint32": 0,
        "uinteger": 0,
    }
    return philox.random_raw(count)


def uniforms(
    count: int, seed: int, stream: Stream, a: int = 0, b: int = 0, c: int = 0
) -> npt.NDArray[np.float64]:
    """``count`` uniform draws in [0, 1), float64 with 53 random bits each."""
    words = raw_words(count, seed, stream, a, b, c)
    return (words >> _UNUSED_BITS).astype(np.float64) * _UNIT


def permutation(
    count: int, seed: int, stream: Stream, a: int = 0, b: int = 0, c: int = 0
) -> npt.NDArray[np.int64]:
    """A permutation of 0 … count − 1: the stable order of ``count`` raw words."""
    words = raw_words(count, seed, stream, a, b, c)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
