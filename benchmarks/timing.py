"""Times of compiled functions, one by one and in turns; the times that no kernel can beat; and what else the machine
was doing meanwhile.

Easy to get wrong: the load average lags by a minute and counts the benchmark itself. What others did while a piece was
timed is the processors' busy time less that of the benchmark's own processes, which Linux gives in /proc to 10 ms.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from recollect.benchmarks import kernel_case, peer_side
from recollect.training.monitoring.chips import chip_of

QUIET = 0.1
"""Cores kept busy by others, up to which a timing may be quoted."""


def timed(run: Callable[..., Any], *arguments: Any, turns: int = 20) -> tuple[float, float]:
    """Returns the median seconds per call of a compiled function, and the spread of the turns (peer_side.timed)."""
    return peer_side.timed(lambda: run(*arguments), jax.block_until_ready, turns)


def floors(case: kernel_case.Case, inputs: kernel_case.Arrays, device_kind: str) -> dict[str, float] | None:
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


def time_in_turns(
    functions: Mapping[str, Callable[[], Any]], turns: int = 5, seconds: float = 0.0, warm_up: bool = True
) -> dict[str, float]:
    """Returns the median seconds per call of each function, after one call of each that compiles it (`warm_up`).

    The functions take turns, so that whatever else the machine does meets all of them.

    Args:
      turns: least number of turns.
      seconds: least time that all turns take together.
    """
    for function in functions.values() if warm_up else ():
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


class OtherLoad:
    """Measures cores kept busy by other programs since it was made, or since `cores` was last called.

    Args:
      processes: ids of the benchmark's own processes; this one is always among them.
    """

    def __init__(self, processes: tuple[int, ...] = ()):
        self.processes = (os.getpid(), *processes)
        self.before = self._now()

    def cores(self) -> float:
        """Returns the number; NaN where the system does not give it."""
        before, self.before = self.before, self._now()
        wall, busy, own = (after - old for after, old in zip(self.before, before, strict=True))
        others = (busy - own) / max(wall, 1e-9)
        return 0.0 if others < 0 else others

    def _now(self) -> tuple[float, float, float]:
        """Seconds: on the clock, busy on all processors, and of these our own."""
        try:
            ticks = os.sysconf("SC_CLK_TCK")
            # user, nice, system, (idle, iowait,) irq, softirq, steal
            numbers = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            busy = sum(numbers[:3]) + sum(numbers[5:])
            own = sum(_process_ticks(process) for process in self.processes)
        except (OSError, ValueError, IndexError):
            return time.perf_counter(), float("nan"), float("nan")
        return time.perf_counter(), busy / ticks, own / ticks


def _process_ticks(process: int) -> int:
    """User and system time of a process and its threads."""
    # The name, in parentheses, may hold spaces; state is the first field after it, times are the 12th and 13th.
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
