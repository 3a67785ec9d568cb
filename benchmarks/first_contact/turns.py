"""A child's turn on the GPU: it gets ready beside others, and is alone when it is timed. Imports no jax."""

import argparse
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path


def wait(gate: Path, seconds: float) -> None:
    """Waits until the parent creates `gate`; from then on this process ends itself, whatever it is stuck in, after
    `seconds`."""
    while not gate.exists():
        if os.getppid() == 1:
            raise SystemExit("the parent ended")
        time.sleep(0.02)
    # The default action of SIGALRM ends the process in the kernel, also from inside a launch that never returns.
    signal.alarm(max(1, int(seconds)))


def arguments(names: Iterable[str]) -> argparse.Namespace:
    """Returns the child's arguments: one of these names, its gate and its seconds; --full for checks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(names))
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--full", action="store_true")
    return parser.parse_args()
