"""What every child of a first contact does around its own work: records what it launches and what failed, is
simulated in a rehearsal."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.families import Timing, tiny
from recollect.benchmarks.kernel_case import Arrays, Case
from recollect.benchmarks.kernel_cases import CASES
from recollect.benchmarks.peer_side import one_line
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
    full = tiny(timing.sizes) if records.rehearsing() else timing.sizes
    return CASES[timing.operation, timing.variant](**{**full, **sizes})


def launching(what: str, **facts: Any) -> None:
    """Records that `what` is about to run on the device, so that the last line names what hung or aborted."""
    records.write("started", what=what, **facts)
    fault = os.environ.get(records.FAULT_VARIABLE)
    if fault == "hang":
        time.sleep(3600)
    if fault == "abort":
        os.abort()


@contextlib.contextmanager
def recording_failure(what: str, **facts: Any) -> Iterator[None]:
    """Records an exception of one launch; the child goes on with the next."""
    try:
        yield
    except Exception as error:
        records.write("failed", what=what, error=one_line(error, 600), **facts)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns the function compiled for the device (in a rehearsal, simulated) and for arguments of these shapes."""
    with dispatch.interpreted() if records.rehearsing() else contextlib.nullcontext():
        return jax.jit(function).lower(*arguments).compile()


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
