"""What every child of a first contact does around its own work: says what it launches, waits for its turn, runs
simulated in a rehearsal."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.families import Timing, tiny
from recollect.benchmarks.kernel_case import Arrays, Case
from recollect.benchmarks.kernel_cases import CASES
from recollect.pallas_kernels import dispatch

JLA_KINDS = {
    "decay per head": "simple_gla",
    "decay per channel": "gla",
    "gated delta, decay per head": "gated_deltanet",
    "gated delta, decay per channel": "kda",
}
"""Names of the recurrences in jax-linear-attention."""


def case_of(timing: Timing, **sizes: int) -> Case:
    """Returns the timing's case, in a rehearsal at the sizes at which the simulator takes seconds, changed by
    `sizes`."""
    wanted = tiny(timing.sizes) if records.rehearsing() else dict(timing.sizes)
    return CASES[timing.operation, timing.variant](**{**wanted, **sizes})


def on_device() -> contextlib.AbstractContextManager[None]:
    """Returns the context in which kernels are traced: nothing on a GPU, the simulator in a rehearsal."""
    return dispatch.interpreted() if records.rehearsing() else contextlib.nullcontext()


def launching(what: str, **facts: Any) -> None:
    """Records that `what` is about to run on the device, so that the last line names what hung or aborted."""
    records.write("started", what=what, **facts)
    fault = os.environ.get(records.FAULT_VARIABLE)
    if fault == "hang":
        time.sleep(3600)
    if fault == "abort":
        os.abort()


def failed(what: str, error: Exception, **facts: Any) -> None:
    """Records an exception of one launch; the child goes on with the next."""
    records.write("failed", what=what, error=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}", **facts)


def form(case: Case, name: str) -> Callable[[Arrays], jax.Array]:
    """Returns the case on a backend, one of its plain forms, or jax-linear-attention's own kernels ("jla")."""
    if name == "jla":
        return functools.partial(_jla, case.variant)
    return case.plain[name] if name in case.plain else lambda x: case.run(x, name)


def _jla(variant: str, x: Arrays) -> jax.Array:
    from jla.ops import linear_attention

    gates = {"g": x["log_decay"]} if "log_decay" in x else {}
    gates |= {"beta": x["beta"].astype(x["v"].dtype)} if "beta" in x else {}
    return linear_attention(JLA_KINDS[variant], x["q"], x["k"], x["v"], impl="mosaic_gpu", **gates)[0]
