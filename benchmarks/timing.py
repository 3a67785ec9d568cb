"""Times of compiled functions, one by one and in turns, and the times that no kernel can beat."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from recollect.benchmarks.kernel_case import Arrays, Case
from recollect.training.monitoring.chips import chip_of

TURN = 0.01
"""Seconds of a turn: so many calls that a launch does not count."""


def timed(run: Callable[..., Any], *arguments: Any, turns: int = 20, turn: float = TURN) -> tuple[float, float]:
    """Returns the median seconds per call of a compiled function, and the spread of the turns, (longest - shortest) /
    median.

    Args:
      turns: how often; each has as many calls as fill `turn` seconds, at least one, and the device is synchronised at
        its end.
    """
    jax.block_until_ready(run(*arguments))
    begun = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    calls = max(1, int(turn / max(time.perf_counter() - begun, 1e-6)))
    times = []
    for _ in range(turns):
        begun = time.perf_counter()
        for _ in range(calls):
            out = run(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begun) / calls)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def floors(case: Case, inputs: Arrays, device_kind: str) -> dict[str, float] | None:
    """Returns the seconds that no form can beat by the device's data sheet, "forward" and "both"; None where it is not
    known.

    Bytes: forward, each input and the output once; with gradients the inputs twice, output, cotangent, and each
    gradient.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    output = jax.eval_shape(lambda x: case.run(x, "reference"), inputs)
    read, written = sum(x.nbytes for x in inputs.values()), output.size * output.dtype.itemsize
    return {
        "forward": max((read + written) / chip.bandwidth, case.work / chip.flops),
        "both": max((3 * read + 2 * written) / chip.bandwidth, 3 * case.work / chip.flops),
    }


def time_in_turns(functions: Mapping[str, Callable[[], Any]], turns: int = 5, seconds: float = 0.0) -> dict[str, float]:
    """Returns the median seconds per call of each function, after one call of each that compiles it.

    The functions take turns, so that whatever else the machine does meets all of them.

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
