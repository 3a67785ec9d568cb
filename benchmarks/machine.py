"""What a timing depends on beside the program: processor, cores, and what else the machine was doing.

Easy to get wrong: the load average lags by a minute and counts the benchmark itself. What others did while a piece was
timed is the processors' busy time less that of the benchmark's own processes, which Linux gives in /proc to 10 ms.
"""

import os
import time
from pathlib import Path
from typing import Any

from recollect.configuration.machine import cpu_count

QUIET = 0.1
"""Cores kept busy by others, up to which a timing may be quoted."""


def describe_machine() -> dict[str, Any]:
    """Returns processor, cores and load average of the last minute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else "unknown processor"
    return {"cpu_model": model, "cores": cpu_count(), "load_average": os.getloadavg()[0]}


def device_folder(machine: dict[str, Any], backend: str, device_kind: str) -> str:
    """Returns the name of the folder of results: the accelerator's kind, or the processor's model and cores."""
    return folder_name(f"cpu {machine['cpu_model']} {machine['cores']} cores" if backend == "cpu" else device_kind)


def folder_name(name: str) -> str:
    """Returns a device's name as a folder has it: lower case, words joined by hyphens."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


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
