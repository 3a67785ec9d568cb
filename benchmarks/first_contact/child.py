"""What every child of a first contact does around its own work: says what it launches, waits for its turn, runs simulated in a rehearsal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.first_contact import records
from benchmarks.kernel_case import Arrays, Case
from pallas_kernels import dispatch

REHEARSAL_VARIABLE = "FIRST_CONTACT_REHEARSAL"
FAULT_VARIABLE = "FIRST_CONTACT_FAULT"
"""In a rehearsal, what this child does at its first launch: "hang" or "abort"."""


def rehearsing() -> bool:
    """Returns whether kernels are to be simulated, at tiny sizes, on a machine without a GPU."""
    return bool(os.environ.get(REHEARSAL_VARIABLE))


def on_device() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which kernels are traced: nothing on a GPU, the simulator in a rehearsal."""
    return dispatch.interpreted() if rehearsing() else contextlib.nullcontext()


def launching(what: str, **facts: Any) -> None:
    """Records that `what` is about to run on the device, so that a hang or an abort can be told from its last line."""
    records.write("started", what=what, **facts)
    fault = os.environ.get(FAULT_VARIABLE)
    if fault == "hang":
        time.sleep(3600)
    if fault == "abort":
        os.abort()


def failed(what: str, error: Exception, **facts: Any) -> None:
    """Records an exception of one launch; the child goes on with the next."""
    records.write("failed", what=what, error=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}", **facts)


def wait_for_turn(gate: Path, seconds: float) -> None:
    """Waits until the parent creates `gate`; from then on this process ends itself, whatever it is stuck in, after `seconds`."""
    while not gate.exists():
        if os.getppid() == 1:
            raise SystemExit("the parent ended")
        time.sleep(0.02)
    # The default action of SIGALRM ends the process in the kernel, also from inside a launch that never returns.
    signal.alarm(max(1, int(seconds)))


def form(case: Case, name: str) -> Callable[[Arrays], jax.Array]:
    """Returns the case on a backend, or one of its plain forms."""
    return case.plain[name] if name in case.plain else lambda x: case.run(x, name)
