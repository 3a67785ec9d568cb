"""What a person who waits is told: what is being done, for how long, and how long the same program compiled last time.

The cache folder keeps the seconds of compilations that somebody waited for, in a file per program: `compile_times/`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recollect.configuration.base import Config, UserError, to_json
from recollect.configuration.console import NOW
from recollect.configuration.machine import cache_folder


def waiting_line() -> str:
    """Returns what is being done, its seconds, and more about it where there is more."""
    more = NOW.job[2]() if NOW.job else ""
    return f"  {NOW.what}, {time.monotonic() - NOW.since:.0f} s{time_last()} {more}".rstrip()


def time_last() -> str:
    """Returns "; took 31 s last time" while a program is compiled that was before, else "". Whoever asks waits: the
    compilation's seconds are kept once it ends."""
    program = NOW.program
    if program is None:
        return ""
    with contextlib.suppress(OSError, ValueError, UserError):  # a cache folder that cannot be used
        return _time_of(program)
    return ""


@functools.lru_cache(maxsize=1)
def _time_of(program: Callable[[], Any]) -> str:
    """Returns what `time_last` does; once per compilation, it also waits for the end in a thread of its own."""
    file = cache_folder() / "compile_times" / _digest(program())
    threading.Thread(target=_keep, args=(file, program, NOW.since), daemon=True).start()
    return f"; took {float(file.read_text()):.0f} s last time" if file.exists() else ""


def _keep(file: Path, program: Callable[[], Any], since: float) -> None:
    """Writes the seconds from `since` to the end of a compilation, unless the command ends before."""
    while NOW.program is program:
        time.sleep(0.05)
    seconds = time.monotonic() - since
    if NOW.what.startswith("step"):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{seconds:.2f}")


def _digest(program: tuple[Config, int, Any]) -> str:
    """Returns a name for a program: its config, steps and arrays by their shapes, and what compiles it."""
    import jax
    import numpy as np

    config, steps, arrays = program
    shapes = [np.shape(array) for array in jax.tree.leaves(arrays)]
    compiler = (jax.__version__, jax.devices()[0].device_kind, jax.device_count())
    return hashlib.sha256(json.dumps([to_json(config), steps, shapes, compiler]).encode()).hexdigest()[:20]
