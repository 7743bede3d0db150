"""Random orders that never change: they depend only on the seed, not on a library's random number generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each value: a bijection for every seed (so equal hashes mean equal values).

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
    """
    offset = np.full_like(values, _mix_int((seed + _GOLDEN) & _MASK))
    mixed = values + offset  # arrays of uint64 wrap around, as the hash needs
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def permutation(size: int, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return the numbers `0 .. size - 1` in a random order that depends on seed and epoch.

    Example:
        >>> permutation(8, seed=42).tolist()
        [6, 7, 2, 0, 3, 1, 5, 4]
    """
    keys = mix64(np.arange(size, dtype=np.uint64), _mix_int(seed & _MASK) + epoch * _GOLDEN)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
