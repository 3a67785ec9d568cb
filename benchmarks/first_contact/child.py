"""What every child of a first contact does around its own work: takes its turn on the GPU, records what it launches and
what failed, is simulated in a rehearsal. Imports jax where something is compiled, and nowhere else."""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.peer_side import one_line


def arguments(names: Iterable[str]) -> argparse.Namespace:
    """Returns the child's arguments: one of these names, its gate and its seconds; --full for checks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(names))
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--full", action="store_true")
    return parser.parse_args()


def wait(gate: Path, seconds: float) -> None:
    """Waits until the parent creates `gate`: a child gets ready beside others, and is alone when it is timed. From then
    on this process ends itself, whatever it is stuck in, after `seconds`."""
    while not gate.exists():
        if os.getppid() == 1:
            raise SystemExit("the parent ended")
        time.sleep(0.02)
    # The default action of SIGALRM ends the process in the kernel, also from inside a launch that never returns.
    signal.alarm(max(1, int(seconds)))


def launching(what: str, **facts) -> None:
    """Records that `what` is about to run on the device, so that the last line names what hung or aborted."""
    records.write("started", what=what, **facts)
    fault = os.environ.get(records.FAULT_VARIABLE)
    if fault == "hang":
        time.sleep(3600)
    if fault == "abort":
        os.abort()


@contextlib.contextmanager
def recording_failure(what: str, **facts) -> Iterator[None]:
    """Records an exception of one launch; the child goes on with the next."""
    try:
        yield
    except Exception as error:
        records.write("failed", what=what, error=one_line(error, 600), **facts)


def compiled(function: Callable, *arguments) -> Callable:
    """Returns the function compiled for the device (in a rehearsal, simulated) and for arguments of these shapes."""
    import jax

    from recollect.pallas_kernels import dispatch

    with dispatch.interpreted() if records.rehearsing() else contextlib.nullcontext():
        return jax.jit(function).lower(*arguments).compile()
