"""Random numbers that a key and a position decide, the same in every version of NumPy.

A run continued years later, or on another host, must draw what it drew before. NumPy promises that for its bit
generators' raw output and for SeedSequence, but not for the methods of `Generator` (NEP 19), so plans and orders are
made from raw bits here.
"""

from __future__ import annotations

import numpy as np


def raw_bits(key: tuple[int, ...], count: int) -> np.ndarray:
    """(count,) uint64 uniform over all values; `key` holds non-negative integers."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """(count,) float64 uniform in [0, 1)."""
    return (raw_bits(key, count) >> np.uint64(11)) * 2.0**-53


def permutation(key: tuple[int, ...], count: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in random order, (count,) int64."""
    return np.argsort(raw_bits(key, count), kind="stable")


def seed_of(key: tuple[int, ...]) -> int:
    """One number below 2^32 from a key, for libraries that take such a seed."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
