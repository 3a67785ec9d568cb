"""Times functions in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def time_in_turns(functions: Mapping[str, Callable[[], Any]], turns: int = 5, seconds: float = 0.0) -> dict[str, float]:
    """Returns the median seconds per call of each function, after one call of each that compiles it.

    Args:
      turns: least number of turns.
      seconds: least time that all turns take together.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    end, turn = time.perf_counter() + seconds, 0
    while turn < turns or time.perf_counter() < end:
        turn += 1
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
