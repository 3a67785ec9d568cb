"""Random numbers that follow from a key and a position, the same in every version of NumPy.

A run continued years later, or on another host, must draw what it drew before. NumPy guarantees that for its bit
generators' raw output and for SeedSequence, but not for the methods of `Generator` (NEP 19), so plans and orders are
made from raw bits here.
"""

import numpy as np
from jaxtyping import Float, Int, UInt64


def raw_bits(key: tuple[int, ...], count: int) -> UInt64[np.ndarray, " count"]:
    """Returns integers uniform over all values of 64 bits; `key` holds non-negative integers."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def uniforms(key: tuple[int, ...], count: int) -> Float[np.ndarray, " count"]:
    """Returns numbers uniform in [0, 1), float64."""
    return (raw_bits(key, count) >> np.uint64(11)) * 2.0**-53


def permutation(key: tuple[int, ...], count: int) -> Int[np.ndarray, " count"]:
    """Returns the numbers 0 .. count - 1 in random order."""
    return np.argsort(raw_bits(key, count), kind="stable")


def seed_of(key: tuple[int, ...]) -> int:
    """Returns one number below 2^32 from a key, for libraries that take such a seed."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
